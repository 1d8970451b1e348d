"""Random problems for the masked loss, and what is right about them."""

import torch
import torch.nn.functional as F
from precision import EXACT, float_errors, largest
from torch import Tensor


def problem(N: int, H: int, V: int, seed: int = 0, dtype: torch.dtype = torch.float64, spread: float = 1.0):
    """Random hidden states, output weight, labels and token weights, a third of which are zero."""
    r = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(N, H, generator=r, dtype=torch.float64) * spread).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=r, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(V, (N,), generator=r)
    weights = torch.rand(N, generator=r, dtype=torch.float64) * (torch.rand(N, generator=r) > 1 / 3)
    return hidden, weight, labels, weights


def gradients(loss: Tensor, *parameters: Tensor) -> list[Tensor]:
    """The loss and the gradients of the parameters."""
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


def assert_all_close(got, want):
    """`assert_close`, for each of them, as near as float64 is."""
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=EXACT, atol=EXACT)


def dense_nll(hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float = 0.0) -> tuple[Tensor, Tensor]:
    """nll [N] and log-sum-exp [N] from full logits."""
    logits = hidden @ weight.T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    return F.cross_entropy(logits, labels, reduction="none"), torch.logsumexp(logits, 1)


def dense_loss(hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, scale: float = 1.0, z_coef: float = 0.0, softcap: float = 0.0) -> Tensor:
    """The loss from full logits of the rows that have a weight."""
    rows = weights.nonzero().squeeze(1)
    nll, lse = dense_nll(hidden[rows], weight, labels[rows], softcap)
    return scale * (weights[rows] * (nll + z_coef * lse**2)).sum()


def exact(loss_of, hidden: Tensor, weight: Tensor, *arguments, **options) -> list[Tensor]:
    """Loss and gradients of a dense loss in float64."""
    hidden, weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    return gradients(loss_of(hidden, weight, *arguments, **options), hidden, weight)


def dense_units(loss_of, hidden: Tensor, weight: Tensor, *arguments, measure=largest, **options) -> list[float]:
    """The errors that plain PyTorch makes with full logits: mathematics in float32 where the inputs have 16 bits, gradients in the type of the inputs."""

    def plain(h: Tensor, w: Tensor) -> list[Tensor]:
        wide = [t.float() if t.dtype.itemsize == 2 else t for t in (h, w)]
        return gradients(loss_of(*wide, *arguments, **options), h, w)

    return float_errors(plain, hidden, weight, measure=measure)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is right."""
    return ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)).item()
