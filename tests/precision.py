"""How exact can a number be on this machine? Tolerances of the tests come from here: from the error of the plain computation, with float64 as truth.

The order in which a library adds up differs from processor to processor, and with it the error of plain PyTorch. A test therefore measures that error
where it runs, and allows a fast path a small multiple of it.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHRMSNorm, NemotronHTopkRouter
from transformers.models.zamba2.modeling_zamba2 import Zamba2RMSNormGated

from nemotron_nb.loss.precision import FACTOR, NARROW_FACTOR, float_errors, largest, rounding, sum_error
from nemotron_nb.train import torch_engine
from nemotron_nb.train.batches import global_batch
from nemotron_nb.train.objective import Learner

EXACT = sum_error(4096, torch.float64)  # both sides in float64, at most so many numbers are added
__all__ = ["FACTOR", "NARROW_FACTOR", "float_errors", "largest", "rounding", "sum_error"]


def norm(error: Tensor) -> float:
    """The Euclidean norm."""
    return error.norm().item()


def float_error(compute: Callable[..., Tensor | Sequence[Tensor]], *inputs: Tensor | nn.Module, measure: Callable[[Tensor], float] = largest) -> float:
    """The largest of `float_errors`: one unit for outputs of one kind."""
    return max(float_errors(compute, *inputs, measure=measure))


def assert_as_exact(
    got: Sequence[Tensor], want: Sequence[Tensor], units: Sequence[float], measure: Callable[[Tensor], float] = largest
) -> None:
    """Each of `got` is as near to `want` as the plain computation comes to the truth: within a few units of `float_errors`."""
    errors = [measure(g.detach().double() - w.detach().double()) for g, w in zip(got, want, strict=True)]
    limits = [unit * (NARROW_FACTOR if g.dtype.itemsize == 2 else FACTOR) for g, unit in zip(got, units, strict=True)]
    assert all(e <= limit for e, limit in zip(errors, limits)), f"errors {errors}, allowed {limits}"


def logits_error(model: nn.Module, tokens: Tensor, dtype: torch.dtype = torch.float32) -> float:
    """The error of a model's logits in plain float32, or in another precision."""
    with torch.no_grad():
        return float_error(lambda m: m(tokens, use_cache=False).logits, copy.deepcopy(model).to(dtype))


def mean_loss_gap(model: nn.Module, packs: Sequence[Any], dtype: torch.dtype = torch.float32) -> float:
    """How far apart two means of the same token losses may be: as far as the loss of a token may err."""
    tokens = torch.tensor([global_batch(packs).rows[0].tokens.tolist()])
    return (NARROW_FACTOR if dtype.itemsize == 2 else FACTOR) * logits_error(model, tokens, dtype)


def near(got: Tensor, want: Tensor, unit: float) -> bool:
    """Does one tensor equal another up to a few units?"""
    return got.shape == want.shape and largest(got.detach().double() - want.detach().double()) <= FACTOR * unit


# ---- whole trainings


class exact:
    """The library computes norms and routers in float32, whatever it is given; here in what it is given."""

    def __enter__(self):
        def norm(self, hidden_states):
            return self.weight * hidden_states * torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

        def gated(self, hidden_states, gate=None):
            h = hidden_states * F.silu(gate)
            groups = h.unflatten(-1, (-1, self.group_size))
            return self.weight * (groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).flatten(-2)

        def router(self, hidden_states):
            return F.linear(hidden_states.view(-1, self.config.hidden_size), self.weight)

        self.kept = {}
        for kind, forward in ((NemotronHRMSNorm, norm), (Zamba2RMSNormGated, gated), (NemotronHTopkRouter, router)):
            self.kept[kind], kind.forward = kind.forward, forward

    def __exit__(self, *_):
        for kind, forward in self.kept.items():
            kind.forward = forward


class _Double(Learner):
    """What is trained, in float64."""

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.double()


@contextmanager
def in_double():
    """Trainings of the PyTorch engine in this block compute in float64: the truth of a whole training."""
    with exact(), mock.patch.object(torch_engine, "Learner", _Double):
        yield


def curve_units(
    truth: Sequence[Mapping[str, Any]],  # the lines of a training in float64
    plain: Iterable[Sequence[Mapping[str, Any]]],  # of the same in float32, one or several
    names: Sequence[str],
) -> dict[str, float]:
    """For each number: the largest relative error of its float32 over the steps, and never less than the mean rounding of a number."""
    least, gaps = torch.finfo(torch.float32).eps / 4, {name: [] for name in names}
    for lines in plain:
        for a, b in zip(lines, truth, strict=True):
            for name in names:
                gaps[name].append(abs(a[name] / b[name] - 1))
    return {name: max(least, *found) for name, found in gaps.items()}


def assert_same_curve(got: Sequence[Mapping[str, Any]], want: Sequence[Mapping[str, Any]], units: Mapping[str, float]) -> None:
    """Two trainings are the same up to a few times what float32 strays from float64."""
    for a, b in zip(got, want, strict=True):
        for name, unit in units.items():
            assert abs(a[name] / b[name] - 1) <= FACTOR * unit, (name, a.get("step"), a[name], b[name], unit)
