"""From packs to a gradient: the sampler, rows, counts, micro-batches, split invariance, isolation."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from precision import FACTOR, float_error, float_errors, near, norm, sum_error

from nemotron_nb.core import UserError
from nemotron_nb.data.pack import make_pack
from nemotron_nb.loss.two_stage import Denominators, loss_by_hand
from nemotron_nb.train.batches import Row, collate, global_batch, grouped, packs_of_step, rows_of, share_of_loss
from nemotron_nb.train.model import build_model
from nemotron_nb.train.settings import ModelConfig

VOCAB = 50
CONFIG = ModelConfig(hidden_size=32, mamba_heads=2, expert_size=16, experts=4, attention_heads=2, init_std=0.2)


@pytest.fixture(scope="module")
def model():
    return build_model(CONFIG, VOCAB, seed=0).double()


def conversation(rng, length, trained):
    """Ids and a mask with the last `trained` tokens on, and one more run in the middle."""
    mask = np.zeros(length, dtype=np.uint8)
    mask[length - trained :] = 1
    if trained and length > 12:
        mask[4:6] = 1
    return rng.integers(1, VOCAB, length), mask


def random_packs(seed=0, sizes=((30, 5), (9, 1), (70, 40), (16, 0), (41, 12), (5, 4), (130, 3))):
    rng = np.random.default_rng(seed)
    made = [conversation(rng, *size) for size in sizes]
    halves = [range(0, 4), range(4, len(made))]
    return [make_pack([made[i][0] for i in h], [made[i][1] for i in h], [f"c{i}" for i in h]) for h in halves], made


@settings(max_examples=60, deadline=None)
@given(num_packs=st.integers(1, 13), size=st.integers(1, 30), seed=st.integers(0, 5))
def test_every_epoch_visits_every_pack_once(num_packs, size, seed):
    steps = -(-3 * num_packs // size)
    visited = [i for step in range(steps) for i in packs_of_step(step, num_packs, size, seed)]
    for epoch in range(3):
        assert sorted(visited[epoch * num_packs : (epoch + 1) * num_packs]) == list(range(num_packs))


def test_order_depends_on_seed_and_epoch_and_is_fixed():
    assert packs_of_step(0, 8, 8, seed=0) == packs_of_step(0, 8, 8, seed=0)
    orders = {tuple(packs_of_step(step, 8, 8, seed)) for step in range(3) for seed in range(3)}
    assert len(orders) == 9


def test_rows_predict_the_next_token_of_their_own_sequence():
    packs, made = random_packs()
    rows = [r for p in packs for r in rows_of(p)]
    assert [r.conversation_id for r in rows] == [f"c{i}" for i in range(7)]
    for row, (ids, mask) in zip(rows, made):
        assert row.tokens.tolist() == ids[:-1].tolist() and row.labels.tolist() == ids[1:].tolist()
        assert row.mask.tolist() == mask[1:].astype(bool).tolist()


def test_a_sequence_of_one_token_gives_no_row():
    pack = make_pack([np.array([3]), np.array([4, 5])], [np.array([1], np.uint8), np.array([0, 1], np.uint8)], ["one", "two"])
    assert [r.conversation_id for r in rows_of(pack)] == ["two"]


def test_counts_of_the_global_batch():
    packs, made = random_packs()
    batch = global_batch(packs)
    assert batch.denominators == Denominators(sum(int(m[1:].sum()) for _, m in made), 6)
    assert [r.conversation_id for r in batch.rows] == [f"c{i}" for i in (0, 1, 2, 4, 5, 6)]
    assert batch.tokens == sum(len(i) - 1 for i, m in made if m[1:].any())


def test_a_batch_without_trained_tokens_is_refused_by_name():
    pack = make_pack([np.arange(4)], [np.zeros(4, np.uint8)], ["silent"])
    with pytest.raises(UserError, match="silent: no token of this batch is trained"):
        global_batch([pack])


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=30), cap=st.integers(1, 900))
def test_groups_hold_every_row_once_under_the_cap(lengths, cap):
    rows = [Row(np.zeros(n, np.int64), np.zeros(n, np.int64), np.ones(n, bool), str(i)) for i, n in enumerate(lengths)]
    groups = grouped(rows, cap)
    assert sorted(r.conversation_id for g in groups for r in g) == sorted(r.conversation_id for r in rows)
    for g in groups:
        longest = max(map(len, g))
        assert len(g) == 1 or len(g) * longest <= cap
        assert all(3 * len(r) >= longest for r in g)


def oracle(model, made, stage):
    """Unpacked conversations one by one, full logits, the loss by its definition."""
    nll, masks, owner = [], [], []
    for k, (ids, mask) in enumerate(made):
        logits = model(torch.from_numpy(ids[:-1])[None]).logits[0].double()
        nll.append(F.cross_entropy(logits, torch.from_numpy(ids[1:]), reduction="none"))
        masks.append(torch.from_numpy(mask[1:]))
        owner.append(torch.full((len(ids) - 1,), k))
    return loss_by_hand(torch.cat(nll), torch.cat(masks), torch.cat(owner), stage)


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture(scope="module")
def units(model):
    """The errors of plain float32 on this machine: norms of the library compute in it, whatever the model's type. Of a loss, of a token's loss, of the gradient's norm."""
    packs, made = random_packs()
    plain = copy.deepcopy(model).float()

    def losses(m):
        logits = [m(torch.from_numpy(ids[:-1])[None]).logits[0].double() for ids, _ in made]
        nll = torch.cat([F.cross_entropy(each, torch.from_numpy(ids[1:]), reduction="none") for each, (ids, _) in zip(logits, made)])
        return [oracle(m, made, "token"), oracle(m, made, "sample"), nll]

    gradients = max(float_error(lambda m: gradient(m, oracle(m, made, stage)), plain, measure=norm) for stage in ("token", "sample"))
    token, sample, nll = float_errors(losses, plain)
    return {"loss": max(token, sample), "nll": nll, "gradient": gradients}


@pytest.mark.parametrize("stage", ["token", "sample"])
@pytest.mark.parametrize("cap", [1, 100, 250, 10_000])
def test_loss_and_gradient_equal_the_oracle_however_they_are_split(model, units, stage, cap):
    packs, made = random_packs()
    batch = global_batch(packs)
    truth = oracle(model, made, stage)
    expected = gradient(model, truth)
    shares = [share_of_loss(model, collate(g), stage, batch.denominators)[0] for g in grouped(batch.rows, cap)]
    found = gradient(model, sum(shares))
    assert abs(sum(shares).item() - truth.item()) <= FACTOR * units["loss"]
    assert (found - expected).norm() <= FACTOR * units["gradient"] < expected.norm() / 100


def test_packing_does_not_matter(model, units):
    _, made = random_packs()
    losses = []
    for parts in ([[0, 1, 2, 3, 4, 5, 6]], [[6, 2], [5, 1, 0], [4, 3]], [[i] for i in range(7)]):
        packs = [make_pack([made[i][0] for i in p], [made[i][1] for i in p], [str(i) for i in p]) for p in parts]
        batch = global_batch(packs)
        losses.append([sum(share_of_loss(model, collate(g), s, batch.denominators)[0].item() for g in grouped(batch.rows, 300)) for s in ("token", "sample")])
    assert np.ptp(np.array(losses), axis=0).max() <= FACTOR * units["loss"]
    assert abs(losses[0][0] - losses[0][1]) > 1e-3, "the two means differ on this batch, or the test says nothing"


def test_sums_give_both_means_from_one_pass(model, units):
    packs, made = random_packs()
    batch = global_batch(packs)
    totals = np.zeros(2)
    for g in grouped(batch.rows, 200):
        micro = collate(g)
        from nemotron_nb.loss.two_stage import MeanPair; totals += MeanPair.of(share_of_loss(model, micro, "token", batch.denominators)[1], micro.lengths).sums[:-2].numpy()
    assert totals[0] / batch.denominators.tokens == pytest.approx(oracle(model, made, "token").item(), abs=FACTOR * units["loss"])
    assert totals[1] / batch.denominators.conversations == pytest.approx(oracle(model, made, "sample").item(), abs=FACTOR * units["loss"])


def test_padding_and_neighbours_leave_a_row_alone(model, units):
    packs, _ = random_packs()
    rows = list(global_batch(packs).rows)
    alone = [share_of_loss(model, collate([r]), "token", Denominators(1, 1))[1][0] for r in rows]
    together = share_of_loss(model, collate(rows), "token", Denominators(1, 1))[1]
    changed = [Row((r.tokens + 1) % VOCAB, r.labels, r.mask, "x") if k == 2 else r for k, r in enumerate(rows)]
    perturbed = share_of_loss(model, collate(changed), "token", Denominators(1, 1))[1]
    for k, row in enumerate(rows):
        assert near(together[k, : len(row)], alone[k], units["nll"])
        assert together[k, len(row) :].abs().sum() == 0
        gap = (perturbed[k] - together[k]).abs().max()
        assert gap > 1e-2 if k == 2 else gap <= FACTOR * units["nll"]


def test_a_pack_fed_as_one_row_leaks(model):
    packs, _ = random_packs()
    first, second = rows_of(packs[0])[0], rows_of(packs[0])[2]
    joined = Row(*(np.concatenate([getattr(first, k), getattr(second, k)]) for k in ("tokens", "labels", "mask")), "joined")
    leaked = share_of_loss(model, collate([joined]), "token", Denominators(1, 1))[1][0, len(first) :]
    alone = share_of_loss(model, collate([second]), "token", Denominators(1, 1))[1][0]
    assert (leaked - alone).abs().max() > 1e-2


def test_sequences_of_one_chat_count_once_if_asked():
    import numpy as np
    from nemotron_nb.data.pack import make_pack
    rng = np.random.default_rng(0)
    made = [(rng.integers(1, VOCAB, n), np.r_[np.zeros(2, np.uint8), np.ones(n - 2, np.uint8)]) for n in (6, 12, 9)]
    packs = [make_pack([i for i, _ in made], [m for _, m in made], ["a", "b", "a"])]
    model = build_model(ModelConfig(hidden_size=32, mamba_heads=2, expert_size=16, experts=4, attention_heads=2), VOCAB)
    for unit, owners, conversations in (("sequence", [0, 1, 2], 3), ("conversation", [0, 1, 0], 2)):
        batch = global_batch(packs, unit)
        assert batch.denominators == Denominators(21, conversations)
        whole = sum(share_of_loss(model, collate([r]), "sample", batch.denominators)[0] for r in batch.rows)
        nll = torch.cat([share_of_loss(model, collate([r]), "token", batch.denominators)[1][0] for r in batch.rows])
        mask = torch.cat([torch.from_numpy(r.mask) for r in batch.rows])
        owner = torch.cat([torch.full((len(r),), o) for r, o in zip(batch.rows, owners)])
        from nemotron_nb.loss.two_stage import loss_by_hand
        torch.testing.assert_close(whole, loss_by_hand(nll, mask, owner, "sample"), rtol=sum_error(21), atol=0, check_dtype=False)
