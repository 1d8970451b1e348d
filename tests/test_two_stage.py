"""The two-stage loss: weights and counts against the loop of the two equations, and loss accounting over any split."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from precision import EXACT

from nemotron_nb.core import UserError
from nemotron_nb.loss.fused import masked_linear_cross_entropy
from nemotron_nb.loss.schedule import CONVERSATION_UNITS, LOSS_STAGES, Phase, StageSchedule, check_unit
from nemotron_nb.loss.two_stage import Denominators, answer_lengths, count, loss_by_hand, split_invariance, token_weights, unit_of, weights_of


def batch_of(sequences: list[list[int]], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random losses (float64), mask and sequence index, for sequences given as lists of mask bits."""
    mask = torch.tensor([bit for s in sequences for bit in s], dtype=torch.uint8)
    sequence_of = torch.tensor([c for c, s in enumerate(sequences) for _ in s], dtype=torch.int64)
    return torch.rand(len(mask), generator=torch.Generator().manual_seed(seed), dtype=torch.float64), mask, sequence_of


def weighted(nll, mask, sequence_of, stage) -> torch.Tensor:
    return (token_weights(mask, sequence_of, stage, torch.float64) * nll).sum() / count(mask, sequence_of).of(stage)


masks = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=12), min_size=1, max_size=8)
some_trained = masks.filter(lambda sequences: any(map(any, sequences)))


def test_values_by_arithmetic():
    nll = torch.tensor([9.0, 3.0, 1.0, 1.0, 1.0, 9.0])
    mask = torch.tensor([False, True, True, True, True, False])
    sequence_of = torch.tensor([0, 0, 1, 1, 1, 2])
    assert count(mask, sequence_of) == Denominators(tokens=4, conversations=2)
    assert loss_by_hand(nll, mask, sequence_of, "token") == 1.5
    assert loss_by_hand(nll, mask, sequence_of, "sample") == 2.0
    assert token_weights(mask, sequence_of, "token").tolist() == [0, 1, 1, 1, 1, 0]
    third = torch.tensor(1 / 3).item()
    assert token_weights(mask, sequence_of, "sample").tolist() == [0, 1, third, third, third, 0]
    assert token_weights(mask, sequence_of, "sample").dtype == torch.float32


@settings(deadline=None)
@given(some_trained, st.sampled_from(sorted(LOSS_STAGES)), st.integers(0, 99))
def test_weighted_sum_is_the_loop(sequences, stage, seed):
    nll, mask, sequence_of = batch_of(sequences, seed)
    torch.testing.assert_close(weighted(nll, mask, sequence_of, stage), loss_by_hand(nll, mask, sequence_of, stage), rtol=EXACT, atol=0)


@settings(deadline=None)
@given(some_trained, st.sampled_from(sorted(LOSS_STAGES)))
def test_weights_add_up_to_the_denominator(sequences, stage):
    _, mask, sequence_of = batch_of(sequences)
    denominators = count(mask, sequence_of)
    assert denominators == Denominators(sum(map(sum, sequences)), sum(map(any, sequences)))
    total = token_weights(mask, sequence_of, stage, torch.float64).sum().item()
    assert total == pytest.approx(denominators.of(stage), rel=EXACT)


@settings(deadline=None)
@given(some_trained, st.sampled_from(sorted(LOSS_STAGES)), st.randoms(use_true_random=False))
def test_order_numbering_padding_and_prompts_do_not_matter(sequences, stage, random):
    nll, mask, sequence_of = batch_of(sequences)
    expected = loss_by_hand(nll, mask, sequence_of, stage)
    order = torch.tensor(random.sample(range(len(nll)), len(nll)))
    names = torch.tensor(random.sample(range(-50, 10**12), len(sequences)))
    torch.testing.assert_close(weighted(nll[order], mask[order], names[sequence_of][order], stage), expected, rtol=EXACT, atol=EXACT)
    pad = torch.zeros(5)
    padded = torch.cat([nll, pad + float(7)]), torch.cat([mask, pad.to(mask)]), torch.cat([sequence_of, pad.long() - 1])
    torch.testing.assert_close(weighted(*padded, stage), expected, rtol=EXACT, atol=EXACT)


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 6))
def test_equal_lengths_make_the_stages_equal(length, sequences):
    batch = batch_of([[0] + [1] * length] * sequences)
    torch.testing.assert_close(loss_by_hand(*batch, "token"), loss_by_hand(*batch, "sample"), rtol=EXACT, atol=0)


def test_repeating_an_answer_moves_the_token_stage_only():
    nll, mask, sequence_of = batch_of([[0, 1, 1], [1] * 30])
    first = sequence_of == 0
    repeated = [torch.cat([a, a[first]]) for a in (nll, mask, sequence_of)]
    torch.testing.assert_close(weighted(*repeated, "sample"), weighted(nll, mask, sequence_of, "sample"), rtol=EXACT, atol=0)
    assert abs(weighted(*repeated, "token") - weighted(nll, mask, sequence_of, "token")) > 1e-3


def test_share_of_ten_tokens_beside_a_thousand():
    _, mask, sequence_of = batch_of([[1] * 10, [1] * 1000])
    shares = {stage: (token_weights(mask, sequence_of, stage, torch.float64)[:10].sum() / count(mask, sequence_of).of(stage)).item() for stage in LOSS_STAGES}
    assert shares == pytest.approx({"token": 1 / 101, "sample": 1 / 2}, rel=EXACT)


def test_rows_and_columns_are_welcome():
    _, mask, sequence_of = batch_of([[0, 1, 1], [1, 0, 1]])
    for stage in LOSS_STAGES:
        flat = token_weights(mask, sequence_of, stage)
        assert torch.equal(token_weights(mask.view(2, 3), sequence_of.view(2, 3), stage), flat.view(2, 3))


def test_counts_are_whole_numbers():
    denominators = count(torch.ones(1000, dtype=torch.int32), torch.arange(100).repeat_interleave(10))
    assert (type(denominators.tokens), type(denominators.conversations)) == (int, int)
    assert denominators == Denominators(1000, 100)


def test_what_is_refused():
    empty = torch.zeros(3, dtype=torch.bool), torch.zeros(3, dtype=torch.int64)
    for stage in LOSS_STAGES:
        with pytest.raises(UserError, match="no trained token"):
            count(*empty).of(stage)
        assert not token_weights(*empty, stage).any()
    with pytest.raises(UserError, match="did you mean 'token'"):
        count(torch.ones(2, dtype=torch.int), torch.zeros(2)).of("tokens")
    with pytest.raises(UserError, match="torch.float32"):
        count(torch.full((3,), 0.5), torch.zeros(3, dtype=torch.int64))


# --- what counts as one conversation


@settings(deadline=None)
@given(some_trained, st.sampled_from(sorted(LOSS_STAGES)), st.sampled_from(CONVERSATION_UNITS), st.data())
def test_a_unit_is_a_regrouping_and_nothing_else(sequences, stage, unit, data):
    nll, mask, sequence_of = batch_of(sequences)
    chats = data.draw(st.lists(st.sampled_from(["a", "b", ("c", 3)]), min_size=len(sequences), max_size=len(sequences)))
    owner = unit_of(sequence_of, chats, unit)
    by_name = torch.tensor([s if unit == "sequence" else 100 + ["a", "b", ("c", 3)].index(chats[s]) for s in sequence_of.tolist()])
    torch.testing.assert_close(weighted(nll, mask, owner, stage), loss_by_hand(nll, mask, by_name, stage), rtol=EXACT, atol=0)
    if stage == "token":
        torch.testing.assert_close(weighted(nll, mask, owner, stage), weighted(nll, mask, sequence_of, stage), rtol=EXACT, atol=0)


def test_units_by_arithmetic():
    sequence_of = torch.tensor([0, 0, 1, 2, 2, 2, -1])
    assert unit_of(sequence_of, ["x", "y", "x"], "sequence") is sequence_of
    assert unit_of(sequence_of, ["x", "y", "x"], "conversation").tolist() == [0, 0, 1, 0, 0, 0, -1]
    mask = torch.tensor([0, 1, 1, 1, 1, 0, 0])
    assert answer_lengths(mask, unit_of(sequence_of, "xyx", "conversation")).tolist() == [0, 3, 1, 3, 3, 0, 0]
    assert answer_lengths(mask, unit_of(sequence_of, "xyx", "sequence")).tolist() == [0, 1, 1, 2, 2, 0, 0]
    with pytest.raises(UserError, match="loss.conversation_unit: unknown unit 'sequnce'"):
        check_unit("sequnce")


@settings(deadline=None)
@given(some_trained, st.sampled_from(sorted(LOSS_STAGES)), st.randoms(use_true_random=False))
def test_weights_may_be_made_after_any_cut(sequences, stage, random):
    _, mask, sequence_of = batch_of(sequences)
    piece = torch.tensor(random.sample(range(len(mask)), random.randint(1, len(mask))))
    whole = token_weights(mask, sequence_of, stage, torch.float64)
    assert torch.equal(weights_of(answer_lengths(mask, sequence_of)[piece], stage, torch.float64), whole[piece])


# --- schedule


def test_schedule_follows_the_steps():
    schedule = StageSchedule.from_config([{"stage": "token", "steps": 2}, {"stage": "sample", "steps": 1}, {"stage": "token"}])
    assert [schedule.stage_at(step) for step in range(5)] == ["token", "token", "sample", "token", "token"]
    assert schedule.stage_at(10**12) == "token"
    assert schedule.plan(2) == [("token", 2), ("sample", 0), ("token", 0)]
    assert schedule.plan(9) == [("token", 2), ("sample", 1), ("token", 6)]
    assert StageSchedule.from_config([Phase("sample")]).stage_at(0) == "sample"


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(LOSS_STAGES)), st.integers(1, 7)), min_size=1, max_size=5), st.integers(1, 20))
def test_plan_is_the_count_of_stage_at(phases, num_steps):
    schedule = StageSchedule.from_config([{"stage": s, "steps": n} for s, n in phases] + [{"stage": "sample"}])
    plan = schedule.plan(num_steps)
    assert [stage for stage, steps in plan for _ in range(steps)] == [schedule.stage_at(step) for step in range(num_steps)]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.booleans(), st.sampled_from([0.5, 1.0, 2.0])), min_size=1, max_size=4), st.integers(1, 25))
def test_the_clock_of_the_learning_rate(phases, num_steps):
    """Against a walk: the clock is set back where a restarting phase begins, and a leg ends where the next begins."""
    entries = [{"stage": "token", "steps": n, "restart": r, "lr_factor": f} for n, r, f in phases] + [{"stage": "sample"}]
    schedule = StageSchedule.from_config(entries)
    factors = [f for n, _, f in phases for _ in range(n)]
    legs, first_of = [[]], {sum(n for n, _, _ in phases[:i]): r for i, (_, r, _) in enumerate(phases)}
    for step in range(num_steps):
        if step and first_of.get(step):
            legs.append([])
        legs[-1].append(factors[step] if step < len(factors) else 1.0)
    expected = [(i, len(leg), factor) for leg in legs for i, factor in enumerate(leg)]
    assert [schedule.clock(step, num_steps) for step in range(num_steps)] == expected


def test_a_closed_schedule_ends():
    schedule = StageSchedule.from_config([{"stage": "token", "steps": 2}])
    assert schedule.plan(2) == [("token", 2)]
    for ask in (lambda: schedule.stage_at(2), lambda: schedule.plan(3)):
        with pytest.raises(UserError, match="ends after step 2"):
            ask()


@pytest.mark.parametrize(
    "stages, message",
    [
        ([], "no stage"),
        ([{"stage": "tokn"}], "did you mean 'token'"),
        ([{"stage": "token"}, {"stage": "sample"}], r"loss.stages\[0\]: steps is missing"),
        ([{"stage": "token", "steps": 0}], "at least 1, not 0"),
        ([{"stage": "token", "steps": -3}], "at least 1, not -3"),
        ([{"stage": "token", "steps": 1.5}], "got float 1.5"),
        ([{"stage": "token", "steps": True}], "got bool True"),
        ([{"stage": "token", "stepps": 3}], "did you mean 'steps'"),
        ([{"steps": 3}], "an entry without a stage"),
        ([{"stage": "token", "lr_factor": 0}], "lr_factor must be a positive number, not 0"),
        ([{"stage": "token", "lr_factor": -1.0}], "lr_factor must be a positive number"),
        ([{"stage": "token", "lr_factor": float("nan")}], "lr_factor must be a positive number, not nan"),
        ([{"stage": "token", "lr_factor": float("inf")}], "lr_factor must be a positive number"),
        ([{"stage": "token", "lr_factor": "half"}], "got str 'half'"),
        ([{"stage": "token", "restart": 1}], "got int 1"),
    ],
)
def test_an_impossible_schedule_is_refused(stages, message):
    with pytest.raises(UserError, match=message):
        StageSchedule.from_config(stages)


# --- loss accounting

SEQUENCES = [[0, 0] + [1] * n for n in (1, 2, 3, 17, 60)] + [[0, 0, 0]]
HIDDEN, VOCAB = 5, 13


def accounting_batch() -> dict[str, torch.Tensor]:
    """A batch with very uneven sequences, the last without any trained token, and conversations that differ in difficulty."""
    _, mask, sequence_of = batch_of(SEQUENCES)
    r = torch.Generator().manual_seed(3)
    hidden = torch.randn(len(mask), HIDDEN, generator=r, dtype=torch.float64) * (1 + sequence_of[:, None])
    return {"hidden": hidden, "labels": torch.randint(VOCAB, (len(mask),), generator=r), "mask": mask, "sequence_of": sequence_of}


def head() -> torch.Tensor:
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def contribution_of(batch, weight, stage):
    """A piece's part of the loss, with weights and denominator of the whole batch."""
    weights = token_weights(batch["mask"], batch["sequence_of"], stage, torch.float64)
    scale = 1 / count(batch["mask"], batch["sequence_of"]).of(stage)
    return lambda piece: masked_linear_cross_entropy(batch["hidden"][piece], weight, batch["labels"][piece], weights[piece], scale=scale, workspace_bytes=4 * VOCAB * 8)[0]


def oracle(batch, weight, stage):
    nll = torch.nn.functional.cross_entropy(batch["hidden"] @ weight.T, batch["labels"], reduction="none")
    return loss_by_hand(nll, batch["mask"], batch["sequence_of"], stage)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(sorted(LOSS_STAGES)), st.data())
def test_any_split_gives_one_loss_and_one_gradient(stage, data):
    batch, weight = accounting_batch(), head().requires_grad_()
    T = len(batch["mask"])
    piece_of = torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=T, max_size=T)))
    splits = {"one piece": [torch.arange(T)], "scattered": [(piece_of == p).nonzero().squeeze(1) for p in range(5)]}
    one, scattered = split_invariance(contribution_of(batch, weight, stage), weight, splits).values()
    assert one.loss == pytest.approx(oracle(batch, weight, stage).item(), rel=EXACT)
    assert scattered.loss == pytest.approx(one.loss, rel=EXACT)
    assert scattered.gradient_gap < 8 * EXACT


def test_split_invariance_sees_a_mean_of_means():
    batch, weight = accounting_batch(), head().requires_grad_()
    pieces = torch.arange(len(batch["mask"])).split(30)

    def mean_of_means(piece):
        nll = torch.nn.functional.cross_entropy(batch["hidden"][piece] @ weight.T, batch["labels"][piece], reduction="none")
        return (nll * batch["mask"][piece]).sum() / batch["mask"][piece].sum() / (len(pieces) if len(piece) <= 30 else 1)

    whole, cut = split_invariance(mean_of_means, weight, {"whole": [torch.arange(len(batch["mask"]))], "cut": pieces}).values()
    assert abs(cut.loss / whole.loss - 1) > 0.01 and cut.gradient_gap > 0.01
