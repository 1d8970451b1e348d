"""A third row of the table of loss stages: weights, denominators, losses and metrics follow in both engines."""

from fractions import Fraction

import pytest
import torch
from precision import EXACT, mean_loss_gap, sum_error

from nemotron_nb.core import UserError
from nemotron_nb.loss.schedule import LOSS_STAGES, LossStage, StageSchedule
from nemotron_nb.loss.two_stage import MeanPair, accounting, answer_lengths, count, loss_by_hand, token_weights

MASK = torch.tensor([0, 1, 1, 1, 1, 0, 1, 0, 1, 1])
CHAT = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 3, 3])  # four, one, none, two trained labels


@pytest.fixture(params=["tokens", "conversations"])
def root(request, monkeypatch) -> str:
    """A stage between the two: each label weighs one over the root of its conversation's length."""
    monkeypatch.setitem(LOSS_STAGES, "root", LossStage(request.param, lambda n: n**0.5))
    return request.param


def test_weights_and_denominators_are_those_of_the_row(root):
    weights = token_weights(MASK, CHAT, "root", torch.float64)
    lengths = {0: 4, 1: 1, 3: 2}
    by_hand = [lengths[c] ** -0.5 if m else 0.0 for m, c in zip(MASK.tolist(), CHAT.tolist())]
    assert torch.allclose(weights, torch.tensor(by_hand, dtype=torch.float64), rtol=4 * torch.finfo(torch.float64).eps, atol=0)
    assert count(MASK, CHAT).of("root") == {"tokens": 7, "conversations": 3}[root]


def test_every_right_way_of_computing_it_agrees_with_the_loop(root):
    torch.manual_seed(0)
    logits = torch.randn(len(MASK), 5, dtype=torch.float64, requires_grad=True)
    rungs = accounting(lambda piece: -logits[piece].log_softmax(-1)[:, 0], logits, MASK, CHAT)
    mine = [r for r in rungs if r.stage == "root"]
    assert len(mine) > 7 and all(r.agrees for r in mine if not r.known_mistake)


def test_its_mean_is_a_metric(root):
    nll = torch.arange(len(MASK), dtype=torch.float64)
    record = (MeanPair.counted(count(MASK, CHAT)) + MeanPair.of(nll, answer_lengths(MASK, CHAT))).record()
    assert set(record) == {"loss_token", "loss_sample", "loss_root", "trained_tokens", "conversations"}
    assert record["loss_root"] == pytest.approx(loss_by_hand(nll, MASK, CHAT, "root").item(), rel=EXACT)
    assert Fraction(record["loss_token"]).limit_denominator(100) == Fraction(1 + 2 + 3 + 4 + 6 + 8 + 9, 7)


def test_the_schedule_knows_it(root):
    schedule = StageSchedule.from_config([{"stage": "token", "steps": 2}, {"stage": "root"}])
    assert [schedule.stage_at(step) for step in range(4)] == ["token", "token", "root", "root"]


def test_the_torch_engine_steps_with_it(root):
    from test_batches import CONFIG, VOCAB, random_packs

    from nemotron_nb.loss.schedule import Phase
    from nemotron_nb.train.batches import collate, global_batch, share_of_loss
    from nemotron_nb.train.model import build_model
    from nemotron_nb.train.settings import LossSection, TrainConfig
    from nemotron_nb.train.torch_engine import make_optimizer, train_step

    packs = random_packs()[0]
    model, batch = build_model(CONFIG, VOCAB, seed=0), global_batch(packs)
    config = TrainConfig(data_dir="packs", output_dir="out", loss=LossSection(stages=[Phase("root")]))
    micro = collate(batch.rows, "cpu")
    nll = share_of_loss(model, micro, "root", batch.denominators)[1].detach()
    row = torch.arange(len(nll))[:, None].expand_as(nll)
    expected = loss_by_hand(nll.double().flatten(), (micro.lengths > 0).flatten(), row.flatten(), "root").item()
    allowed = mean_loss_gap(model, packs)
    line = train_step(model, make_optimizer(model, config.optimizer), batch, 0, config)
    assert line["stage"] == "root" and line["loss"] == pytest.approx(expected, abs=allowed)
    assert line["loss_root"] == pytest.approx(expected, abs=allowed)


def test_the_megatron_step_weighs_and_counts_with_it(root):
    from nemotron_nb.megatron.step import Share, weighted_loss

    lengths, counts, nll = answer_lengths(MASK, CHAT), count(MASK, CHAT), torch.linspace(0.5, 3, len(MASK))
    share = Share("root", 8, counts, counted_here=True)
    total, number, reported = weighted_loss(lengths, share, nll)
    assert (total / number).item() == pytest.approx(loss_by_hand(nll, MASK, CHAT, "root").item(), rel=sum_error(len(MASK)))
    assert int(number) == {"tokens": 7, "conversations": 3 * 8}[root]
    mean = reported["loss_root"]
    assert (mean[0] / mean[1]).item() == pytest.approx(loss_by_hand(nll.double(), MASK, CHAT, "root").item(), rel=EXACT)


def test_a_row_that_counts_something_else_is_refused():
    with pytest.raises(UserError, match="did you mean 'tokens'"):
        LossStage("token", lambda n: 1)
