"""The fused masked loss on a CPU against the loop over rows: values, gradients, edges, processes that share a vocabulary, compilation."""

import functools
import math
import shutil
import subprocess
import sys
import sysconfig
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fused_worker import fork_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_problems import assert_all_close, dense_loss, dense_nll, dense_units, exact, gradients, problem
from precision import FACTOR, assert_as_exact

import nemotron_nb.loss.fused as fused
from nemotron_nb.core import UserError
from nemotron_nb.loss.fused import linear_nll, loss_path, masked_linear_cross_entropy, masked_linear_cross_entropy_by_hand

speed_or_memory = pytest.mark.parametrize("strategy", ["speed", "memory"])


class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
    """While this is on: the shapes of the matrix products, and the most bytes alive at once in storages of at least `floor` bytes, but for the `inputs`."""

    def __init__(self, *inputs: torch.Tensor, floor: int = 0):
        super().__init__()
        self.products, self.floor, self.peak = [], floor, 0
        self.inputs = {t.untyped_storage().data_ptr() for t in inputs}
        self.alive: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "nemotron_nb":  # look inside
            with self:
                return torch._library.custom_ops.OPDEFS[function._schema.name]._init_fn(*args, **(kwargs or {}))
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
    strategy = data.draw(st.sampled_from(["auto", "speed", "memory"]), "strategy")
    by_hand = masked_linear_cross_entropy_by_hand(hidden, weight, labels, weights, scale=scale, **options)
    loss, stats = masked_linear_cross_entropy(hidden, weight, labels, weights, scale=scale, workspace_bytes=workspace, strategy=strategy, **options)
    assert stats.num_active == ((weights != 0) & (labels != -100)).sum()
    if not by_hand.requires_grad:  # nothing is trained: the loop never touched the parameters
        assert loss == 0 and not any(g.any() for g in torch.autograd.grad(loss, (hidden, weight)))
        return
    assert_all_close(gradients(loss, hidden, weight), gradients(by_hand, hidden, weight))


@pytest.mark.parametrize("options", [{}, {"z_coef": 0.2}, {"softcap": 3.0}, {"z_coef": 0.2, "softcap": 3.0}], ids=str)
@pytest.mark.parametrize("workspace_bytes", [1, 3 * 9 * 8, 1 << 20])
@speed_or_memory
def test_gradcheck(strategy, options, workspace_bytes):
    hidden, weight, labels, weights = problem(5, 3, 9)
    loss_of = functools.partial(masked_linear_cross_entropy, labels=labels, token_weights=weights, scale=0.3, workspace_bytes=workspace_bytes, strategy=strategy, **options)
    assert torch.autograd.gradcheck(lambda h, w: loss_of(h, w)[0] ** 2, (hidden, weight))


@pytest.mark.parametrize("spread", [1.0, 20.0])
@speed_or_memory
def test_float32_is_close_to_float64(strategy, spread):
    hidden, weight, labels, weights = problem(40, 16, 300, dtype=torch.float32, spread=spread)
    loss, stats = masked_linear_cross_entropy(hidden, weight, labels, weights.float(), workspace_bytes=7 * 300 * 4, strategy=strategy)
    want = exact(masked_linear_cross_entropy_by_hand, hidden, weight, labels, weights.float())
    assert_as_exact(gradients(loss, hidden, weight), want, dense_units(dense_loss, hidden, weight, labels, weights.float()))
    assert stats.nll.dtype == torch.float32


def test_stats_are_those_of_the_rows():
    hidden, weight, labels, weights = problem(9, 4, 11)
    _, stats = masked_linear_cross_entropy(hidden, weight, labels, weights, workspace_bytes=200)
    logits, on = (hidden @ weight.T).detach(), weights != 0
    assert_all_close((stats.nll, stats.lse), (F.cross_entropy(logits, labels, reduction="none") * on, torch.logsumexp(logits, 1) * on))
    assert not stats.nll.requires_grad and not stats.lse.requires_grad


def test_scale_may_be_a_number_or_a_tensor_and_is_exact():
    hidden, weight, labels, weights = problem(9, 4, 11)
    one = gradients(masked_linear_cross_entropy(hidden, weight, labels, weights)[0] / 3, hidden, weight)
    for scale in (1 / 3, torch.tensor(1 / 3, dtype=torch.float64)):
        assert_all_close(gradients(masked_linear_cross_entropy(hidden, weight, labels, weights, scale=scale)[0], hidden, weight), one)


@pytest.mark.parametrize("upstream", [1.0, 0.25, -3.0, 0.0])
@speed_or_memory
def test_upstream_gradient_and_a_graph_walked_twice(strategy, upstream):
    hidden, weight, labels, weights = problem(9, 4, 11)
    want = [upstream * g for g in gradients(masked_linear_cross_entropy_by_hand(hidden, weight, labels, weights), hidden, weight)[1:]]
    loss = masked_linear_cross_entropy(hidden, weight, labels, weights, strategy=strategy)[0] * upstream
    loss.backward(retain_graph=True)
    assert_all_close([hidden.grad, weight.grad], want)
    loss.backward(retain_graph=True)
    assert_all_close([hidden.grad, weight.grad], [2 * g for g in want])
    loss.backward()
    assert_all_close([hidden.grad, weight.grad], [3 * g for g in want])


def test_a_second_derivative_is_refused():
    hidden, weight, labels, weights = problem(4, 3, 5)
    (g,) = torch.autograd.grad(masked_linear_cross_entropy(hidden, weight, labels, weights)[0], hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        g.sum().backward()
    loss = masked_linear_cross_entropy(hidden, weight, labels, weights)[0] ** 2
    (g,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(g.square().sum(), weight)


@pytest.mark.parametrize("strategy, products", [
    ("speed", {(1, 1): "MV MH VH", (1, 0): "MV MH", (0, 1): "MV VH", (0, 0): "MV"}),
    ("memory", {(1, 1): "MV MV MH VH", (1, 0): "MV MV MH", (0, 1): "MV MV VH", (0, 0): "MV"}),
])  # fmt: skip
def test_only_what_learns_gets_a_gradient_and_a_product(strategy, products):
    hidden, weight, labels, weights = problem(8, 3, 50)
    size = {"M": int((weights != 0).sum()), "V": 50, "H": 3}
    for (hidden_learns, weight_learns), wanted in products.items():
        h, w = hidden if hidden_learns else hidden.detach(), weight if weight_learns else weight.detach()
        with Recorder() as seen:
            loss, _ = masked_linear_cross_entropy(h, w, labels, weights, strategy=strategy)
            assert loss.requires_grad == bool(hidden_learns or weight_learns)
            if loss.requires_grad:
                loss.backward()
        assert seen.products == [(size[a], size[b]) for a, b in wanted.split()], wanted
    with torch.no_grad(), Recorder() as seen:
        masked_linear_cross_entropy(hidden, weight, labels, weights)
    assert seen.products == [(size["M"], 50)]


@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("rows", [1, 4, 10])
@speed_or_memory
def test_the_workspace_bounds_the_logits(monkeypatch, strategy, rows, softcap):
    N, V = 64, 4001
    monkeypatch.setattr(fused, "_BLOCK_BYTES", V * 8)
    hidden, weight, labels, weights = problem(N, 1, V)
    workspace_bytes, floor = rows * V * 8, V * 8 // 4
    with Recorder(weight, floor=floor) as seen:
        loss, _ = masked_linear_cross_entropy(hidden, weight.detach(), labels, weights, workspace_bytes=workspace_bytes, softcap=softcap, strategy=strategy)
        loss.backward()
    assert workspace_bytes * 0.9 < seen.peak <= workspace_bytes + 4 * max(V * 8, floor), "the workspace, and a few rows in the work"
    with Recorder(weight, floor=floor) as naive:
        (weights * F.cross_entropy(hidden @ weight.detach().T, labels, reduction="none")).sum().backward()
    assert naive.peak >= 2 * N * V * 8


def test_a_low_precision_weight_is_not_converted_as_a_whole():
    hidden, weight, labels, weights = problem(16, 512, 40000, dtype=torch.bfloat16)
    with Recorder(weight, floor=1 << 20) as seen:
        masked_linear_cross_entropy(hidden, weight.detach(), labels, weights, workspace_bytes=2 * 40000 * 4)[0].backward()
    assert seen.peak < 2 * (8 << 20) < 40000 * 512 * 4


@speed_or_memory
def test_masked_rows_may_hold_anything(strategy):
    hidden, weight, labels, weights = problem(12, 4, 11)
    want = gradients(masked_linear_cross_entropy(hidden, weight, labels, weights, strategy=strategy)[0], hidden, weight)
    masked = (weights == 0).nonzero().squeeze(1)
    assert len(masked) >= 3
    dirty = hidden.detach().clone()
    dirty[masked[0]], dirty[masked[1]], dirty[masked[2]] = math.nan, math.inf, -math.inf
    dirty_labels = labels.clone()
    dirty_labels[masked] = torch.tensor([10**12, -1, 11] + [5] * (len(masked) - 3))
    dirty.requires_grad_()
    loss, stats = masked_linear_cross_entropy(dirty, weight, dirty_labels, weights, strategy=strategy)
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
@speed_or_memory
def test_nothing_trained_is_exactly_zero(strategy, N):
    hidden, weight, labels, _ = problem(N, 4, 11)
    loss, stats = masked_linear_cross_entropy(hidden, weight, labels, torch.zeros(N), scale=0.5, z_coef=1.0, strategy=strategy)
    got = gradients(loss, hidden, weight)
    assert got[0] == 0 and not got[1].any() and not got[2].any()
    assert got[1].shape == (N, 4) and stats.num_active == 0 and stats.nll.shape == (N,)


def test_active_rows_may_be_given_and_are_checked():
    hidden, weight, labels, weights = problem(9, 4, 11)
    active = (weights != 0).nonzero().squeeze(1)
    want = gradients(masked_linear_cross_entropy(hidden, weight, labels, weights)[0], hidden, weight)
    for given_rows in (active, active.flip(0), torch.arange(9)):  # in any order; rows of weight zero add nothing
        for strategy in ("speed", "memory"):
            loss, stats = masked_linear_cross_entropy(hidden, weight, labels, weights, active_idx=given_rows, strategy=strategy)
            assert_all_close(gradients(loss, hidden, weight), want)
            assert stats.num_active == len(active)
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
    hidden, weight = ((torch.randn(n, 16, generator=r)).bfloat16().requires_grad_() for n in (480, 70))
    labels, weights = torch.randint(70, (480,), generator=r), torch.rand(480, generator=r)
    want = exact(masked_linear_cross_entropy_by_hand, hidden, weight, labels, weights)
    loss, stats = masked_linear_cross_entropy(hidden, weight, labels, weights, workspace_bytes=5 * 70 * 4, strategy="speed")  # 96 chunks
    got = gradients(loss, hidden, weight)
    assert (loss.dtype, stats.nll.dtype, got[1].dtype, got[2].dtype) == (torch.float32, torch.float32, torch.bfloat16, torch.bfloat16)
    in_float32 = dense_units(dense_loss, hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_(), labels, weights)
    assert_as_exact(got[:1], want[:1], in_float32[:1])
    for g, e, unit in zip(got[1:], want[1:], in_float32[1:], strict=True):
        assert ((g.double() - e).abs() <= 2**-8 * e.abs() + FACTOR * unit).all(), "only the final rounding"


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
    with torch.no_grad():
        got = linear_nll(hidden, weight, labels, workspace_bytes=100)
        assert not got.requires_grad
        some = linear_nll(hidden, weight, labels, active_idx=torch.tensor([1, 7]))
        capped = linear_nll(hidden, weight, labels, softcap=2.0)
        two = torch.zeros(9, dtype=torch.float64).index_copy_(0, torch.tensor([1, 7]), want[[1, 7]])
        assert_all_close((got, some, capped), (want, two, dense_nll(hidden, weight, labels, 2.0)[0]))


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_losses_alone_take_any_gradient_from_above(softcap):
    hidden, weight, labels, _ = problem(9, 4, 11)
    upstream = torch.randn(9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    want = torch.autograd.grad(dense_nll(hidden, weight, labels, softcap)[0], (hidden, weight), upstream)
    got = torch.autograd.grad(linear_nll(hidden, weight, labels, softcap=softcap, workspace_bytes=300), (hidden, weight), upstream)
    assert_all_close(got, want)


def test_the_real_vocabulary():
    V = 131072
    hidden, weight, labels, _ = problem(5, 8, V, dtype=torch.float32)
    weights = torch.tensor([1.0, 0, 1, 0.5, 0])
    labels[0], labels[2] = 0, V - 1
    want, units = exact(dense_loss, hidden, weight, labels, weights), dense_units(dense_loss, hidden, weight, labels, weights)
    for strategy in ("speed", "memory"):
        got = gradients(masked_linear_cross_entropy(hidden, weight, labels, weights, workspace_bytes=2 * V * 4, strategy=strategy)[0], hidden, weight)
        assert_as_exact(got, want, units)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@speed_or_memory
def test_types_and_strides(strategy, dtype):
    hidden, weight, labels, weights = problem(10, 6, 37, dtype=dtype)
    want = exact(masked_linear_cross_entropy_by_hand, hidden, weight, labels, weights)
    units = dense_units(dense_loss, hidden, weight, labels, weights)
    strided_hidden = torch.stack([hidden.detach()] * 2, 2)[:, :, 0].requires_grad_()
    strided_weight = weight.detach().T.contiguous().T.requires_grad_()
    assert not strided_hidden.is_contiguous() and not strided_weight.is_contiguous()
    for h, w in ((hidden, weight), (strided_hidden, strided_weight)):
        got = gradients(masked_linear_cross_entropy(h, w, labels, weights, strategy=strategy, workspace_bytes=500)[0], h, w)
        assert got[1].dtype == got[2].dtype == dtype
        assert_as_exact(got, want, units)


@speed_or_memory
def test_a_gradient_added_to_a_buffer(strategy):
    """Two calls add up in the buffer, in float32, and `weight.grad` is left alone."""
    hidden, weight, labels, weights = problem(12, 5, 31, dtype=torch.bfloat16)
    buffer = torch.full((31, 5), 7.0)
    want = exact(masked_linear_cross_entropy_by_hand, hidden, weight, labels, weights, scale=0.5)
    wide = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    in_buffer = [2 * dense_units(dense_loss, *wide, labels, weights, 0.5)[2] + 7 * torch.finfo(torch.float32).eps]
    in_16_bits = [2 * dense_units(dense_loss, hidden, weight, labels, weights, 0.5)[1]]
    for _ in range(2):
        masked_linear_cross_entropy(hidden, weight, labels, weights, scale=0.5, grad_accum=buffer, strategy=strategy, workspace_bytes=5 * 31 * 4)[0].backward()
    assert weight.grad is None
    assert_as_exact([buffer], [7 + 2 * want[2]], in_buffer)
    assert_as_exact([hidden.grad], [2 * want[1]], in_16_bits)
    frozen = masked_linear_cross_entropy(hidden, weight.detach(), labels, weights, grad_accum=buffer, strategy=strategy)[0]
    frozen.backward()
    assert_as_exact([buffer], [7 + 2 * want[2]], in_buffer)


def test_a_gradient_in_the_buffer_cannot_be_multiplied():
    hidden, weight, labels, weights = problem(6, 5, 31, dtype=torch.float32)
    buffer = torch.zeros(31, 5)
    loss = masked_linear_cross_entropy(hidden, weight, labels, weights, grad_accum=buffer, strategy="speed")[0]
    with pytest.raises(RuntimeError, match="use scale="):
        (loss / 2).backward()
    buffer.zero_()
    (masked_linear_cross_entropy(hidden, weight, labels, weights, grad_accum=buffer, strategy="memory")[0] / 2).backward()
    want, units = exact(dense_loss, hidden, weight, labels, weights, 0.5), dense_units(dense_loss, hidden, weight, labels, weights, 0.5)
    assert_as_exact([buffer], want[2:], units[2:])
    for wrong in (torch.zeros(31, 4), torch.zeros(31, 5, dtype=torch.bfloat16)):
        with pytest.raises(UserError, match="grad_accum is"):
            masked_linear_cross_entropy(hidden, weight, labels, weights, grad_accum=wrong)


def test_a_misspelt_choice_is_refused():
    with pytest.raises(UserError, match="did you mean 'memory'"):
        masked_linear_cross_entropy(*problem(4, 3, 5), strategy="memry")
    with pytest.raises(UserError, match="fp32"):
        masked_linear_cross_entropy(*problem(4, 3, 5), logits_dtype="float99")


def test_auto_takes_the_strategy_that_fits(monkeypatch):
    hidden, weight, labels, weights = problem(80, 2, 64, dtype=torch.float32)
    called = []
    for name in ("_masked_loss", "_linear_nll"):
        monkeypatch.setattr(fused, name, lambda *a, op=getattr(fused, name), name=name: called.append(name) or op(*a))
    loss_of = functools.partial(masked_linear_cross_entropy, hidden, weight, labels, weights)
    loss_of(workspace_bytes=32 * 64 * 4), loss_of(workspace_bytes=32 * 64 * 4 - 1), loss_of()
    with torch.no_grad():
        loss_of()
    assert called == ["_masked_loss", "_linear_nll", "_masked_loss", "_linear_nll"]


@speed_or_memory
def test_compiled_in_one_graph_that_serves_both_stages(strategy):
    """torch.compile(fullgraph=True): same numbers as eager; weights and scale are data, so a stage switch compiles nothing."""
    torch.compiler.reset()
    hidden, weight, labels, weights = problem(12, 4, 19, dtype=torch.float32)
    stages = [((weights != 0).float(), torch.tensor(1 / 7)), (weights.float(), torch.tensor(0.25))]

    def step(h, w, token_weights, scale):
        loss, stats = masked_linear_cross_entropy(torch.tanh(h), w, labels, token_weights, scale=scale, z_coef=0.1, strategy=strategy, workspace_bytes=300)
        return loss * 2, stats.nll

    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for token_weights, scale in stages:
        want = gradients(step(hidden, weight, token_weights, scale)[0], hidden, weight)
        loss, nll = compiled(hidden, weight, token_weights, scale)
        assert_all_close(gradients(loss, hidden, weight), want)
        assert nll.count_nonzero() == (weights != 0).sum()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()


@pytest.mark.long
@pytest.mark.skipif(
    not (shutil.which("g++") and (Path(sysconfig.get_path("include")) / "Python.h").exists()), reason="torch.compile needs g++ and the headers of Python"
)
def test_compiled_by_inductor_with_a_buffer():
    torch.compiler.reset()
    hidden, weight, labels, weights = problem(12, 4, 19, dtype=torch.float32)
    buffers = torch.zeros(19, 4), torch.zeros(19, 4)

    def step(h, w, buffer):
        return masked_linear_cross_entropy(h * 3, w, labels, weights, grad_accum=buffer, strategy="speed")[0]

    want = torch.autograd.grad(step(hidden, weight, buffers[0]), hidden)[0]
    got = torch.autograd.grad(torch.compile(step, fullgraph=True)(hidden, weight, buffers[1]), hidden)[0]
    units = dense_units(lambda h, w: dense_loss(h * 3, w, labels, weights.float()), hidden, weight)
    assert_as_exact([got, buffers[1]], [want, buffers[0]], units[1:])
    assert buffers[0].any()
    torch.compiler.reset()


@pytest.mark.parametrize("op", ["_masked_loss", "_linear_nll", "_linear_nll_backward", "_attach"])
def test_the_operations_are_what_they_say(op):
    """PyTorch's own check: what is changed, shapes and types without data, gradients, compilation."""
    hidden, weight, labels, weights = problem(5, 3, 7, dtype=torch.float32)
    scale, weights = torch.ones(()), weights.float()
    rows = (hidden, weight, labels, weights, scale, None, None)
    detached = tuple(t.detach() if t is not None else None for t in rows)
    arguments = {
        "_masked_loss": (*detached[:6], torch.zeros(7, 3), -100, 1000, False, 0.1, 0.0, "", 0, True, True),
        "_linear_nll": (*rows, -100, 1000, 0.0, "", 0),
        "_linear_nll_backward": (weights, weights, torch.ones(5), *detached, -100, 1000, 0.0, "", 0, True, True),
        "_attach": (hidden, weight, torch.ones(()), torch.rand(5, 3), torch.rand(7, 3), False),
    }[op]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration") + (("test_aot_dispatch_static",) if op in ("_linear_nll", "_attach") else ())
    torch.library.opcheck(getattr(fused, op), arguments, test_utils=tests)


def test_which_path_runs_is_said(monkeypatch):
    hidden, weight, *_ = problem(4, 3, 5, dtype=torch.float32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert loss_path(hidden, weight) == ("pytorch", "the tensors are on cpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert loss_path(hidden, weight)[0] == "triton"
    assert loss_path(hidden.double(), weight)[0] == "pytorch"
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: None)
    assert loss_path(hidden, weight) == ("pytorch", "triton is not installed")


def test_the_library_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from nemotron_nb.loss.fused import masked_linear_cross_entropy as f\n"
        "h = torch.ones(2, 3, requires_grad=True); f(h, torch.eye(3), torch.tensor([0, 1]), torch.ones(2))[0].backward(); print(h.grad.abs().sum() > 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "tensor(True)", done.stderr


@pytest.mark.parametrize("shards", [(30, 7), pytest.param((3, 14, 1, 19), marks=pytest.mark.long)], ids=["2 processes", "4 processes"])
def test_processes_that_share_a_vocabulary(shards, tmp_path):
    """Real processes over gloo, parts of unequal size, both strategies: one loss, and the gradients of the whole."""
    fork_shards(shards, tmp_path)
