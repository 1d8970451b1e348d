"""Claim: the fused masked loss takes less CPU time and much less memory than full logits. Time is saved by the rows that are not trained; memory by those, and by the chunks.

    python benchmarks/loss.py                          the sizes of the claim
    python benchmarks/loss.py --trained 1.0            all tokens trained: nothing to skip
    python benchmarks/loss.py --tokens 512 --repeats 1 a quick look

Each variant runs forward and backward in a process of its own, on the same random numbers (float32, runs of trained
tokens as in chats), and its loss and gradients are compared with those of the full logits.

- CPU seconds: `time.process_time`, all threads together, median over the repeats, after one warm-up. On a machine
  that is shared, this is steadier than the time on the wall, which is shown beside it (best of the repeats).
- extra memory: how far the peak of the process's resident memory (`ru_maxrss`) rises above the peak just before the
  first call, with the inputs in place. The gradients themselves are part of it, in every variant.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_nb.loss.fused import masked_linear_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def full_logits(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, scale: float) -> Tensor:
    """The one-liner: all logits, then a mask that multiplies."""
    return scale * (weights * F.cross_entropy(hidden @ weight.T, labels, reduction="none")).sum()


def full_logits_of_trained_rows(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, scale: float) -> Tensor:
    """The one-liner on the trained rows alone: what leaving out rows buys without anything else."""
    rows = weights.nonzero().squeeze(1)
    return full_logits(hidden[rows], weight, labels[rows], weights[rows], scale)


def torch_chunked(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, scale: float, chunk: int | None = None) -> Tensor:
    """PyTorch's own chunked loss, which knows no weight per token: masked rows are ignored labels, weights are all 1."""
    labels = labels.masked_fill(weights == 0, -100)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    return scale * F.linear_cross_entropy(hidden, weight, labels, reduction="sum", ignore_index=-100, options=options)


def torch_chunked_at_its_best(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, scale: float) -> Tensor:
    """The same with what a user can do about it: trained rows only, and a chunk as large as ours."""
    rows = weights.nonzero().squeeze(1)
    return torch_chunked(hidden[rows], weight, labels[rows], weights[rows], scale, chunk=256)


def fused(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, scale: float) -> Tensor:
    """This library, with a workspace of 32 MiB."""
    return masked_linear_cross_entropy(hidden, weight, labels, weights, scale=scale, workspace_bytes=1 << 25)[0]


VARIANTS: dict[str, tuple[str, Loss]] = {
    "full": ("full logits", full_logits),
    "rows": ("full logits, trained rows only", full_logits_of_trained_rows),
    "torch": ("torch linear_cross_entropy", torch_chunked),
    "torch_best": ("torch, trained rows, chunk 256", torch_chunked_at_its_best),
    "fused": ("fused (this library)", fused),
}


def problem(tokens: int, hidden_size: int, vocab: int, trained: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random inputs, about `trained` of the tokens trained, in runs: each 128 tokens a prompt and an answer."""
    r = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=r).requires_grad_()
    weight = (torch.randn(vocab, hidden_size, generator=r) / hidden_size**0.5).requires_grad_()
    weights = (torch.arange(tokens) % 128 >= round(128 * (1 - trained))).float()
    return hidden, weight, torch.randint(vocab, (tokens,), generator=r), weights


def megabytes_at_peak() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """One variant, in this process: median CPU seconds, best wall seconds, extra MiB, and figures to compare results by."""
    loss_of = VARIANTS[name][1]
    hidden, weight, labels, weights = problem(options.tokens, options.hidden, options.vocab, options.trained)
    scale = 1 / weights.sum().item()
    warm = [t[:64].detach().requires_grad_() for t in (hidden, weight)]
    loss_of(*warm, labels[:64] % 64, torch.ones(64), 1.0).backward()  # libraries and threads are up before the peak is read
    before = megabytes_at_peak()
    cpu, wall = [], []
    for _ in range(options.repeats + 1):
        hidden.grad = weight.grad = None
        cpu_start, wall_start = time.process_time(), time.perf_counter()
        loss = loss_of(hidden, weight, labels, weights, scale)
        loss.backward()
        cpu.append(time.process_time() - cpu_start)
        wall.append(time.perf_counter() - wall_start)
    results = {"loss": loss.item(), "dhidden": hidden.grad.double().norm().item(), "dweight": weight.grad.double().norm().item()}
    return {"cpu": statistics.median(cpu[1:]), "wall": min(wall[1:]), "extra": megabytes_at_peak() - before} | results


def in_a_process(name: str, options: argparse.Namespace) -> dict[str, float]:
    """The variant measured in a fresh process, since a peak of memory never goes down again."""
    sizes = [f"--{key}={getattr(options, key)}" for key in ("tokens", "hidden", "vocab", "trained", "repeats", "threads")]
    done = subprocess.run([sys.executable, __file__, *sizes, f"--variant={name}"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"variant {name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def report(options: argparse.Namespace) -> None:
    """Measure every variant that this PyTorch has, check that they agree, print the table."""
    names = [n for n in VARIANTS if not n.startswith("torch") or hasattr(torch.nn, "LinearCrossEntropyOptions")]
    print(f"tokens {options.tokens}, hidden {options.hidden}, vocabulary {options.vocab}, trained {options.trained:.0%}, float32, forward and backward")
    print(f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}, median CPU seconds of {options.repeats}\n")
    print(f"{'variant':36}{'CPU s':>8}{'ratio':>7}{'wall s':>8}{'extra MiB':>11}{'ratio':>7}")
    full = None
    for name in names:
        got = in_a_process(name, options)
        full = full or got
        for key in ("loss", "dhidden", "dweight"):
            assert abs(got[key] / full[key] - 1) < 1e-4, f"{name}: {key} is {got[key]}, with full logits it is {full[key]}"
        print(f"{VARIANTS[name][0]:36}{got['cpu']:8.2f}{full['cpu'] / got['cpu']:7.2f}{got['wall']:8.2f}{got['extra']:11.0f}{full['extra'] / max(got['extra'], 1):7.1f}", flush=True)
    print("\nratio: full logits over the variant; above 1, the variant is better. Loss and gradient norms agree to 1e-4.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--trained", type=float, default=0.4, help="part of the tokens that is trained")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--variant", choices=VARIANTS, help="measure one variant here and print JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(measure(options.variant, options))) if options.variant else report(options)


if __name__ == "__main__":
    main()
