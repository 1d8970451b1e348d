"""Claim: on a CPU the tiny recipe trains at least 12 times as many tokens a second as TRL's SFTTrainer does, with the same loss and gradient.

    pip install --no-deps --target FOLDER trl==1.16.0
    python benchmarks/peers.py --reference FOLDER [--chats 16] [--steps 6] [--rounds 3] [--threads 1]
    python benchmarks/peers.py                        without TRL: the table of where a step goes alone

Both sides train the same model (that of `make sft`, from the same random weights) on the same token ids and labels, in fp32, with the
same AdamW, all chats in each step. Losses come first: unless TRL's padded run begins with our loss (within 1e-5 of it) and with our
gradient (its norm within 1e-3), nothing is timed. Later steps differ by what AdamW makes of a gradient near 0, and of the scan of
transformers, which in fp32 gives one chat other values when it is padded (1e-4 of a nat). TRL pads the chats of a step to one length, or packs them (its best fit); without FlashAttention a packed chat then sees those
before it, so that the loss is another one, and is printed. Ours are packs as the recipe makes them.

Seconds are those of the processor: the median of the steps after the first. The sides take turns, each in a process of its own. Tokens
are those of the chats; padding counts for nobody. The last table says where a step of ours goes, and how much of the machine's
matrix product (1,024 x 1,024, measured after each step, same threads) forward and backward reach. Only products are counted as work:
all that a profile shows (step_profile.py). The same products alone, in the shapes of the step, are the bound: no step can be faster.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

LR, BETAS, CLIP = 1e-3, (0.9, 0.95), 1.0
ALIKE = {"loss": 1e-5, "norm": 1e-3}  # relative, of the first step
SIDES = ("ours", "TRL, padded", "TRL, packed")
TYPED = (
    f"optimizer.lr={LR}", "optimizer.weight_decay=0", f"optimizer.clip_grad={CLIP}", "scheduler.lr_warmup_iters=0",
    f"optimizer.adam_beta1={BETAS[0]}", f"optimizer.adam_beta2={BETAS[1]}", "scheduler.lr_decay_style=constant",
    "loss.stages=[{stage: token}]", "model.moe_router_bias_update_rate=0",
    "train.global_batch_size=1",
)  # what another trainer can do as well


def settings():
    """The training of the tiny recipe, as far as TRL has it."""
    from nemotron_nb.ops.config import sft_config

    return sft_config("nano3", "tiny", TYPED).settings.training("", "")


def write_problem(folder, chats):
    """Model and rows, for both sides."""
    from nemotron_nb.data.mask import training_sequences
    from nemotron_nb.data.records import parse_conversation
    from nemotron_nb.data.sample import sample_path
    from nemotron_nb.data.tokenizer import load_tokenizer
    from nemotron_nb.train.checkpoint import export_hf
    from nemotron_nb.train.model import build_model

    tokenizer = load_tokenizer("tiny")
    with open(sample_path(), encoding="utf-8") as file:
        found = [s for line in islice(file, chats) for s in training_sequences(parse_conversation(json.loads(line)), tokenizer)]
    rows = [{"ids": s.input_ids.tolist(), "mask": s.loss_mask.tolist()} for s in found]
    (folder / "rows.json").write_text(json.dumps(rows))
    tokenizer.save(folder / "tokenizer", chat_template=None)
    export_hf(build_model(settings().model, tokenizer.vocab_size, seed=0), folder / "tokenizer", folder / "model")
    return rows


def pack_size(rows):
    """The smallest power of two from 2,048 on that holds the longest row, as the recipe has it."""
    return max(2048, 1 << (max(len(row["ids"]) for row in rows) - 1).bit_length())


def our_learner(folder):
    """(learner, settings, the packs of a step): what a rank of the recipe would build."""
    import numpy as np

    from nemotron_nb.data.pack import make_pack, pack
    from nemotron_nb.train.model import build_model
    from nemotron_nb.train.objective import Learner

    config, rows = settings(), json.loads((folder / "rows.json").read_text())
    parts = [(np.array(row["ids"], np.int32), np.array(row["mask"], np.uint8)) for row in rows]
    bins = pack([len(row["ids"]) for row in rows], pack_size(rows)).tolist()
    packs = [make_pack(*zip(*(parts[i] for i in bin)), [str(i) for i in bin]) for bin in bins]
    model = build_model(replace(config.model, name=str(folder / "model")), 1)
    return Learner(model, config.model, None, "fp32"), config, packs


def run_ours(folder, steps):
    """{loss, norm, seconds: of each step; parts: of the median step; peak: operations a second of one product; and, of forward and
    backward: flops, alone: seconds of its products by themselves, families: seconds by kind of operator}
    """
    from step_profile import alone, by_family, observed
    from train_step import Clock

    from nemotron_nb.train import torch_engine
    from nemotron_nb.train.batches import global_batch

    learner, config, packs = our_learner(folder)
    optimizer, lines, seconds, parts, peaks = torch_engine.make_optimizer(learner, config.optimizer), [], [], [], []
    for step in range(steps):
        clock = Clock("cpu")
        start = time.process_time()
        batch = clock.timed("batch", global_batch)(packs)
        with clock.watching():
            lines.append(torch_engine.train_step(learner, optimizer, batch, step, config))
        seconds.append(time.process_time() - start)
        parts.append(clock.parts | {"clipping, optimizer, record": seconds[-1] - sum(clock.parts.values())})
        peaks.append(matrix_product())
    ops = observed(lambda: torch_engine.make_gradient(learner.train(), batch, "token", config.train.micro_batch_tokens))
    work = {"flops": sum(op.operations for op in ops), "alone": alone(ops), "families": by_family(ops)}
    median = sorted(range(1, steps), key=seconds.__getitem__)[(steps - 1) // 2]
    curves = {"loss": [line["loss"] for line in lines], "norm": [line["grad_norm"] for line in lines]}
    return curves | work | {"seconds": seconds, "parts": parts[median], "peak": statistics.median(peaks[1:])}


def run_trl(folder, steps, packed):
    """{loss, norm, seconds: of each step}"""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Watch(TrainerCallback):
        """The seconds of each step."""

        seconds: list[float] = []

        def on_step_begin(self, *given, **named):
            self.start = time.process_time()

        def on_step_end(self, *given, **named):
            self.seconds.append(time.process_time() - self.start)

    rows = json.loads((folder / "rows.json").read_text())
    data = Dataset.from_list([
        {"input_ids": r["ids"], "labels": [t if m else -100 for t, m in zip(r["ids"], r["mask"])]} for r in rows
    ])
    config = SFTConfig(
        output_dir=str(folder / "trl"), max_steps=steps, per_device_train_batch_size=len(rows), learning_rate=LR, packing=packed,
        max_length=pack_size(rows), adam_beta1=BETAS[0], adam_beta2=BETAS[1], max_grad_norm=CLIP, lr_scheduler_type="constant", bf16=False,
        gradient_checkpointing=False, use_cpu=True, report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True,
        dataloader_drop_last=False,
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32")
    watch = Watch()
    trainer = SFTTrainer(model, args=config, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(folder / "model"), callbacks=[watch])
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return {"loss": [n["loss"] for n in lines], "norm": [n["grad_norm"] for n in lines], "seconds": watch.seconds}


def in_a_process(side, folder, given):
    """What one side measures."""
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--steps", str(given.steps), "--threads", str(given.threads)]
    path = os.pathsep.join(filter(None, [given.reference or "", os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"OMP_NUM_THREADS": str(given.threads), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{side}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def one_side(side, folder, given):
    """Measure, and print a line of JSON."""
    import torch

    torch.set_num_threads(given.threads)
    found = run_ours(folder, given.steps) if side == "ours" else run_trl(folder, given.steps, side.endswith("packed"))
    print("\n" + json.dumps(found))


def matrix_product(size=1024):
    """Operations a second of the processor in a product of two matrices in float32."""
    import torch
    from step_profile import seconds_of

    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / seconds_of(lambda: a @ b)


def where_it_goes(ours, tokens):
    """The tables of a step: its parts, then forward and backward by kind of operator."""
    total, peak = sum(ours["parts"].values()), ours["peak"]
    print(f"\na step of ours: {tokens:,} tokens, {total:.3f} s")
    for name, seconds in ours["parts"].items():
        print(f"  {name:28} {seconds:7.3f} s {seconds / total:6.1%}")
    inside, profiled = ours["parts"]["forward"] + ours["parts"]["backward"], sum(ours["families"].values())
    print("forward and backward by kind of operator, least of some profiled steps")
    for name, seconds in ours["families"].items():
        print(f"  {name:28} {seconds:7.3f} s {seconds / profiled:6.1%}")
    reached, bound = (ours["flops"] / seconds / 1e9 for seconds in (inside, ours["alone"]))
    print(f"  {ours['flops'] / 1e9:.1f} GFLOP in matrix products; one of 1,024 x 1,024 runs at {peak / 1e9:.1f} GFLOP/s here")
    print(f"  forward and backward      {inside:7.3f} s {reached:6.1f} GFLOP/s {reached * 1e9 / peak:4.0%} of that")
    print(f"  the same products alone   {ours['alone']:7.3f} s {bound:6.1f} GFLOP/s {bound * 1e9 / peak:4.0%}: no step can be faster")


def compared(folder, given, tokens):
    """Losses, then seconds of all sides in turns. What ours measured."""
    found = {side: [in_a_process(side, folder, given)] for side in SIDES}
    for side in SIDES:
        print(f"{side:12} loss " + " ".join(f"{loss:.5f}" for loss in found[side][0]["loss"]))
    off = {name: abs(found["ours"][0][name][0] / found["TRL, padded"][0][name][0] - 1) for name in ALIKE}
    if any(off[name] > most for name, most in ALIKE.items()):
        raise SystemExit(f"the first steps differ: {off}; nothing is timed")
    print(f"first step, padded beside ours: loss within {off['loss']:.0e}, gradient's norm within {off['norm']:.0e}\n")
    for _ in range(given.rounds - 1):
        for side in SIDES:
            found[side].append(in_a_process(side, folder, given))
    seconds = {side: statistics.median(statistics.median(run["seconds"][1:]) for run in found[side]) for side in SIDES}
    print(f"{'side':12} {'s a step':>9} {'tokens/s':>9} {'ours is':>9}")
    for side in SIDES:
        print(f"{side:12} {seconds[side]:9.3f} {tokens / seconds[side]:9,.0f} {seconds[side] / seconds['ours']:8.1f}x")
    return found["ours"][-1]


def main():
    """Compare, print, and say where a step goes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", help="where TRL is installed")
    for name, value in (("chats", 16), ("steps", 6), ("rounds", 3), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        return one_side(given.side, given.folder, given)
    with tempfile.TemporaryDirectory() as place:
        rows = write_problem(Path(place), given.chats)
        tokens = sum(len(row["ids"]) for row in rows)
        padded = len(rows) * max(len(row["ids"]) for row in rows)
        print(f"{len(rows)} chats, {tokens:,} tokens ({padded:,} when padded), {given.threads} thread(s), load {os.getloadavg()[0]:.1f}")
        ours = compared(Path(place), given, tokens) if given.reference else in_a_process("ours", Path(place), given)
        where_it_goes(ours, tokens)


if __name__ == "__main__":
    main()
