"""Several ranks against one: loss, gradient, weights, bad steps, whole trainings. Run as a program, this file is one of the ranks."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import forked_ranks, meeting_point
from hypothesis import given, settings
from hypothesis import strategies as st

from precision import EXACT, FACTOR, assert_same_curve, curve_units, exact, in_double, largest

from nemotron_nb.core import UserError, from_mapping
from nemotron_nb.data.pack import make_pack
from nemotron_nb.data.prep import PrepConfig, prepare
from nemotron_nb.train.batches import Row, global_batch
from nemotron_nb.train.checkpoint import full_state
from nemotron_nb.train.anomalies import Guard
from nemotron_nb.train.objective import Learner, make_mtp, recompute
from nemotron_nb.train.model import build_model
from nemotron_nb.train.parallel import Ranks, dealt, passes, ranks_of_process, spread, sum_gradients
from nemotron_nb.train.settings import ModelConfig, TrainConfig
from nemotron_nb.train.torch_engine import held_out, make_optimizer, train, train_step

SMALL = {"hidden_size": 32, "mamba_heads": 2, "expert_size": 16, "experts": 4, "attention_heads": 2, "pattern": "MEM*E"}
EVERYTHING = SMALL | {"mtp_num_layers": 2, "moe_aux_loss_coeff": 0.05, "moe_router_bias_update_rate": 0.01}
VOCAB = 61


# ---- the cases, which every rank and the only rank run alike


def packs_of(sizes, seed=0):
    rng = np.random.default_rng(seed)
    made = [(rng.integers(1, VOCAB, n), np.r_[np.zeros(n - k, np.uint8), np.ones(k, np.uint8)]) for n, k in sizes]
    return [make_pack([i for i, _ in made], [m for _, m in made], [f"c{i}" for i in range(len(made))], [f"s{i % 2}" for i in range(len(made))])]


UNEVEN = ((120, 40), (30, 5), (41, 1), (9, 3), (16, 9), (12, 2))
FEW = ((60, 20), (9, 3))  # an idle rank of four has no row at all
CASES = {  # name: settings, rows
    "token, ddp": ({"loss": {"stages": [{"stage": "token"}]}, "train": {"micro_batch_tokens": 64}}, UNEVEN),
    "sample, ddp": ({"loss": {"stages": [{"stage": "sample"}], "conversation_unit": "conversation"}, "train": {"micro_batch_tokens": 64}}, FEW),
    "token, fsdp2": ({"loss": {"stages": [{"stage": "token"}]}, "train": {"micro_batch_tokens": 64, "data_parallel": "fsdp2"}}, FEW),
    "sample, fsdp2, recomputed": ({"loss": {"stages": [{"stage": "sample"}]}, "train": {"micro_batch_tokens": 64, "data_parallel": "fsdp2", "recompute": True}}, UNEVEN),
}


def config_of(data_dir="data", output_dir="nowhere", **sections):
    common = {"data_dir": str(data_dir), "output_dir": str(output_dir), "model": SMALL, "optimizer": {"lr": 1e-3, "adam_eps": 1e-3, "clip_grad": 0.7}}
    return from_mapping(TrainConfig, common | sections)


def some_steps(config, sizes, ranks):
    """The lines of two steps in float64, the held-out loss after them, and the weights."""
    model = build_model(config.model, VOCAB, seed=0)
    learner = Learner(model, config.model, make_mtp(model) if config.model.mtp_num_layers else None).double()
    if config.train.recompute:
        recompute(learner)
    learner = spread(learner, ranks, config.train.data_parallel)
    optimizer, guard = make_optimizer(learner, config.optimizer), Guard()
    lines = [train_step(learner, optimizer, global_batch(packs_of(sizes, seed=s), config.loss.conversation_unit), s, config, ranks, guard) for s in range(2)]
    valid = held_out(learner, packs_of(sizes, seed=9), 64, "sequence", ranks)
    return lines, valid, full_state(learner)


def bad_steps(config, ranks):
    """What a step does whose second conversation has no number for a loss: skipped, then stopped."""
    learner = spread(Learner(build_model(config.model, VOCAB, seed=0)), ranks, config.train.data_parallel)
    if not hasattr(learner.base.model.embeddings.weight, "to_local"):
        learner.base.model.embeddings.weight.data[VOCAB - 1] = math.nan
    optimizer = make_optimizer(learner, config.optimizer)
    ids = np.arange(1, 9)
    broken = np.where(ids == 4, VOCAB - 1, ids)
    batch = global_batch([make_pack([ids, broken, ids], [np.array([0] * 4 + [1] * 4, np.uint8)] * 3, ["fine", "bad", "fine too"])])
    before = {k: v.clone() for k, v in full_state(learner).items()}
    line = train_step(learner, optimizer, batch, 4, dataclasses.replace(config, train=dataclasses.replace(config.train, bad_step="skip")), ranks)
    same = all(torch.equal(v.nan_to_num(7), before[k].nan_to_num(7)) for k, v in full_state(learner).items())
    try:
        train_step(learner, optimizer, batch, 4, config, ranks)
    except UserError as error:
        return line, same, str(error)
    return line, same, ""


def training(data_dir, output, **train_settings):
    """Settings of a whole training of six steps with a switch of the stage."""
    steps = {"train_iters": 6, "global_batch_size": 2, "micro_batch_tokens": 1024, "eval_interval": 2, "log_interval": 100}
    return config_of(
        data_dir, output, model=SMALL, train=steps | train_settings, scheduler={"lr_warmup_iters": 2}, evaluation={"num_generations": 2, "max_new_tokens": 6},
        loss={"stages": [{"stage": "token", "steps": 3}, {"stage": "sample"}]}, checkpoint={"save_interval": 2},
    )  # fmt: skip


def run_rank(folder: Path) -> None:
    """Everything one rank does; rank 0 writes it down."""
    found = {}
    with ranks_of_process() as ranks:
        with exact():
            found |= {name: some_steps(config_of(model=EVERYTHING, **sections), sizes, ranks) for name, (sections, sizes) in CASES.items()}
        said = ranks.gathered(bad_steps(config_of(output_dir=folder), ranks))
        found["bad"] = said
        output = folder / "stopped"
        if ranks.first:
            output.mkdir()
            (output / "STOP").touch()
        ranks.told(None)
        train(training(folder.parent / "data", output))
        if ranks.world == 2:
            train(training(folder.parent / "data", folder / "shared", data_parallel="fsdp2"))
        if ranks.first:
            torch.save(found, folder / "found.pt")


# ---- the tests


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    prepare(PrepConfig(output_dir=str(folder / "data"), sample=40, pack_size=1024, train_ratio=0.8, valid_ratio=0.1, test_ratio=0.1))
    train(training(folder / "data", folder / "alone"))
    train(training(folder / "data", folder / "alone_in_pieces", micro_batch_tokens=64))
    with in_double():
        train(training(folder / "data", folder / "alone_in_double"))
    return folder


@pytest.fixture(scope="module")
def alone():
    with exact():
        return {name: some_steps(config_of(model=EVERYTHING, **sections), sizes, Ranks()) for name, (sections, sizes) in CASES.items()}


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.long)])
def several(request, place):
    folder = place / f"ranks{request.param}"
    folder.mkdir()
    if request.param == 2:
        forked_ranks(lambda rank: run_rank(folder), 2, folder=folder, env=meeting_point())
    else:  # as torchrun starts them
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(request.param), __file__, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]
    return request.param, folder, torch.load(folder / "found.pt", weights_only=False)


def test_steps_of_several_ranks_are_those_of_one(several, alone):
    _, _, found = several
    for name, (lines, valid, state) in alone.items():
        theirs, their_valid, their_state = found[name]
        for ours, other in zip(lines, theirs, strict=True):
            assert ours.keys() == other.keys()
            for key in ours.keys() - {"seconds"}:
                assert other[key] == (ours[key] if isinstance(ours[key], str) else pytest.approx(ours[key], rel=EXACT, abs=EXACT)), (name, key)
        assert "loss_mtp_2" in lines[0] and lines[0]["expert_imbalance"] > 0.9
        for part in (valid, *valid["sources"].values()):
            assert part["loss_token"] > 1
        assert their_valid["sources"].keys() == valid["sources"].keys()
        assert [their_valid[k] for k in ("loss_token", "loss_sample")] == pytest.approx([valid[k] for k in ("loss_token", "loss_sample")], rel=EXACT)
        for key, tensor in state.items():
            torch.testing.assert_close(their_state[key], tensor, rtol=0, atol=EXACT, msg=f"{name}: {key}")


def test_all_ranks_agree_on_a_bad_step(several, place):
    _, folder, found = several
    for line, same, error in found["bad"]:
        assert line["kind"] == "skipped" and line["step"] == 5 and line["conversations"] == ["bad"] and same
        assert "conversations bad: the loss is nan in step 5" in error and "bad_batch_step_5.json" in error
    saved = json.loads((folder / "bad_batch_step_5.json").read_text())
    assert [(r["conversation"], r["no_number"]) for r in saved["rows"]] == [("fine", False), ("bad", True), ("fine too", False)]


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_of(folder):
    return [line for line in lines_of(folder) if line["kind"] == "train"]


def close_to(place, theirs):
    """The same steps as alone: identical in what is counted, equal up to what float32 strays from float64 in what is computed."""
    ours, in_pieces, truth = (steps_of(place / name) for name in ("alone", "alone_in_pieces", "alone_in_double"))
    assert_same_curve(theirs, ours, curve_units(truth, [ours, in_pieces], ("loss", "loss_token", "loss_sample", "grad_norm")))
    assert [line["step"] for line in theirs] == [line["step"] for line in ours]
    for a, b in zip(ours, theirs, strict=True):
        for key in ("stage", "tokens", "trained_tokens", "conversations", "epoch", "lr"):
            assert a[key] == b[key], (key, a["step"])


def test_stopped_on_several_ranks_and_gone_on_alone(several, place):
    world, folder, _ = several
    kinds = [line["kind"] for line in lines_of(folder / "stopped")]
    assert kinds == ["start", "valid", "train", "paused"] and not (folder / "stopped" / "model").exists()
    train(training(place / "data", folder / "stopped"))
    lines = lines_of(folder / "stopped")
    assert [line["kind"] for line in lines][:5] == ["start", "valid", "train", "paused", "resume"]
    assert lines[4] == {"kind": "resume", "step": 1, "attempt": 2} and lines[-1]["kind"] == "end"
    assert not (folder / "stopped" / "STOP").exists()
    close_to(place, steps_of(folder / "stopped"))


def test_a_whole_training_with_a_model_that_is_shared_out(several, place):
    world, folder, _ = several
    if world != 2:
        pytest.skip("at two ranks")
    close_to(place, steps_of(folder / "shared"))
    places = [place / "alone", folder / "shared", place / "alone_in_pieces", place / "alone_in_double"]
    after = [json.loads((f / "evaluation_after.json").read_text()) for f in places]
    assert_same_curve([after[1]], [after[0]], curve_units([after[3]], [[after[0]], [after[2]]], ("loss_token", "loss_sample")))
    tokens = torch.arange(3, 60)[None]
    with torch.no_grad():
        one, other, third, exactly = (build_model(ModelConfig(name=str(f / "model")), 4096)(tokens).logits for f in places)
    assert largest(one - other) <= FACTOR * max(largest(one - exactly), largest(third - exactly)) < 0.1 * largest(one)


@settings(max_examples=80, deadline=None)
@given(lengths=st.lists(st.integers(1, 400), min_size=1, max_size=25), world=st.integers(1, 6), cap=st.integers(1, 900))
def test_every_row_is_dealt_once_and_all_ranks_pass_equally_often(lengths, world, cap):
    rows = [Row(np.zeros(n, np.int64), np.zeros(n, np.int64), np.ones(n, bool), str(i)) for i, n in enumerate(lengths)]
    plans = [passes(rows, cap, Ranks(r, world)) for r in range(world)]
    assert len({len(plan) for plan in plans}) == 1
    assert sorted(r.conversation_id for plan in plans for group in plan for r in group) == sorted(r.conversation_id for r in rows)
    loads = sorted(sum(map(len, hand)) for hand in dealt(rows, world))
    assert loads[-1] - loads[0] <= max(lengths), "no rank could hand its last row to the lightest one and gain"


def test_a_process_that_was_told_nothing_is_the_only_one(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    p = torch.nn.Parameter(torch.ones(2))
    with ranks_of_process() as ranks:
        sum_gradients([p], ranks)
        assert (ranks.world, ranks.first, p.grad) == (1, True, None)


if __name__ == "__main__":
    run_rank(Path(sys.argv[1]))
