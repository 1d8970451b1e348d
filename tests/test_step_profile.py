"""The operations that a profile of a step shows, against PyTorch's own counter where that one sees all."""

import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nemotron_nb.loss.fused import masked_linear_cross_entropy

PROFILE = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "step_profile.py"))


def operations(act):
    return sum(op.operations for op in PROFILE["observed"](act, repeats=1))


def counted(act):
    with FlopCounterMode(display=False) as mode:
        act()
    return mode.get_total_flops()


def drawn(*shape):
    return torch.randn(*shape, requires_grad=True)


def test_products_forward_and_backward_are_counted_as_pytorch_counts_them():
    x, w, bias, batch = drawn(3, 7, 5), drawn(11, 5), drawn(11), drawn(3, 11, 2)
    act = lambda: (F.linear(x, w) @ batch + (F.linear(x, w, bias) @ batch)).sum().backward()
    assert operations(act) == counted(act) > 0


def test_the_products_of_the_fused_loss_are_those_of_the_trained_rows():
    hidden, weight, labels = drawn(9, 8), drawn(40, 8), torch.arange(9)
    weights = torch.tensor([1.0, 0, 1, 1, 0, 0, 1, 0, 1])
    fused = lambda: masked_linear_cross_entropy(hidden, weight, labels, weights)[0].backward()
    rows = hidden.detach()[weights > 0].requires_grad_()
    plain = lambda: F.cross_entropy(F.linear(rows, weight), labels[weights > 0]).backward()
    assert operations(fused) == counted(plain) == 3 * 2 * 5 * 8 * 40
    assert counted(fused) == 0  # it does not look inside a custom operator


@pytest.mark.parametrize("T, S", [(40, 40), (24, 40)])
def test_attention_is_counted_from_its_pairs(T, S):
    q, k, v = drawn(2, 4, T, 16), drawn(2, 4, S, 16), drawn(2, 4, S, 16)
    whole = lambda: F.scaled_dot_product_attention(q, k, v)
    with sdpa_kernel(SDPBackend.MATH):
        forward, both = counted(whole), counted(lambda: whole().sum().backward())
    assert operations(whole) == forward
    # In backward the scores are computed again: five products, where four are counted.
    assert operations(lambda: whole().sum().backward()) == forward + (both - forward) * 5 // 4
    if T == S:
        causal = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert operations(causal) == sum(2 * 2 * 2 * 4 * 16 * (t + 1) for t in range(T))


def test_every_operator_belongs_to_one_family_and_products_can_be_repeated_alone():
    x, w = drawn(64, 32), drawn(16, 32)
    ops = PROFILE["observed"](lambda: F.linear(x, w).relu().sum().backward(), repeats=2)
    families = PROFILE["by_family"](ops)
    assert sum(families.values()) == pytest.approx(sum(op.seconds for op in ops))
    assert families["matrix products"] > 0 and families["attention kernel"] == 0 and PROFILE["alone"](ops) >= 0
