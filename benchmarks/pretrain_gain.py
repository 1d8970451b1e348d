"""What does a base model give to the fine-tuning on a laptop? The same fine-tuning with and without it, over several seeds.

    nemotron nano3 pretrain -c tiny            # first; it says where its model lies
    python benchmarks/pretrain_gain.py RUN/model [--seeds 1 2 3] [--steps 260]

Settings, chats and sizes are those of `nemotron nano3 sft -c tiny`; generations are left out, so that the time goes into the losses. With other
--steps, the two stages keep their shares. Held-out loss a token at ten points of each training; the table is printed at the end.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from nemotron_nb.core import from_mapping
from nemotron_nb.data.prep import prepare
from nemotron_nb.ops.config import sft_config
from nemotron_nb.train.settings import TrainConfig
from nemotron_nb.train.torch_engine import train


def curve(settings, data, folder, seed, base, steps):
    """[(step, held-out loss a token)] of a training."""
    sections = {name: dataclasses.asdict(getattr(settings, name)) for name in ("model", "train", "optimizer", "scheduler")}
    token = round(steps * 190 / 260)
    sections["train"] |= {"train_iters": steps, "seed": seed, "eval_interval": max(1, steps // 10), "log_interval": steps}
    sections |= {"loss": {"stages": [{"stage": "token", "steps": token}, {"stage": "sample"}]}, "evaluation": {"num_generations": 1, "max_new_tokens": 1}}
    sections |= {"checkpoint": {"pretrained_checkpoint": base}} if base else {}
    config = from_mapping(TrainConfig, {"data_dir": str(data), "output_dir": str(folder)} | sections)
    with contextlib.redirect_stdout(io.StringIO()):
        train(config)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss_token"]) for line in lines if line["kind"] == "valid"]


def main(base, seeds, steps):
    """Train, and print."""
    settings = sft_config("nano3", "tiny").settings
    with tempfile.TemporaryDirectory() as work:
        data = Path(work) / "packs"
        prepare(dataclasses.replace(settings.data, output_dir=str(data), workers=1))
        found = {}
        for seed in seeds:
            for name, first in (("without", ""), ("with", base)):
                began, cpu = time.perf_counter(), time.process_time()
                found[name, seed] = curve(settings, data, Path(work) / f"{name}_{seed}", seed, first, steps)
                spent = f"{time.perf_counter() - began:.0f} s, {time.process_time() - cpu:.0f} s of CPU"
                print(f"seed {seed} {name:8}", " ".join(f"{step}:{loss:.3f}" for step, loss in found[name, seed]), spent, flush=True)
    print("\n| seed | without, at the end | with, at the end | steps that the one with needs for it |\n|---|---|---|---|")
    for seed in seeds:
        without, with_base = found["without", seed][-1][1], found["with", seed]
        reached = next((f"{step} of {steps}" for step, loss in with_base if loss <= without), "not reached")
        print(f"| {seed} | {without:.3f} | {with_base[-1][1]:.3f} | {reached} |")
    ends = {name: np.array([found[name, seed][-1][1] for seed in seeds]) for name in ("without", "with")}
    print("mean:", {name: f"{values.mean():.3f} (spread {np.ptp(values):.3f})" for name, values in ends.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=260)
    given = parser.parse_args()
    main(given.base, given.seeds, given.steps)
