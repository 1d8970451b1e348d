"""Packers against the naive loop; packs against the sequences they hold."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_nb.core import UserError
from nemotron_nb.data.pack import ALGORITHMS, first_fit, first_fit_by_hand, fit_length, make_pack, pack, roll_mask

capacities_and_lengths = st.integers(1, 50).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=120)))


@settings(max_examples=300, deadline=None)
@given(capacities_and_lengths, st.randoms(use_true_random=False))
def test_first_fit_equals_the_naive_loop(case, r):
    capacity, lengths = case
    order = r.sample(range(len(lengths)), len(lengths))
    assert first_fit(lengths, capacity, order) == first_fit_by_hand(lengths, capacity, order)


@settings(max_examples=200, deadline=None)
@given(capacities_and_lengths, st.sampled_from(ALGORITHMS), st.integers(0, 3))
def test_every_sequence_in_exactly_one_pack_and_no_pack_over_capacity(case, algorithm, seed):
    capacity, lengths = case
    bins = pack(lengths, capacity, algorithm, seed)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(b and sum(lengths[i] for i in b) <= capacity for b in bins)
    assert bins == pack(lengths, capacity, algorithm, seed)


@settings(max_examples=200, deadline=None)
@given(capacities_and_lengths)
def test_best_fit_decreasing_equals_a_scan_over_all_packs(case):
    capacity, lengths = case
    sizes, room = [], []
    for n in sorted(lengths, reverse=True):
        fitting = [b for b in range(len(room)) if room[b] >= n]
        if fitting:
            tightest = min(fitting, key=lambda b: room[b])
            room[tightest] -= n
        else:
            room.append(capacity - n)
            sizes.append(n)
    got = sorted(capacity - sum(lengths[i] for i in b) for b in pack(lengths, capacity, "best_fit_decreasing"))
    assert got == sorted(room)


def test_the_published_shuffle_gives_the_published_packs():
    """random.Random(seed).shuffle over indices, then first fit: the order the reference recipes use."""
    import random

    lengths = [random.Random(1).randrange(1, 100) for _ in range(200)]
    order = list(range(200))
    random.Random(42).shuffle(order)
    assert pack(lengths, 100, "first_fit_shuffle", 42) == first_fit_by_hand(lengths, 100, order)


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


@pytest.mark.parametrize(("policy", "expected"), [("truncate", 10), ("drop", 0)])
def test_overflow(policy, expected):
    assert fit_length(11, 10, policy) == expected and fit_length(10, 10, policy) == 10


def test_bad_input():
    with pytest.raises(UserError, match="a pack holds 10"):
        pack([1, 11], 10)
    with pytest.raises(UserError, match="0 tokens"):
        pack([0], 10)
    with pytest.raises(UserError, match="did you mean 'concatenative'"):
        pack([1], 10, "concatenate")
    with pytest.raises(UserError, match="chat.jsonl:3"):
        fit_length(11, 10, "fail", "chat.jsonl:3")
