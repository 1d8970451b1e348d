"""Multi-token prediction: targets and loss against the loops, one kernel call against three, and a block that hears no neighbour."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from precision import EXACT

from nemotron_nb.core import UserError
from nemotron_nb.loss.fused import masked_linear_cross_entropy
from nemotron_nb.loss.mtp import (
    IGNORED,
    NORMALIZATIONS,
    MTPBlock,
    acceptance_length,
    count_depths,
    depth_lengths,
    mtp_cross_entropy,
    mtp_hidden_states,
    mtp_loss_by_hand,
    mtp_targets,
    mtp_targets_by_hand,
    mtp_weights,
    sequence_ids,
    shifted,
)
from nemotron_nb.loss.schedule import LOSS_STAGES
from nemotron_nb.loss.two_stage import Denominators, split_invariance, token_weights

VOCAB, HIDDEN = 9, 4


def pack_of(sequences: list[list[int]], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random labels, mask and sequence index of one pack, for sequences given as lists of mask bits."""
    mask = torch.tensor([bit for s in sequences for bit in s])
    labels = torch.randint(VOCAB, (len(mask),), generator=torch.Generator().manual_seed(seed))
    return labels, mask, torch.arange(len(sequences)).repeat_interleave(torch.tensor([len(s) for s in sequences]))


def weights_by(mask_KT, sequence_of, stage, **options):
    return mtp_weights(depth_lengths(mask_KT, sequence_of), count_depths(mask_KT, sequence_of), stage, dtype=torch.float64, **options)


packs = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=6)
some_trained = packs.filter(lambda sequences: any(map(any, sequences)))


# ---- targets


@settings(deadline=None, max_examples=60)
@given(packs, st.integers(0, 4), st.integers(0, 99))
def test_targets_are_the_loop(sequences, depths, seed):
    labels, mask, sequence_of = pack_of(sequences, seed)
    for fast, slow in zip(mtp_targets(labels, mask, sequence_of, depths), mtp_targets_by_hand(labels, mask, sequence_of, depths), strict=True):
        assert torch.equal(fast, slow)


@settings(deadline=None, max_examples=40)
@given(packs, st.integers(1, 3))
def test_a_pack_and_padded_rows_have_the_same_targets(sequences, depths):
    labels, mask, sequence_of = pack_of(sequences)
    longest, spans = max(map(len, sequences)), [(sequence_of == s).nonzero().squeeze(1) for s in range(len(sequences))]
    rows = torch.full((len(sequences), longest), IGNORED), torch.zeros(len(sequences), longest, dtype=torch.long)
    for r, span in enumerate(spans):
        rows[0][r, : len(span)], rows[1][r, : len(span)] = labels[span], mask[span]
    in_rows = mtp_targets(*rows, torch.arange(len(sequences))[:, None].expand_as(rows[0]), depths)
    in_pack = mtp_targets(labels, mask, sequence_of, depths)
    for a, b in zip(in_rows, in_pack, strict=True):
        assert torch.equal(torch.cat([a[:, r, : len(span)] for r, span in enumerate(spans)], dim=1), b)
    assert (in_rows[0] == IGNORED).logical_or(in_rows[0] >= 0).all() and not in_rows[1][in_rows[0] == IGNORED].any()


def test_a_border_is_where_the_number_changes_even_if_it_comes_back():
    values = torch.tensor([1, 2, 3, 4])
    assert shifted(values, torch.tensor([7, 7, 5, 7]), 2, -1).tolist() == [-1, -1, -1, -1]
    assert shifted(values, torch.tensor([7, 7, 7, 5]), 2, -1).tolist() == [3, -1, -1, -1]
    assert shifted(values, torch.tensor([7, 7, 7, 5]), 9, -1).tolist() == [-1] * 4
    assert shifted(values, torch.tensor([7, 7, 7, 5]), 0, -1) is values


def test_sequence_numbers_from_offsets():
    assert sequence_ids(torch.tensor([0, 2, 5]), 7).tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert sequence_ids(torch.tensor([0, 3, 3, 4], dtype=torch.int32), 4).tolist() == [0, 0, 0, 2]  # an empty sequence


def test_a_chat_with_a_prompt_loses_no_target():
    _, mask_KT = mtp_targets(*pack_of([[0, 0, 1, 1, 1], [0, 0, 1]]), depths=2)
    assert mask_KT.sum(1).tolist() == [4, 4, 4]


# ---- the loss


@settings(deadline=None, max_examples=60)
@given(some_trained, st.integers(1, 3), st.sampled_from(sorted(LOSS_STAGES)), st.sampled_from(NORMALIZATIONS), st.integers(0, 99))
def test_one_weighted_sum_is_the_loop(sequences, depths, stage, normalization, seed):
    labels, mask, sequence_of = pack_of(sequences, seed)
    nll = torch.rand(1 + depths, len(mask), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    _, mask_KT = mtp_targets(labels, mask, sequence_of, depths)
    weights = weights_by(mask_KT, sequence_of, stage, normalization=normalization)
    expected = mtp_loss_by_hand(nll, mask, sequence_of, stage, normalization=normalization)
    torch.testing.assert_close((weights * nll).sum(), expected, rtol=EXACT, atol=0)
    present = [1.0, *(0.3 / depths if m.any() else 0.0 for m in mask_KT[1:])]
    torch.testing.assert_close(weights.sum(1), torch.tensor(present, dtype=torch.float64), rtol=EXACT, atol=0)


def test_values_by_arithmetic():
    _, mask, sequence_of = pack_of([[0, 1, 1], [1, 1]])
    _, mask_KT = mtp_targets(torch.zeros(5, dtype=torch.long), mask, sequence_of, 1)
    assert mask_KT.tolist() == [[0, 1, 1, 1, 1], [1, 1, 0, 1, 0]]
    assert count_depths(mask_KT, sequence_of) == (Denominators(4, 2), Denominators(3, 2))
    each = 0.3 / 3
    torch.testing.assert_close(weights_by(mask_KT, sequence_of, "sample")[1], torch.tensor([each, each, 0, each, 0], dtype=torch.float64), rtol=EXACT, atol=EXACT)
    by_chat = 0.3 / 2
    torch.testing.assert_close(weights_by(mask_KT, sequence_of, "sample", normalization="stage")[1], torch.tensor([by_chat / 2, by_chat / 2, 0, by_chat, 0], dtype=torch.float64), rtol=EXACT, atol=EXACT)
    assert weights_by(mask_KT, sequence_of, "token")[0].tolist() == [0, 0.25, 0.25, 0.25, 0.25]


def test_token_stage_is_what_megatron_core_computes_on_one_micro_batch():
    """factor / K * mask * nll * (original / moved count), all divided by the original count: zero fill, one roll a depth."""
    sequences, depths = [[1, 1, 1], [0, 1, 1, 0, 1], [1]], 2
    labels, mask, sequence_of = pack_of(sequences)
    nll = torch.rand(1 + depths, len(mask), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    total, moved, original = (nll[0] * mask).sum(), mask.clone(), mask.sum()
    for k in range(1, 1 + depths):
        for s in sequence_of.unique():
            inside = (sequence_of == s).nonzero().squeeze(1)
            part = moved[inside].roll(-1)
            part[-1] = 0
            moved[inside] = part
        total = total + 0.3 / depths * (nll[k] * moved).sum() * original / moved.sum().clamp(min=1)
    _, mask_KT = mtp_targets(labels, mask, sequence_of, depths)
    torch.testing.assert_close((weights_by(mask_KT, sequence_of, "token") * nll).sum(), total / original, rtol=EXACT, atol=0)


@settings(deadline=None, max_examples=30)
@given(some_trained, st.sampled_from(sorted(LOSS_STAGES)), st.sampled_from(NORMALIZATIONS), st.data())
def test_one_call_equals_separate_calls_and_any_split(sequences, stage, normalization, data):
    labels, mask, sequence_of = pack_of(sequences)
    r, T = torch.Generator().manual_seed(2), len(mask)
    hidden = torch.randn(3, T, HIDDEN, generator=r, dtype=torch.float64, requires_grad=True)
    output = torch.randn(VOCAB, HIDDEN, generator=r, dtype=torch.float64, requires_grad=True)
    labels_KT, mask_KT = mtp_targets(labels, mask, sequence_of)
    weights = weights_by(mask_KT, sequence_of, stage, normalization=normalization)
    once, stats = mtp_cross_entropy(hidden, output, labels_KT, weights, workspace_bytes=3 * VOCAB * 8)
    apart = sum(masked_linear_cross_entropy(hidden[k], output, labels_KT[k], weights[k])[0] for k in range(3))
    full = F.cross_entropy((hidden @ output.T).flatten(0, 1), labels_KT.flatten(), reduction="none").view(3, T)
    by_hand = mtp_loss_by_hand(full, mask, sequence_of, stage, normalization=normalization)
    assert stats.num_active == int(mask_KT.sum())
    torch.testing.assert_close(stats.nll, full.detach() * mask_KT, rtol=EXACT, atol=EXACT)
    gradients = torch.autograd.grad(once, (hidden, output))
    for other in (apart, by_hand):
        torch.testing.assert_close(once, other, rtol=EXACT, atol=EXACT)
        for got, want in zip(gradients, torch.autograd.grad(other, (hidden, output)), strict=True):
            torch.testing.assert_close(got, want, rtol=8 * EXACT, atol=EXACT)
    piece_of = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=T, max_size=T)))
    share = lambda piece: mtp_cross_entropy([h[piece] for h in hidden.detach()], output, labels_KT[:, piece], weights[:, piece])[0]
    _, cut = split_invariance(share, output, {"whole": [torch.arange(T)], "cut": [(piece_of == p).nonzero().squeeze(1) for p in range(3)]}).values()
    assert cut.loss == pytest.approx(once.item(), rel=EXACT) and cut.gradient_gap < 8 * EXACT


def test_stage_switch_leaves_the_depths_alone_unless_told():
    _, mask, sequence_of = pack_of([[0, 0, 1], [0, 0] + [1] * 7])
    _, mask_KT = mtp_targets(torch.zeros_like(mask), mask, sequence_of)
    token, sample, follows = (weights_by(mask_KT, sequence_of, *a) if len(a) == 1 else weights_by(mask_KT, sequence_of, a[0], normalization=a[1]) for a in (("token",), ("sample",), ("sample", "stage")))
    assert torch.equal(token[1:], sample[1:]) and not torch.equal(token[0], sample[0])
    for k in (1, 2):
        torch.testing.assert_close(follows[k], 0.15 * token_weights(mask_KT[k], sequence_of, "sample", torch.float64) / 2, rtol=EXACT, atol=EXACT)


def test_what_is_refused():
    _, mask, sequence_of = pack_of([[0, 1, 1]])
    _, mask_KT = mtp_targets(torch.zeros_like(mask), mask, sequence_of)
    with pytest.raises(UserError, match="did you mean 'stage'"):
        weights_by(mask_KT, sequence_of, "token", normalization="stages")
    with pytest.raises(UserError, match="did you mean 'sample'"):
        weights_by(mask_KT, sequence_of, "sampel")
    with pytest.raises(UserError, match="no trained token"):
        weights_by(torch.zeros_like(mask_KT), sequence_of, "token")
    with pytest.raises(UserError, match="every depth"):
        acceptance_length(torch.zeros(3, 1, dtype=torch.long), torch.ones(3, 1) * torch.tensor([[1], [1], [0]]), torch.zeros(1))


# ---- the block


class Looking(torch.nn.Module):
    """The least that looks back: a running mean inside each sequence, mixed by a matrix."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(size, size)

    def forward(self, h, sequence_of):
        visible = (sequence_of[:, None] == sequence_of[None, :]).tril().to(h.dtype)
        return h + torch.tanh(self.mix(visible @ h / visible.sum(1, keepdim=True)))


@pytest.fixture
def block():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield MTPBlock(HIDDEN, Looking(HIDDEN)).double()


def states(block, embedding, tokens, sequence_of, **options):
    """Hidden states of the three depths; the main model is the bare embedding."""
    return mtp_hidden_states(partial(block, sequence_of=sequence_of), F.embedding(tokens, embedding), tokens, sequence_of, lambda ids: F.embedding(ids, embedding), **options)


def test_the_block_is_the_published_one(block):
    r = torch.Generator().manual_seed(0)
    hidden, told = torch.randn(5, HIDDEN, generator=r, dtype=torch.float64), torch.randn(5, HIDDEN, generator=r, dtype=torch.float64)
    sequence_of = torch.zeros(5)
    normed = lambda x: x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    projected = torch.cat([normed(told), normed(hidden)], -1) @ block.eh_proj.weight.T  # the embedding comes first
    torch.testing.assert_close(block(hidden, told, sequence_of=sequence_of), normed(block.mtp_model_layer(projected, sequence_of)), rtol=EXACT, atol=EXACT)
    assert [n for n, _ in block.named_children()] == ["enorm", "hnorm", "final_layernorm", "eh_proj", "mtp_model_layer"]


def test_nobody_hears_a_neighbour_nor_the_future(block):
    """Position t of depth k depends on the tokens of its own sequence up to t + k: exactly on those."""
    sequence_of = torch.tensor([0] * 4 + [1] * 5)
    r = torch.Generator().manual_seed(1)
    tokens, embedding = torch.randint(1, VOCAB, (9,), generator=r), torch.randn(VOCAB, HIDDEN, generator=r, dtype=torch.float64)
    before = states(block, embedding, tokens, sequence_of)
    for j in range(9):
        other = tokens.clone()
        other[j] = tokens[j] % (VOCAB - 1) + 1
        for k, (a, b) in enumerate(zip(states(block, embedding, other, sequence_of), before, strict=True)):
            moved = (a - b).abs().amax(-1) > EXACT
            expected = (sequence_of == sequence_of[j]) & (torch.arange(9) + k >= j)
            if k == 0:
                expected = torch.arange(9) == j  # the main model here is an embedding
            assert torch.equal(moved, expected), (j, k)


def test_the_fill_token_reaches_no_target(block):
    sequence_of = torch.tensor([0] * 4 + [1] * 5)
    r = torch.Generator().manual_seed(1)
    tokens, embedding = torch.randint(1, VOCAB - 1, (9,), generator=r), torch.randn(VOCAB, HIDDEN, generator=r, dtype=torch.float64, requires_grad=True)
    output = torch.randn(VOCAB, HIDDEN, generator=r, dtype=torch.float64)
    labels_KT, mask_KT = mtp_targets(torch.randint(VOCAB, (9,), generator=r), torch.ones(9, dtype=torch.long), sequence_of)
    weights = weights_by(mask_KT, sequence_of, "token")
    losses = [mtp_cross_entropy(states(block, embedding, tokens, sequence_of, fill_token=fill), output, labels_KT, weights)[0] for fill in (0, VOCAB - 1)]
    assert losses[0].item() == losses[1].item()
    (gradient,) = torch.autograd.grad(losses[0], embedding)
    assert not gradient[0].any() and gradient[tokens[1]].any()


def test_both_depths_train_one_block(block):
    sequence_of = torch.zeros(6, dtype=torch.long)
    r = torch.Generator().manual_seed(1)
    tokens, embedding = torch.randint(VOCAB, (6,), generator=r), torch.randn(VOCAB, HIDDEN, generator=r, dtype=torch.float64)
    _, first, second = states(block, embedding, tokens, sequence_of)
    parts = [torch.autograd.grad(h.sum(), block.eh_proj.weight, retain_graph=True)[0] for h in (first, second)]
    (both,) = torch.autograd.grad(first.sum() + second.sum(), block.eh_proj.weight)
    torch.testing.assert_close(both, sum(parts), rtol=EXACT, atol=EXACT)
    assert all(p.abs().max() > 0 for p in parts)


def test_acceptance_by_arithmetic():
    predictions = torch.tensor([[4, 5, 6, 7, 8], [5, 6, 0, 8, 0], [6, 0, 8, 0, 0]])
    sequence_of, mask = torch.zeros(5), torch.ones(3, 5)
    mask[:, 3:] = 0
    # position 0 keeps both guesses, 1 keeps one, 2 none although its second guess is right
    assert acceptance_length(predictions, mask, sequence_of) == pytest.approx((3 + 2 + 1) / 3)
