"""Packers against the naive loops; packs against the sequences they hold; what is kept of long sequences against a loop over tokens."""

import importlib.util
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nemotron_nb.data.pack as module
from nemotron_nb.core import UserError
from nemotron_nb.data.pack import (
    ALGORITHMS,
    OVERFLOWS,
    PACK_SIZES,
    Packing,
    aligned,
    alignment,
    best_fit_by_hand,
    close_turn,
    cut_curve,
    fill_bars,
    first_fit,
    first_fit_by_hand,
    fit_length,
    fitted,
    length_bars,
    longest,
    make_pack,
    next_fit_by_hand,
    pack,
    pack_bars,
    packing_tier,
    roll_mask,
)

TIERS = [False, pytest.param(True, marks=pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed"))]
BY_HAND = {"first": first_fit_by_hand, "best": best_fit_by_hand, "concatenative": next_fit_by_hand}
capacities_and_lengths = st.integers(1, 50).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=120)))


def order_by_hand(lengths, algorithm, seed):
    """The order in which an algorithm takes the sequences, in the plainest Python."""
    order = list(range(len(lengths)))
    if algorithm.endswith("shuffle"):
        random.Random(seed).shuffle(order)
    if algorithm.endswith("decreasing"):
        order.sort(key=lambda i: lengths[i], reverse=True)
    return order


@settings(max_examples=300, deadline=None)
@given(capacities_and_lengths, st.randoms(use_true_random=False))
def test_first_fit_equals_the_naive_loop(case, r):
    capacity, lengths = case
    order = r.sample(range(len(lengths)), len(lengths))
    assert first_fit(lengths, capacity, order) == first_fit_by_hand(lengths, capacity, order)


@pytest.mark.parametrize("compiled", TIERS)
@settings(max_examples=300, deadline=None)
@given(case=capacities_and_lengths, algorithm=st.sampled_from(ALGORITHMS), seed=st.integers(-3, 1 << 70), as_array=st.sampled_from([list, np.array, lambda x: np.array(x, np.uint16)]))
def test_every_algorithm_gives_the_packs_of_its_double_loop(compiled, case, algorithm, seed, as_array):
    capacity, lengths = case
    bins = BY_HAND[algorithm.split("_")[0]](lengths, capacity, order_by_hand(lengths, algorithm, seed))
    assert pack(as_array(lengths) if lengths else lengths, capacity, algorithm, seed, compiled).tolist() == bins


@settings(max_examples=200, deadline=None)
@given(capacities_and_lengths, st.sampled_from(ALGORITHMS), st.integers(0, 3))
def test_every_sequence_in_exactly_one_pack_and_no_pack_over_capacity(case, algorithm, seed):
    capacity, lengths = case
    packing = pack(lengths, capacity, algorithm, seed)
    assert sorted(packing.order.tolist()) == list(range(len(lengths)))
    assert [sum(lengths[i] for i in b) for b in packing] == packing.tokens(lengths).tolist()
    assert all(0 < n <= capacity for n in packing.tokens(lengths))
    assert packing == pack(lengths, capacity, algorithm, seed)


@pytest.mark.parametrize("compiled", TIERS)
@pytest.mark.parametrize("capacity", [4096, 262_144])
def test_both_tiers_agree_on_lengths_like_those_of_chats(compiled, capacity):
    """Large enough for a deep tree, for radix and for merge sort, and for more than one word of the shuffle's generator a place."""
    lengths = np.clip(np.random.default_rng(7).lognormal(6.8, 1.2, 20_000).astype(int), 1, capacity)
    for algorithm in ALGORITHMS:
        assert pack(lengths, capacity, algorithm, 1, compiled) == pack(lengths, capacity, algorithm, 1, compiled=False)
    assert pack(lengths, capacity, "best_fit_decreasing", compiled=compiled).fill(lengths, capacity) > 0.99


@pytest.mark.parametrize("unit", [1, 10_000])
@pytest.mark.parametrize("algorithm", ["first_fit_decreasing", "best_fit_decreasing"])
def test_longest_first_keeps_the_order_of_equal_lengths(algorithm, unit):
    """Many equal lengths, in sixteen bits and beyond them: an unstable or narrow sort gives other packs."""
    lengths = [unit * random.Random(i).randrange(1, 10) for i in range(500)]
    bins = BY_HAND[algorithm.split("_")[0]](lengths, 10 * unit, order_by_hand(lengths, algorithm, 0))
    assert pack(lengths, 10 * unit, algorithm).tolist() == bins


def test_the_published_shuffle_gives_the_published_packs():
    """random.Random(seed).shuffle over indices, then first fit: the order the reference recipes use."""
    lengths = [random.Random(1).randrange(1, 100) for _ in range(200)]
    order = list(range(200))
    random.Random(42).shuffle(order)
    assert pack(lengths, 100, "first_fit_shuffle", 42).tolist() == first_fit_by_hand(lengths, 100, order)


@pytest.mark.parametrize("error", [ImportError, RuntimeError])
def test_without_numba_the_packs_are_the_same_and_asking_for_it_is_an_error(monkeypatch, error):
    def missing(*_):
        raise error("no numba, or no folder for its cache")

    lengths = list(range(1, 60))
    expected = pack(lengths, 64)
    monkeypatch.setattr("builtins.__import__", lambda name, *rest, real=__import__: missing() if rest and "pack_fast" in (rest[2] or ()) else real(name, *rest))
    monkeypatch.setattr(module, "COMPILED_FROM", 10)
    assert packing_tier(len(lengths)) == "python" and pack(lengths, 64) == expected
    with pytest.raises(UserError, match="pip install numba"):
        pack(lengths, 64, compiled=True)


def test_a_packing_is_a_sequence_of_packs():
    packing = Packing.from_bins([[3, 0], [1], [2, 4, 5]])
    assert len(packing) == 3 and packing[2].tolist() == packing[-1].tolist() == [2, 4, 5] and packing.tolist() == [[3, 0], [1], [2, 4, 5]]
    assert [b.dtype for b in packing] == [np.int64] * 3 and "6 sequences in 3 packs, at most 3" in repr(packing)
    assert packing == Packing(packing.order.copy(), packing.starts.copy()) != Packing.from_bins([[3, 0], [1, 2, 4, 5]])
    assert packing != [[3, 0], [1], [2, 4, 5]] and Packing.from_bins([]) == pack([], 5) and len(pack(np.zeros(0, int), 5)) == 0
    for b in (3, -4):
        with pytest.raises(IndexError):
            packing[b]
    with pytest.raises(ValueError, match="read-only"):
        packing.order[0] = 9


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=9), min_size=1, max_size=6))
def test_a_pack_gives_back_its_sequences_and_trains_only_their_own_labels(masks):
    ids = [np.arange(len(m)) + 100 * k for k, m in enumerate(masks)]
    p = make_pack(ids, [np.array(m) for m in masks], [str(k) for k in range(len(masks))])
    assert len(p.spans) == len(masks) and p.seq_start_id[0] == 0
    for (start, end), own_ids, own in zip(p.spans, ids, masks):
        assert p.input_ids[start:end].tolist() == own_ids.tolist()
        assert p.loss_mask[start:end].tolist() == [*own[1:], 0]
        for t in range(start, end - 1):
            assert p.loss_mask[t] == own[t + 1 - start], "position t predicts token t + 1"
        assert p.loss_mask[end - 1] == 0, "the last position of a chat would predict its neighbour"


def test_roll_is_to_the_left():
    assert roll_mask(np.array([0, 1, 0, 0])).tolist() == [1, 0, 0, 0]
    assert roll_mask(np.array([], dtype=np.uint8)).tolist() == []


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 60), max_size=20), st.integers(2, 20), st.sampled_from([p for p in OVERFLOWS if p != "fail"]), st.integers(1, 5))
def test_kept_and_cut_are_all_tokens_and_every_label_is_there_once(lengths, capacity, policy, multiple):
    """Counted token by token: which are kept, and which predictions (token t from t - 1) exist in some span."""
    most = longest(capacity, multiple)
    if policy == "split" and most < 2:
        return
    spans = fitted(lengths, capacity, policy, multiple)
    kept, predicted = set(), []
    for i, a, b in zip(spans.sequence.tolist(), spans.start.tolist(), spans.end.tolist()):
        assert 0 <= a < b <= lengths[i] and aligned([b - a], multiple)[0] <= capacity
        kept |= {(i, t) for t in range(a, b)}
        predicted += [(i, t) for t in range(a + 1, b)]
    assert len(kept) == spans.kept and spans.kept + spans.cut == sum(lengths)
    assert len(set(predicted)) == len(predicted)
    fit = [i for i, n in enumerate(lengths) if n <= most]
    assert {(i, t) for i in fit for t in range(lengths[i])} <= kept, "what fits is never touched"
    if policy == "split":
        assert spans.cut == 0 and len(predicted) == sum(n - 1 for n in lengths)
    else:
        assert set(spans.sequence.tolist()) == set(fit if policy == "drop" else range(len(lengths)))
    assert spans.closing.tolist() == [policy == "truncate" and lengths[i] > most for i in spans.sequence]
    assert (pack(aligned(spans.lengths, multiple), capacity).tokens(spans.lengths) <= capacity).all()


@pytest.mark.parametrize(
    ("ids", "mask", "closed"),
    [
        ([5, 6, 7], [0, 1, 1], ([5, 6, 9], [0, 1, 0])),
        ([5, 6, 7], [0, 0, 0], ([5, 6, 9], [0, 0, 0])),
        ([5, 6, 9], [0, 1, 1], ([5, 6, 9], [0, 1, 1])),
        ([5, 9, 4], [0, 1, 1], ([5, 9, 4], [0, 1, 1])),
        ([9, 5, 4], [1, 0, 0], ([9, 5, 9], [1, 0, 0])),
        ([5], [1], ([9], [0])),
    ],
)
def test_a_cut_turn_is_closed_and_its_closing_never_trained(ids, mask, closed):
    given_ids, given_mask = np.array(ids, np.int32), np.array(mask, np.uint8)
    assert tuple(a.tolist() for a in close_turn(given_ids, given_mask, 9)) == closed
    assert given_ids.tolist() == ids and given_mask.tolist() == mask, "the store of all sequences is not written to"


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 32), st.integers(1, 600))
def test_aligned_is_the_least_length_whose_positions_are_a_multiple(length, multiple, capacity):
    expected = next(n for n in range(length, length + multiple) if (n - 1) % multiple == 0)
    assert aligned([length], multiple).tolist() == [expected]
    assert longest(capacity, multiple) == max(n for n in range(1, capacity + 1) if aligned([n], multiple)[0] <= capacity)


@pytest.mark.parametrize(("given_", "multiple"), [((1, 1, 8, True), 8), ((1, 1, 8, False), 1), ((1, 2, 1, True), 4), ((1, 2, 4, False), 4), ((1, 2, 4, True), 8), ((3, 4, 6, True), 24), ((16, 2, 1, False), 16)])
def test_alignment_is_the_least_common_multiple(given_, multiple):
    assert alignment(*given_) == multiple


@pytest.mark.parametrize(("policy", "expected"), [("truncate", 10), ("cut", 10), ("drop", 0), ("split", 11)])
def test_overflow(policy, expected):
    assert fit_length(11, 10, policy) == expected and fit_length(10, 10, policy) == 10


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: pack([1, 11], 10), "sequence 1 has 11 tokens, a pack holds 10"),
        (lambda: pack([2, 0], 10), "sequence 1 has 0 tokens"),
        (lambda: pack([-1], 10), "-1 tokens"),
        (lambda: pack([1], 10, "concatenate"), "did you mean 'concatenative'"),
        (lambda: pack([True, 2], 10), "whole numbers"),
        (lambda: pack(np.array([True]), 10), "whole numbers"),
        (lambda: pack([1.0], 10), "whole numbers"),
        (lambda: pack(["1"], 10), "whole numbers"),
        (lambda: pack([[1]], 10), "whole numbers"),
        (lambda: pack([1], 0), "cannot hold 0"),
        (lambda: pack([1], 1 << 31), "cannot hold 2147483648"),
        (lambda: fit_length(11, 10, "fail", "chat.jsonl:3"), "chat.jsonl:3: 11 tokens"),
        (lambda: fitted([3], 1, "split"), "predict nothing"),
        (lambda: fitted([3], 2, "trunctate"), "did you mean 'truncate'"),
        (lambda: aligned([3], 0), "multiple of 0"),
        (lambda: alignment(context_parallel=0), "at least 1"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises(UserError) as error:
        call()
    assert says in str(error.value)


def test_pictures_say_their_numbers():
    lengths = [100, 4096, 1500, 5000]
    assert "the longest 5,000; 1 are longer than a pack of 4,096" in length_bars(lengths, 4096).text
    assert "at least 2 needed" in fill_bars(lengths, 8192).text and all(name in fill_bars(lengths, 8192).text for name in ALGORITHMS)
    curve = cut_curve(lengths).text
    assert f"4k {904 / 10696:.1%} (of 25.0% of the sequences)" in curve and "8k 0.0%" in curve and len(PACK_SIZES) == 9
    assert "0 packs" in pack_bars([], 10).text and "0 sequences" in length_bars([]).text
