"""The masked loss through its kernels, against full logits in float64. Not collected by itself: `test_kernel.py` runs it in a
process of its own, with TRITON_INTERPRET=1 on a CPU, or without on a GPU."""

import math
import os

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_problems import dense_loss, dense_nll, dense_units, exact, gradients, problem, relative_error
from precision import FACTOR, NARROW_FACTOR, assert_as_exact, float_errors, norm

from nemotron_nb.loss import kernel
from nemotron_nb.loss.fused import linear_nll, loss_path, masked_linear_cross_entropy

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if INTERPRETED:
    import triton_shim

    triton_shim.install()

STRATEGIES = ("speed", "memory")
OPTIONS = [{}, {"z_coef": 0.1}, {"softcap": 3.0}, {"z_coef": 0.1, "softcap": 3.0}]


def on_device(N: int, H: int, V: int, dtype: torch.dtype = torch.float32, **more):
    """A problem where the kernels run; labels on the first and last word and both sides of a tile's edge."""
    hidden, weight, labels, weights = problem(N, H, V, dtype=dtype, **more)
    edges = torch.tensor([0, V - 1, 63, 64, 15, 16])[:N].clamp(max=V - 1)
    labels[: len(edges)] = edges
    hidden, weight = (t.detach().to(DEVICE).requires_grad_() for t in (hidden, weight))
    assert loss_path(hidden, weight)[0] == "triton"
    return hidden, weight, labels.to(DEVICE), weights.float().to(DEVICE)


def errors(got, want) -> list[float]:
    return [relative_error(g, w) for g, w in zip(got, want, strict=True)]


@triton.jit
def _probe(X, Y, PRODUCT, SUM, n: tl.constexpr):
    """A conversion, and a product of two bfloat16 blocks."""
    i = tl.arange(0, n)
    place = i[:, None] * n + i[None, :]
    x = tl.load(X + place)
    tl.store(Y + place, x.to(tl.bfloat16))
    y = x.to(tl.bfloat16)
    tl.store(PRODUCT + place, tl.dot(y, y))
    tl.store(SUM + place, (y.to(tl.float32) + 1.0).to(tl.bfloat16))


def test_the_interpreter_is_right_about_bfloat16():
    """Self-test of the shim: rounding as PyTorch rounds, infinities, tiny numbers, and products."""
    special = [0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, math.inf, -math.inf, 1e-40, -1e-39, 2**-133, 1.00390625]
    x = torch.cat([torch.tensor(special), torch.randn(256 - len(special), generator=torch.Generator().manual_seed(0))]).view(16, 16).to(DEVICE)
    finite = torch.randn(16, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for values in (x, finite):
        rounded, total = torch.empty_like(values, dtype=torch.bfloat16), torch.empty_like(values, dtype=torch.bfloat16)
        product = torch.empty_like(values)
        _probe[(1,)](values, rounded, product, total, n=16)
        assert torch.equal(rounded, values.bfloat16())
        assert torch.equal(total, values.bfloat16() + 1)
    blocks = finite.bfloat16().float()
    assert_as_exact([product], [blocks.double() @ blocks.double()], float_errors(lambda x: x @ x, blocks))
    nan = torch.full((16, 16), math.nan, device=DEVICE)
    _probe[(1,)](nan, rounded, product, total, n=16)
    assert rounded.isnan().all()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_against_full_logits(strategy, dtype, options):
    """Sizes that are no multiple of a tile, several chunks, an upstream gradient that the host does not read."""
    hidden, weight, labels, weights = on_device(100, 45, 150, dtype)
    want = [0.25 * x for x in exact(dense_loss, hidden, weight, labels, weights, 3e-3, **options)]
    units = [0.25 * u for u in dense_units(dense_loss, hidden, weight, labels, weights, 3e-3, measure=norm, **options)]
    loss, stats = masked_linear_cross_entropy(hidden, weight, labels, weights, scale=3e-3, strategy=strategy, workspace_bytes=3 * 150 * 4, **options)
    got = gradients(loss * torch.tensor(0.25, device=DEVICE), hidden, weight)
    assert [g.dtype for g in got] == [torch.float32, dtype, dtype]
    assert_as_exact(got, want, units, norm)
    nll, lse = dense_nll(hidden.double(), weight.double(), labels, options.get("softcap", 0.0))
    on = weights != 0
    units = float_errors(lambda h, w: dense_nll(h, w, labels, options.get("softcap", 0.0)), hidden.float(), weight.float())
    assert_as_exact([stats.nll, stats.lse], [nll * on, lse * on], units)
    assert stats.num_active == on.sum() and not got[1][~on].any()


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_any_size_weights_and_masks(data):
    """Ragged sizes, blocks far smaller than a row, signed and fractional weights, chunk after chunk."""
    N, H, V = (data.draw(st.integers(least, n), name) for least, n, name in ((1, 17, "N"), (1, 9, "H"), (2, 70, "V")))
    hidden, weight, labels, weights = on_device(N, H, V, seed=data.draw(st.integers(0, 99), "seed"))
    weights = weights * torch.tensor(data.draw(st.lists(st.sampled_from([-1.5, 0.0, 0.001, 1.0]), min_size=N, max_size=N), "weights"), device=DEVICE)
    options = data.draw(st.sampled_from(OPTIONS), "options")
    workspace, strategy = data.draw(st.integers(1, 2 * N * V * 4), "workspace_bytes"), data.draw(st.sampled_from(STRATEGIES), "strategy")
    want = exact(dense_loss, hidden, weight, labels, weights, -0.3, **options) if weights.any() else [0 * t.detach().double() for t in (hidden.sum(), hidden, weight)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "_row_blocks", lambda V: {"BLOCK": 16, "num_warps": 4})
        got = gradients(masked_linear_cross_entropy(hidden, weight, labels, weights, scale=-0.3, strategy=strategy, workspace_bytes=workspace, **options)[0], hidden, weight)
    units = dense_units(dense_loss, hidden, weight, labels, weights, -0.3, **options) if weights.any() else [0.0] * 3
    assert_as_exact(got, want, units)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_vocabulary_of_one_word(strategy):
    """Its probability is 1, and plain PyTorch finds exactly that; a kernel may be off by a rounding of what it raises two to."""
    hidden, weight, labels, weights = on_device(7, 3, 1)
    want = exact(dense_loss, hidden, weight, labels, weights, z_coef=0.1)
    got = gradients(masked_linear_cross_entropy(hidden, weight, labels, weights, z_coef=0.1, strategy=strategy)[0], hidden, weight)
    logit, factor = (hidden @ weight.T).abs().max().item(), max(t.abs().max().item() for t in (hidden, weight))
    allowed = FACTOR * torch.finfo(torch.float32).eps * weights.sum().item() * (1 + logit) ** 2 * max(1, factor)
    assert all((g.double() - w).abs().max() <= allowed for g, w in zip(got, want, strict=True)) and want[0] > 0


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("given", [False, True], ids=["rows found", "rows given"])
def test_masked_rows_may_hold_anything(strategy, given):
    """nan, infinities and labels of no word in rows of weight 0, also where the caller's list names those rows."""
    hidden, weight, labels, weights = on_device(12, 8, 30)
    rows = torch.arange(12, device=DEVICE) if given else None
    want = gradients(masked_linear_cross_entropy(hidden, weight, labels, weights, strategy=strategy, active_idx=rows)[0], hidden, weight)
    masked = (weights == 0).nonzero().squeeze(1)
    dirty = hidden.detach().clone()
    dirty[masked[0]], dirty[masked[1]] = math.nan, math.inf
    labels[masked[0]], labels[masked[1]] = 10**12, -5
    dirty.requires_grad_()
    loss, stats = masked_linear_cross_entropy(dirty, weight, labels, weights, strategy=strategy, active_idx=rows)
    got = gradients(loss, dirty, weight)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert stats.num_active == (weights != 0).sum() and not stats.nll[masked].any() and not got[1][masked].any()


@pytest.mark.parametrize("label", [30, -1, -99, 2**32 + 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_label_of_no_word_makes_the_loss_nan(strategy, label):
    """No error, which would make the host wait; but nobody can train on it."""
    hidden, weight, labels, weights = on_device(9, 8, 30)
    row = weights.nonzero()[1, 0]
    labels[row] = label
    loss, stats = masked_linear_cross_entropy(hidden, weight, labels, weights, strategy=strategy)
    got = gradients(loss, hidden, weight)
    assert loss.isnan() and stats.nll.isnan().nonzero().flatten().tolist() == [row]
    assert got[1][row].isnan().all() and got[2].isnan().all() and got[1].isnan().any(1).sum() == 1


@pytest.mark.parametrize("N", [0, 5])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_trained_is_exactly_zero(strategy, N):
    hidden, weight, labels, weights = on_device(N, 8, 30, torch.bfloat16)
    loss, _ = masked_linear_cross_entropy(hidden, weight, labels, torch.zeros_like(weights), scale=0.5, z_coef=1.0, strategy=strategy)
    assert loss == 0 and not any(g.any() for g in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_gradient_added_to_a_buffer(strategy):
    """Two steps add up in float32, better than bfloat16 can; a frozen weight adds nothing."""
    hidden, weight, labels, weights = on_device(20, 16, 70, torch.bfloat16)
    buffer = torch.full((70, 16), 7.0, device=DEVICE)
    want = exact(dense_loss, hidden, weight, labels, weights)[2]
    for h, w in ((hidden, weight), (hidden.detach(), weight), (hidden, weight.detach())):
        masked_linear_cross_entropy(h, w, labels, weights, grad_accum=buffer, strategy=strategy, workspace_bytes=5 * 70 * 4)[0].backward()
    assert weight.grad is None
    limit = NARROW_FACTOR * dense_units(dense_loss, hidden, weight, labels, weights, measure=norm)[2] / norm(want)
    assert relative_error(buffer - 7, 2 * want) < limit < relative_error(buffer.bfloat16() - 7, 2 * want)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strides(strategy):
    """Hidden states with a gap between rows and between columns, an output weight stored the other way round."""
    hidden, weight, labels, weights = on_device(9, 8, 30)
    want = exact(dense_loss, hidden, weight, labels, weights)
    h = torch.stack([hidden.detach()] * 2, 2)[:, :, 1].requires_grad_()
    w = weight.detach().T.contiguous().T.requires_grad_()
    got = gradients(masked_linear_cross_entropy(h, w, labels, weights, strategy=strategy, workspace_bytes=500)[0], h, w)
    assert_as_exact(got, want, dense_units(dense_loss, hidden, weight, labels, weights, measure=norm), norm)


def test_losses_alone_take_any_gradient_from_above():
    hidden, weight, labels, _ = on_device(20, 16, 70)
    upstream = torch.randn(20, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    plain = lambda h, w: (dense_nll(h, w, labels, 3.0)[0] * upstream).sum()  # noqa: E731
    got = gradients((linear_nll(hidden, weight, labels, softcap=3.0) * upstream).sum(), hidden, weight)
    assert_as_exact(got, exact(plain, hidden, weight), dense_units(plain, hidden, weight, measure=norm), norm)


def test_logits_in_16_bits_are_less_exact():
    """logits_dtype="bf16" does what it says, and why it is not the default."""
    hidden, weight, labels, weights = on_device(30, 32, 100, torch.bfloat16)
    want = exact(dense_loss, hidden, weight, labels, weights)
    loss_of = {name: errors(gradients(masked_linear_cross_entropy(hidden, weight, labels, weights, strategy="speed", logits_dtype=name)[0], hidden, weight), want) for name in ("fp32", "bf16")}
    units = dense_units(dense_loss, hidden, weight, labels, weights, measure=norm)
    limits = [factor * unit / norm(w) for factor, unit, w in zip((FACTOR, NARROW_FACTOR, NARROW_FACTOR), units, want, strict=True)]
    assert all(e < limit for e, limit in zip(loss_of["fp32"], limits, strict=True)) and loss_of["bf16"][0] > limits[0]
    assert max(loss_of["bf16"]) < 4 * torch.finfo(torch.bfloat16).eps


def test_float16_has_room_for_small_numbers():
    """Weights of a large batch are tiny, the loss scale is huge; "auto" multiplies them before anything is rounded to 16 bits."""
    hidden, weight, labels, weights = on_device(30, 32, 100, torch.float16)
    want = [65536 * x for x in exact(dense_loss, hidden, weight, labels, weights, 1e-5)]
    auto, speed = (
        errors(gradients(masked_linear_cross_entropy(hidden, weight, labels, weights, scale=1e-5, strategy=strategy)[0] * 65536, hidden, weight), want)
        for strategy in ("auto", "speed")
    )
    assert max(auto) < torch.finfo(torch.float16).eps < max(speed) / 5


def test_steep_logits():
    """Standard deviation 20: the largest probability is 1 to all digits."""
    hidden, weight, labels, weights = on_device(20, 16, 70, spread=5.0)
    want = exact(dense_loss, hidden, weight, labels, weights)
    for strategy in STRATEGIES:
        got = gradients(masked_linear_cross_entropy(hidden, weight, labels, weights, strategy=strategy)[0], hidden, weight)
        assert_as_exact(got, want, dense_units(dense_loss, hidden, weight, labels, weights, measure=norm), norm)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_real_vocabulary(monkeypatch, strategy):
    """131 072 words in bfloat16: several blocks to a row, logits of 32 bits turned into gradients of 16 in place."""
    if INTERPRETED:
        monkeypatch.setattr(kernel, "tile_shape", lambda *chip: {"BM": 16, "BN": 4096, "BK": 16, "GROUP": 2})
    hidden, weight, labels, weights = on_device(5, 16, 131072, torch.bfloat16)
    weights[:] = torch.tensor([1.0, 1.0, 0.0, 0.5, 0.0])
    want = exact(dense_loss, hidden, weight, labels, weights)
    got = gradients(masked_linear_cross_entropy(hidden, weight, labels, weights, strategy=strategy)[0], hidden, weight)
    assert_as_exact(got, want, dense_units(dense_loss, hidden, weight, labels, weights, measure=norm), norm)


def test_a_ragged_long_vocabulary():
    """Two blocks, the second hangs over the edge; the next row begins right behind it."""
    hidden, weight, labels, weights = on_device(3, 4, 40001)
    want = exact(dense_loss, hidden, weight, labels, torch.ones_like(weights))
    got = gradients(masked_linear_cross_entropy(hidden, weight, labels, torch.ones_like(weights), strategy="speed")[0], hidden, weight)
    assert_as_exact(got, want, dense_units(dense_loss, hidden, weight, labels, torch.ones_like(weights), measure=norm), norm)
