"""Claim: a profile of a step counts every matrix product in it, those inside custom operators too, and says where the seconds go.

    python benchmarks/step_profile.py [--threads 1]     forward and backward of a small model, packs of 1,024 tokens

`torch.utils.flop_counter` sees neither what runs inside a custom operator (the products of the fused loss) nor the attention kernel
of the CPU, and takes a filter of each channel by itself for one over all of them in its backward pass. So the operators that a
profiler has seen are counted here, from their shapes. Causal attention counts the pairs that a token may see, in backward with the
scores computed again, as the kernel does. The filter of the Mamba-2 layers is no product and not counted.
"""

import argparse
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::baddbmm": 1}  # where the factors begin
FAMILIES = {
    "matrix products": tuple(PRODUCTS),
    "attention kernel": (ATTENTION,),
    "filter (convolution)": ("aten::mkldnn_conv", "aten::convolution_backward", "aten::_convolution"),
    "copies and fills": ("aten::copy_", "aten::fill_", "aten::zero_", "aten::cat", "aten::clone"),
    "gather, scatter, sort": ("aten::index", "aten::_index", "aten::gather", "aten::scatter", "aten::embedding", "aten::topk", "aten::sort"),
    "element-wise and sums": ("aten::",),
    "Python, autograd": ("",),
}


class Op(NamedTuple):
    """One call of an operator."""

    name: str
    shapes: tuple[tuple[int, ...], ...]  # of its tensors, () for what is none
    given: tuple  # its numbers and flags, None for tensors
    seconds: float  # its own, without those it calls

    @property
    def causal(self) -> bool:
        """Of attention: does a token see only those before it?"""
        return bool(self.given[7 if self.name.endswith("_backward") else 4])

    @property
    def operations(self) -> int:
        """Floating-point operations of its matrix products; 0 where it makes none."""
        if self.name in PRODUCTS:
            a, b = self.shapes[PRODUCTS[self.name] :][:2]
            return 2 * math.prod(a) * b[-1]
        if not self.name.startswith(ATTENTION):
            return 0
        backward = self.name.endswith("_backward")
        (rows, heads, T, d), (_, _, S, _), (*_, d_v) = self.shapes[1:4] if backward else self.shapes[:3]
        pairs = T * (T + 1) // 2 if self.causal else T * S
        return 2 * rows * heads * pairs * (3 * d + 2 * d_v if backward else d + d_v)


def _frozen(values: Sequence) -> tuple:
    """Lists as tuples, so that two calls can be compared."""
    return tuple(tuple(v) if isinstance(v, list) else v for v in values)


def _profiled(act: Callable[[], object]) -> list[Op]:
    """The calls in order."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        act()
    events = sorted(seen.events(), key=lambda event: event.time_range.start)
    return [Op(e.name, _frozen(e.input_shapes), _frozen(e.concrete_inputs), e.self_cpu_time_total / 1e6) for e in events]


def observed(act: Callable[[], object], repeats: int = 5) -> list[Op]:
    """Every call of an operator while `act` runs; its seconds are the least of the repeats, since the machine is shared."""
    runs = [_profiled(act) for _ in range(1 + repeats)][1:]
    most = Counter(map(len, runs)).most_common(1)[0][0]  # a repeat may call what another does not
    return [calls[0]._replace(seconds=min(c.seconds for c in calls)) for calls in zip(*(r for r in runs if len(r) == most))]


def by_family(ops: Sequence[Op]) -> dict[str, float]:
    """Seconds of each family of operators."""
    seconds = dict.fromkeys(FAMILIES, 0.0)
    for op in ops:
        exact = op.name in PRODUCTS
        found = (f for f, names in FAMILIES.items() if (exact if f == "matrix products" else op.name.startswith(names)))
        seconds[next(found)] += op.seconds
    return seconds


def _again(op: Op) -> Callable[[], object]:
    """The same call on other numbers of the same shapes."""
    if op.name in PRODUCTS:
        a, b = (torch.randn(shape) for shape in op.shapes[PRODUCTS[op.name] :][:2])
        return lambda: a @ b
    backward = op.name.endswith("_backward")
    q, k, v = (torch.randn(shape) for shape in (op.shapes[1:4] if backward else op.shapes[:3]))
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if not backward:
        return lambda: forward(q, k, v, 0.0, op.causal)
    out, lse = forward(q, k, v, 0.0, op.causal)
    return lambda: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(q, q, k, v, out, lse, 0.0, op.causal)


def seconds_of(act: Callable[[], object], repeats: int = 5) -> float:
    """Processor seconds, the median of the repeats after the first."""
    seconds = []
    for _ in range(1 + repeats):
        start = time.process_time()
        act()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds[1:])


def alone(ops: Sequence[Op]) -> float:
    """Processor seconds of the products and of attention by themselves, in the same shapes: what no step can be faster than."""
    calls = Counter(op._replace(seconds=0.0) for op in ops if op.operations)
    return sum(count * seconds_of(_again(op)) for op, count in calls.items())


def main() -> None:
    """Print the families and the operations of a small model's step."""
    from train_step import SIZES, packs_like_chats

    from nemotron_nb.core import from_mapping
    from nemotron_nb.train.batches import global_batch
    from nemotron_nb.train.model import build_model
    from nemotron_nb.train.objective import Learner
    from nemotron_nb.train.settings import ModelConfig
    from nemotron_nb.train.torch_engine import make_gradient

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    sizes = SIZES["cpu"]
    config = from_mapping(ModelConfig, sizes["model"])
    learner = Learner(build_model(config, sizes["vocab"], seed=0), config).train()
    batch = global_batch(packs_like_chats(sizes["packs"], sizes["pack"], sizes["vocab"]))
    ops = observed(lambda: make_gradient(learner, batch, "token", 4 * sizes["pack"]))
    for name, seconds in by_family(ops).items():
        print(f"{name:28} {seconds:7.3f} s")
    print(f"{sum(op.operations for op in ops) / 1e9:.1f} GFLOP in matrix products, {alone(ops):.3f} s of products alone")


if __name__ == "__main__":
    main()
