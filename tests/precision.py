"""How exact can a number be on this machine? Tolerances of the tests come from here: from the error of the plain computation, with float64 as truth.

The order in which a library adds up differs from processor to processor, and with it the error of plain PyTorch. A test therefore measures that error
where it runs, and allows a fast path a small multiple of it.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nemotron_nb.train.batches import global_batch

FACTOR = 8.0  # a fast path may err this many times as much as the plain computation, whose own error is the largest of a few
NARROW_FACTOR = 3.0  # in 16 bits, where the rounding of the result is nearly all of the error
STRETCHES = (1.0, 1.01, 0.99, 1.03)  # the same problem in other numbers, so that no single lucky rounding sets the unit


def largest(error: Tensor) -> float:
    """The largest absolute value; 0 of nothing."""
    return error.abs().max().item() if error.numel() else 0.0


def norm(error: Tensor) -> float:
    """The Euclidean norm."""
    return error.norm().item()


def _stretched(x: Tensor | nn.Module, factor: float) -> Tensor | nn.Module:
    """A copy of a tensor or of a model with its numbers multiplied."""
    if isinstance(x, Tensor):
        return (x.detach() * factor).requires_grad_(x.requires_grad)
    model = copy.deepcopy(x)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(factor)
    return model


def _as(x: Tensor | nn.Module, dtype: torch.dtype) -> Tensor | nn.Module:
    """A copy in another precision."""
    return x.detach().to(dtype).requires_grad_(x.requires_grad) if isinstance(x, Tensor) else copy.deepcopy(x).to(dtype)


def _precision(x: Tensor | nn.Module) -> torch.dtype:
    """The floating-point type of a tensor or of a model's parameters."""
    return x.dtype if isinstance(x, Tensor) else next(x.parameters()).dtype


def float_errors(
    compute: Callable[..., Tensor | Sequence[Tensor]],  # the plain computation, of the inputs
    *inputs: Tensor | nn.Module,  # in the precision in question
    measure: Callable[[Tensor], float] = largest,
) -> list[float]:
    """For each output: the error of the plain computation in the precision of its inputs, against float64.

    It is the largest of a few, and never less than the mean rounding of the result. Inputs in float64 are tried in float32, whose errors are 2**29 times as large.
    """
    double = all(_precision(x) == torch.float64 for x in inputs)
    found: list[list[float]] = []
    for factor in STRETCHES:
        plain = [_stretched(_as(x, torch.float32) if double else x, factor) for x in inputs]
        got, want = (_outputs(compute(*given)) for given in (plain, [_as(x, torch.float64) for x in plain]))
        found.append([max(measure(g.double() - w.double()), torch.finfo(g.dtype).eps / 4 * measure(w.double())) for g, w in zip(got, want, strict=True)])
    return [max(errors) * (2.0**-29 if double else 1.0) for errors in zip(*found)]


def _outputs(found: Any) -> list[Tensor]:
    """What a computation returns, as a list of detached tensors."""
    return [t.detach() for t in ([found] if isinstance(found, Tensor) else found)]


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


def sum_error(terms: int, dtype: torch.dtype = torch.float32) -> float:
    """The largest error of a sum of so many numbers, added in any order, as a share of the sum of their absolute values."""
    return terms * torch.finfo(dtype).eps
