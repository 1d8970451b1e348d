"""The fused masked loss against the loop over rows: values, gradients, edges."""

import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_nb.core import UserError
from nemotron_nb.loss.fused import linear_nll, masked_linear_cross_entropy, masked_linear_cross_entropy_by_hand


def problem(N: int, H: int, V: int, seed: int = 0, dtype: torch.dtype = torch.float64, spread: float = 1.0):
    """Random hidden states, output weight, labels and token weights, a third of which are zero."""
    r = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(N, H, generator=r, dtype=torch.float64) * spread).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=r, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(V, (N,), generator=r)
    weights = torch.rand(N, generator=r, dtype=torch.float64) * (torch.rand(N, generator=r) > 1 / 3)
    return hidden, weight, labels, weights


def gradients(loss: torch.Tensor, *parameters: torch.Tensor) -> list[torch.Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


def assert_all_close(got, want, **tolerance):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """While this is on: the shapes of the matrix products, and the most bytes alive at once in storages of at least `floor` bytes, but for the `inputs`."""

    def __init__(self, *inputs: torch.Tensor, floor: int = 0):
        super().__init__()
        self.products, self.floor, self.peak = [], floor, 0
        self.inputs = {t.untyped_storage().data_ptr() for t in inputs}
        self.alive: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function._schema.name.split("::")[1] in ("mm", "addmm", "addmm_"):
            self.products.append(tuple(out.shape))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and t._base is None and t.untyped_storage().nbytes() >= self.floor:
                if (place := t.untyped_storage().data_ptr()) not in self.inputs:
                    self.alive.setdefault(place, (weakref.ref(t), t.untyped_storage().nbytes()))
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if ref() is not None}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_fused_is_the_loop(data):
    N, H, V = (data.draw(st.integers(1, n), name) for n, name in ((13, "N"), (6, "H"), (17, "V")))
    hidden, weight, labels, weights = problem(N, H, V, seed=data.draw(st.integers(0, 999), "seed"))
    weights = weights * torch.tensor(data.draw(st.lists(st.sampled_from([-1.5, 0.0, 1.0]), min_size=N, max_size=N), "signs"))
    labels[torch.tensor(data.draw(st.lists(st.booleans(), min_size=N, max_size=N), "ignored"))] = -100
    options = {"z_coef": data.draw(st.sampled_from([0.0, 0.3]), "z_coef"), "softcap": data.draw(st.sampled_from([0.0, 2.5]), "softcap")}
    scale = data.draw(st.sampled_from([1.0, 0.37, -2.0, 0.0]), "scale")
    workspace = data.draw(st.integers(1, 3 * N * V * 8), "workspace_bytes")
    by_hand = masked_linear_cross_entropy_by_hand(hidden, weight, labels, weights, scale=scale, **options)
    loss, stats = masked_linear_cross_entropy(hidden, weight, labels, weights, scale=scale, workspace_bytes=workspace, **options)
    assert stats.num_active == ((weights != 0) & (labels != -100)).sum()
    if not by_hand.requires_grad:  # nothing is trained: the loop never touched the parameters
        assert loss == 0 and not any(g.any() for g in torch.autograd.grad(loss, (hidden, weight)))
        return
    assert_all_close(gradients(loss, hidden, weight), gradients(by_hand, hidden, weight), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"z_coef": 0.2}, {"softcap": 3.0}, {"z_coef": 0.2, "softcap": 3.0}], ids=str)
@pytest.mark.parametrize("workspace_bytes", [1, 3 * 9 * 8, 1 << 20])
def test_gradcheck(options, workspace_bytes):
    hidden, weight, labels, weights = problem(7, 3, 9)
    assert torch.autograd.gradcheck(
        lambda h, w: masked_linear_cross_entropy(h, w, labels, weights, scale=0.3, workspace_bytes=workspace_bytes, **options)[0] ** 2, (hidden, weight)
    )


@pytest.mark.parametrize("spread", [1.0, 20.0])
def test_float32_is_close_to_float64(spread):
    hidden, weight, labels, weights = problem(40, 16, 300, dtype=torch.float32, spread=spread)
    loss, stats = masked_linear_cross_entropy(hidden, weight, labels, weights.float(), workspace_bytes=7 * 300 * 4)
    exact_hidden, exact_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    exact = masked_linear_cross_entropy_by_hand(exact_hidden, exact_weight, labels, weights.float())
    for got, want in zip(gradients(loss, hidden, weight), gradients(exact, exact_hidden, exact_weight), strict=True):
        assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert stats.nll.dtype == torch.float32


def test_stats_are_those_of_the_rows():
    hidden, weight, labels, weights = problem(9, 4, 11)
    _, stats = masked_linear_cross_entropy(hidden, weight, labels, weights, workspace_bytes=200)
    logits, on = (hidden @ weight.T).detach(), weights != 0
    torch.testing.assert_close(stats.nll, F.cross_entropy(logits, labels, reduction="none") * on)
    torch.testing.assert_close(stats.lse, torch.logsumexp(logits, 1) * on)
    assert not stats.nll.requires_grad and not stats.lse.requires_grad


def test_scale_may_be_a_number_or_a_tensor_and_is_exact():
    hidden, weight, labels, weights = problem(9, 4, 11)
    one = gradients(masked_linear_cross_entropy(hidden, weight, labels, weights)[0] / 3, hidden, weight)
    for scale in (1 / 3, torch.tensor(1 / 3, dtype=torch.float64)):
        assert_all_close(gradients(masked_linear_cross_entropy(hidden, weight, labels, weights, scale=scale)[0], hidden, weight), one, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("upstream", [1.0, 0.25, -3.0, 0.0])
def test_upstream_gradient_and_a_graph_walked_twice(upstream):
    hidden, weight, labels, weights = problem(9, 4, 11)
    want = [upstream * g for g in gradients(masked_linear_cross_entropy_by_hand(hidden, weight, labels, weights), hidden, weight)[1:]]
    loss = masked_linear_cross_entropy(hidden, weight, labels, weights)[0] * upstream
    loss.backward(retain_graph=True)
    assert_all_close([hidden.grad, weight.grad], want)
    loss.backward()
    assert_all_close([hidden.grad, weight.grad], [2 * g for g in want])


def test_a_second_derivative_is_refused():
    hidden, weight, labels, weights = problem(4, 3, 5)
    (g,) = torch.autograd.grad(masked_linear_cross_entropy(hidden, weight, labels, weights)[0], hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        g.sum().backward()


def test_only_what_learns_gets_a_gradient_and_a_product():
    hidden, weight, labels, weights = problem(8, 3, 50)
    M = int((weights != 0).sum())
    for h, w, products in (
        (hidden, weight, [(M, 50), (M, 3), (50, 3)]),
        (hidden, weight.detach(), [(M, 50), (M, 3)]),
        (hidden.detach(), weight, [(M, 50), (50, 3)]),
        (hidden.detach(), weight.detach(), [(M, 50)]),
    ):
        with Recorder() as seen:
            loss, _ = masked_linear_cross_entropy(h, w, labels, weights)
        assert seen.products == products
        assert loss.requires_grad == (h.requires_grad or w.requires_grad)
    with torch.no_grad(), Recorder() as seen:
        masked_linear_cross_entropy(hidden, weight, labels, weights)
    assert seen.products == [(M, 50)]


@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("chunk_rows", [1, 4, 10])
def test_the_workspace_bounds_the_logits(chunk_rows, softcap):
    V = 1009
    hidden, weight, labels, weights = problem(64, 1, V)
    workspace_bytes = chunk_rows * V * 8 * (2 if softcap else 1)
    with Recorder(weight, floor=V * 8) as seen:
        loss, _ = masked_linear_cross_entropy(hidden, weight.detach(), labels, weights, workspace_bytes=workspace_bytes, softcap=softcap)
        loss.backward()
    assert seen.peak == workspace_bytes
    with Recorder(weight, floor=V * 8) as naive:
        (weights * F.cross_entropy(hidden @ weight.detach().T, labels, reduction="none")).sum().backward()
    assert naive.peak >= 2 * 64 * V * 8


def test_masked_rows_may_hold_anything():
    hidden, weight, labels, weights = problem(12, 4, 11)
    want = gradients(masked_linear_cross_entropy(hidden, weight, labels, weights)[0], hidden, weight)
    masked = (weights == 0).nonzero().squeeze(1)
    assert len(masked) >= 3
    dirty = hidden.detach().clone()
    dirty[masked[0]], dirty[masked[1]], dirty[masked[2]] = math.nan, math.inf, -math.inf
    dirty_labels = labels.clone()
    dirty_labels[masked] = torch.tensor([10**12, -1, 11] + [5] * (len(masked) - 3))
    dirty.requires_grad_()
    loss, stats = masked_linear_cross_entropy(dirty, weight, dirty_labels, weights)
    got = gradients(loss, dirty, weight)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert not got[1][masked].any() and not stats.nll[masked].any()


def test_added_masked_rows_change_nothing():
    hidden, weight, labels, weights = problem(6, 4, 11)
    more = torch.cat([hidden.detach(), torch.full((20, 4), math.nan)]).requires_grad_()
    longer = torch.cat([labels, torch.full((20,), -100)]), torch.cat([weights, torch.ones(20)])
    small = gradients(masked_linear_cross_entropy(hidden, weight, labels, weights)[0], hidden, weight)
    large = gradients(masked_linear_cross_entropy(more, weight, *longer)[0], more, weight)
    assert torch.equal(small[0], large[0]) and torch.equal(small[2], large[2]) and torch.equal(small[1], large[1][:6])


@pytest.mark.parametrize("N", [0, 5])
def test_nothing_trained_is_exactly_zero(N):
    hidden, weight, labels, _ = problem(N, 4, 11)
    loss, stats = masked_linear_cross_entropy(hidden, weight, labels, torch.zeros(N), scale=0.5, z_coef=1.0)
    got = gradients(loss, hidden, weight)
    assert got[0] == 0 and not got[1].any() and not got[2].any()
    assert got[1].shape == (N, 4) and stats.num_active == 0 and stats.nll.shape == (N,)


def test_active_rows_may_be_given_and_are_checked():
    hidden, weight, labels, weights = problem(9, 4, 11)
    active = (weights != 0).nonzero().squeeze(1)
    want = gradients(masked_linear_cross_entropy(hidden, weight, labels, weights)[0], hidden, weight)
    for given_rows in (active, active.flip(0), torch.arange(9)):  # in any order; rows of weight zero add nothing
        assert_all_close(gradients(masked_linear_cross_entropy(hidden, weight, labels, weights, active_idx=given_rows)[0], hidden, weight), want)
    for wrong in (active[1:], torch.cat([active, active[:1]])):
        with pytest.raises(UserError, match="every trained row once"):
            masked_linear_cross_entropy(hidden, weight, labels, weights, active_idx=wrong)


@pytest.mark.parametrize("label", [11, -1, -99, 10**12])
def test_a_label_outside_the_vocabulary_is_refused(label):
    hidden, weight, labels, weights = problem(9, 4, 11)
    row = int((weights != 0).nonzero()[1])
    labels[row] = label
    with pytest.raises(UserError, match=rf"row {row} .*label {label} is outside the vocabulary of 11"):
        masked_linear_cross_entropy(hidden, weight, labels, weights)


def test_edge_labels_and_another_ignore_index():
    hidden, weight, labels, _ = problem(4, 3, 5)
    labels = torch.tensor([0, 4, 2, 2])
    want = F.cross_entropy(hidden @ weight.T, labels, ignore_index=2, reduction="sum")
    got, stats = masked_linear_cross_entropy(hidden, weight, labels, torch.ones(4), ignore_index=2)
    assert stats.num_active == 2
    assert_all_close(gradients(got, hidden, weight), gradients(want, hidden, weight))


def test_a_workspace_of_nothing_is_refused():
    with pytest.raises(UserError, match="must be positive"):
        masked_linear_cross_entropy(*problem(4, 3, 5), workspace_bytes=0)


def test_bfloat16_inputs_and_float32_mathematics():
    r = torch.Generator().manual_seed(0)
    hidden, weight = ((torch.randn(n, 64, generator=r)).bfloat16().requires_grad_() for n in (48, 700))
    labels, weights = torch.randint(700, (48,), generator=r), torch.rand(48, generator=r)
    exact_hidden, exact_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    exact = gradients(masked_linear_cross_entropy_by_hand(exact_hidden, exact_weight, labels, weights), exact_hidden, exact_weight)
    loss, stats = masked_linear_cross_entropy(hidden, weight, labels, weights, workspace_bytes=5 * 700 * 4)
    got = gradients(loss, hidden, weight)
    assert (loss.dtype, stats.nll.dtype, got[1].dtype, got[2].dtype) == (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16)
    assert abs(got[0] / exact[0] - 1) < 1e-6
    for g, e in zip(got[1:], exact[1:], strict=True):
        assert ((g.double() - e).abs() <= 2**-8 * e.abs() + 1e-6).all(), "only the final rounding"


def test_autocast_does_not_reach_the_mathematics():
    hidden, weight, labels, weights = problem(12, 16, 40, dtype=torch.float32)
    want = gradients(masked_linear_cross_entropy(hidden, weight, labels, weights)[0], hidden, weight)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(masked_linear_cross_entropy(hidden, weight, labels, weights)[0], hidden, weight)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_losses_alone():
    hidden, weight, labels, _ = problem(9, 4, 11)
    labels[3] = -100
    want = F.cross_entropy(hidden @ weight.T, labels, reduction="none").detach()
    got = linear_nll(hidden, weight, labels, workspace_bytes=100)
    torch.testing.assert_close(got, want)
    assert not got.requires_grad
    some = linear_nll(hidden, weight, labels, active_idx=torch.tensor([1, 7]))
    torch.testing.assert_close(some, torch.zeros(9, dtype=torch.float64).index_copy_(0, torch.tensor([1, 7]), want[[1, 7]]))
    capped = linear_nll(hidden, weight, labels, softcap=2.0)
    torch.testing.assert_close(capped, F.cross_entropy(2 * torch.tanh(hidden @ weight.T / 2), labels, reduction="none").detach())


def test_the_real_vocabulary():
    V = 131072
    hidden, weight, labels, _ = problem(5, 8, V, dtype=torch.float32)
    weights = torch.tensor([1.0, 0, 1, 0.5, 0])
    labels[0], labels[2] = 0, V - 1
    want = gradients((weights * F.cross_entropy(hidden @ weight.T, labels, reduction="none")).sum(), hidden, weight)
    got = gradients(masked_linear_cross_entropy(hidden, weight, labels, weights, workspace_bytes=2 * V * 4)[0], hidden, weight)
    assert_all_close(got, want, rtol=1e-4, atol=1e-5)
