"""Claim: outside forward and backward a training step of the PyTorch engine costs little (target: under 5 % on a GPU), and the fused loss saves time and memory.

    python benchmarks/train_step.py                   CPU: a small model, packs of 1,024 tokens
    python benchmarks/train_step.py --device cuda     GPU: a few hundred million parameters, packs of 4,096 tokens, bf16 (autocast)

The same packs for every variant, in one process, variants in turn; a step is everything from reading the packs to moved weights.
- seconds: of a step, median over the repeats after one warm-up. On the CPU `time.process_time`, since the machine is shared; on a GPU the wall, synchronised.
- outside: share of the step that is neither forward nor backward (batches, clipping, optimizer, numbers for the record).
- GiB: on a GPU, the peak of allocated memory; on a CPU it is not measured.
- logits: the same step with all logits made, for comparison.
Nothing is printed for a device that is not there.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_nb.core import from_mapping
from nemotron_nb.data.pack import Pack, make_pack
from nemotron_nb.loss.fused import LossStats
from nemotron_nb.train.batches import FusedOutput, global_batch
from nemotron_nb.train.objective import Learner, make_mtp, recompute
from nemotron_nb.train.model import build_model
from nemotron_nb.train.settings import TrainConfig
from nemotron_nb.train.torch_engine import make_optimizer, train_step

SIZES = {
    "cpu": {"model": {"hidden_size": 128}, "vocab": 4096, "pack": 1024, "packs": 2, "precision": "fp32"},
    "cuda": {
        "model": {"pattern": "MEMEM*EMEM*E", "hidden_size": 1024, "attention_heads": 16, "mamba_heads": 32, "state_size": 64, "experts": 16, "experts_per_token": 4, "expert_size": 768, "init_std": 0.02},
        "vocab": 131_072,
        "pack": 4096,
        "packs": 4,
        "precision": "bf16",
    },
}


def packs_like_chats(count: int, size: int, vocab: int) -> list[Pack]:
    """Full packs of sequences of many lengths; the last third of each sequence is trained."""
    rng, packs = np.random.default_rng(0), []
    for _ in range(count):
        cuts = np.sort(rng.choice(np.arange(32, size - 32), size=6, replace=False))
        lengths = [n for n in np.diff([0, *cuts, size]) if n > 1]
        packs.append(make_pack([rng.integers(1, vocab, n) for n in lengths], [(np.arange(n) > 2 * n // 3).astype(np.uint8) for n in lengths], [f"c{i}" for i in range(len(lengths))]))
    return packs


def all_logits(layer: FusedOutput, hidden: Tensor, labels: Tensor | None = None, weights: Tensor | None = None, scale: float | None = None) -> Tensor | tuple[Tensor, LossStats]:
    """The output layer without the fused loss."""
    logits = F.linear(hidden, layer.weight)
    if labels is None:
        return logits
    nll = F.cross_entropy(logits.float(), labels, reduction="none", ignore_index=-100)
    return (nll * weights).sum() * (scale or 1.0), LossStats(torch.where(weights != 0, nll, 0).detach(), nll.detach(), (weights != 0).sum())


class Clock:
    """Seconds of parts of a step, forward and backward first."""

    def __init__(self, device: str):
        self.cuda, self.parts = device == "cuda", {}

    def now(self) -> float:
        """CPU seconds, or the wall when the GPU has caught up."""
        if not self.cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, name: str, act: Callable) -> Callable:
        """The same function on the clock."""

        def run(*given, **named):
            """Act, and add the seconds."""
            start = self.now()
            found = act(*given, **named)
            self.parts[name] = self.parts.get(name, 0.0) + self.now() - start
            return found

        return run

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Add up what passes in forward and backward."""
        forward, backward = self.timed("forward", Learner.forward), self.timed("backward", Tensor.backward)
        with mock.patch.object(Learner, "forward", forward), mock.patch.object(Tensor, "backward", backward):
            yield


def measure(device: str, fused: bool, computed_twice: bool, mtp: int, repeats: int) -> tuple[float, float, float, int, int]:
    """(seconds a step, share outside, GiB, tokens a step, parameters)."""
    sizes = SIZES[device]
    model_settings = sizes["model"] | {"mtp_num_layers": mtp}
    config = from_mapping(TrainConfig, {"data_dir": "", "output_dir": "", "model": model_settings, "train": {"micro_batch_tokens": 4 * sizes["pack"], "precision": sizes["precision"]}})
    model = build_model(config.model, sizes["vocab"], seed=0)
    learner = Learner(model, config.model, make_mtp(model) if mtp else None, sizes["precision"]).to(device)
    if computed_twice:
        recompute(learner)
    optimizer, packs, clock = make_optimizer(learner, config.optimizer), packs_like_chats(sizes["packs"], sizes["pack"], sizes["vocab"]), Clock(device)
    seconds, outside, batch = [], [], None
    with mock.patch.object(FusedOutput, "forward", FusedOutput.forward if fused else all_logits), clock.watching():
        for step in range(1 + repeats):
            if step == 1 and clock.cuda:
                torch.cuda.reset_peak_memory_stats()
            clock.parts, start = {}, clock.now()
            batch = global_batch(packs)
            train_step(learner, optimizer, batch, step, config)
            seconds.append(clock.now() - start)
            outside.append(1 - sum(clock.parts.values()) / seconds[-1])
    memory = torch.cuda.max_memory_allocated() / 2**30 if clock.cuda else float("nan")
    return statistics.median(seconds[1:]), statistics.median(outside[1:]), memory, batch.tokens, sum(p.numel() for p in learner.parameters())


def main() -> None:
    """Print the table of one device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU here: nothing was measured")
    name = torch.cuda.get_device_name() if given.device == "cuda" else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)"
    print(f"{name}; torch {torch.__version__}; {SIZES[given.device]['precision']}")
    variants = {"fused loss": (True, False, 0), "all logits": (False, False, 0), "fused, recomputed": (True, True, 0), "fused, two further depths": (True, False, 2)}
    first = None
    print(f"{'variant':26} {'parameters':>12} {'tokens':>7} {'seconds':>8} {'tokens/s':>9} {'outside':>8} {'GiB':>6} {'x first':>8}")
    for title, variant in variants.items():
        seconds, outside, memory, tokens, parameters = measure(given.device, *variant, given.repeats)
        first = first or seconds
        print(f"{title:26} {parameters:12,} {tokens:7,} {seconds:8.3f} {tokens / seconds:9,.0f} {outside:8.1%} {memory:6.1f} {seconds / first:8.2f}", flush=True)


if __name__ == "__main__":
    main()
