"""GRPO and DPO on several ranks against one: draws, judgements, pairs, loss, gradient, whole runs."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from forked import forked_ranks, meeting_point

import nemotron_nb
from nemotron_nb.data.tokenizer import load_tokenizer
from nemotron_nb.loss.policy import PolicyRules
from nemotron_nb.rl.grpo import GrpoSettings, draw_and_judge, grpo_step, make_policy, policy_gradient
from nemotron_nb.rl.judgement import said
from nemotron_nb.rl.judges import CircleJudge, rule_judge
from nemotron_nb.rl.preferences import DpoSettings, dpo_gradient, dpo_step, own_pairs, reference_logp
from nemotron_nb.rl.prepare import TaskFiles, prepare_tasks
from nemotron_nb.rl.sample_tasks import sample_tasks
from nemotron_nb.rl.training import KeepSection, RlTraining, read_training, train
from nemotron_nb.train.checkpoint import export_hf
from nemotron_nb.train.metrics import metric_lines
from nemotron_nb.train.model import build_model
from nemotron_nb.train.parallel import Ranks, ranks_of_process
from nemotron_nb.train.settings import ModelConfig

TOKENIZER = load_tokenizer("tiny")
WORLD = 2
ROUNDED = torch.finfo(torch.float32).eps  # the library computes its norms in float32, whatever the rest is
BASE = GrpoSettings(num_prompts_per_step=3, num_generations_per_prompt=4, max_num_steps=2, max_new_tokens=8, micro_batch_tokens=120)
CASES = {
    "token": BASE,
    "sequence, all kept": dataclasses.replace(BASE, loss_fn=PolicyRules(level="sequence"), silent_groups="keep"),
}


def small_model():
    model = build_model(ModelConfig(hidden_size=32, pattern="ME*", experts=2), TOKENIZER.vocab_size, seed=1)
    with torch.no_grad():
        model.lm_head.weight[[TOKENIZER.im_end_id, *range(300, 1400, 100)]] *= 14
    return model


def odd(task, reply):
    return said(len(reply.text) % 2, "length")


def some_step(settings, ranks):
    """In double precision: rollouts, rewards, loss, gradient, and the weights after a step."""
    policy = make_policy(small_model().double(), TOKENIZER, settings, ranks=ranks)
    answers = draw_and_judge(policy, sample_tasks(3), 0, settings, odd)
    loss, stats = policy_gradient(policy, answers, settings)
    gradient = torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.requires_grad])
    line, _ = grpo_step(policy, sample_tasks(3), 0, settings, CircleJudge(rule_judge()))
    after = torch.cat([p.detach().flatten() for p in policy.model.parameters()])
    said_of = [[(r.ids, r.logp, j.reward) for r, j in zip(a.rollouts, a.judgements)] for a in answers]
    return {"answers": said_of, "loss": loss, "kept": stats.record(), "gradient": gradient, "line": line, "after": after}


DPO = DpoSettings(solutions=8, pairs_per_task=4, min_pairs=4, pairs_per_step=5, max_num_steps=3)


def some_pairs(ranks):
    """The same of DPO, with the routers in training: pairs, reference, loss, gradient, and the weights after a step."""
    settings = dataclasses.replace(BASE, num_generations_per_prompt=DPO.solutions, freeze_router=False)
    policy = make_policy(small_model().double(), TOKENIZER, settings, ranks=ranks)
    pairs = own_pairs(draw_and_judge(policy, sample_tasks(4), 0, settings, odd), TOKENIZER, DPO.pairs_per_task)
    reference = reference_logp(policy.model, pairs, max_tokens=120, ranks=ranks)
    shifted = [(good - 1.0, bad + 0.5) for good, bad in reference]  # away from the start, where every margin is 0
    loss, stats = dpo_gradient(policy, pairs, shifted, DPO, max_tokens=120)
    gradient = torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])
    line = dpo_step(policy, pairs, shifted, 0, DPO, max_tokens=120)
    after = torch.cat([p.detach().flatten() for p in policy.model.parameters()])
    return {"pairs": pairs, "reference": reference, "loss": loss, "kept": stats.record(), "gradient": gradient, "line": line, "after": after}


def everything(folder, ranks):
    """All cases, and the trainings of a folder."""
    found = {name: some_step(settings, ranks) for name, settings in CASES.items()} | {"dpo": some_pairs(ranks)}
    for part in (folder, folder.with_name(f"{folder.name}-dpo")):
        train(read_training(part / "train.yaml"), judge_one=odd, ranks=ranks)
    return found


def be_rank(work):
    """All of it as one of several."""
    with ranks_of_process() as mine:
        torch.save(everything(work / "several", mine), work / f"rank{mine.rank}.pt")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(one rank, [each of several], folder of runs)."""
    work = tmp_path_factory.mktemp("ranks")
    export_hf(small_model(), Path(nemotron_nb.__file__).parent / "data" / "assets" / "tokenizer", work / "start")
    prepared = prepare_tasks(TaskFiles("sample", val_rows=3, sample_tasks=6), work / "tasks")
    for name in ("one", "several", "one-dpo", "several-dpo"):
        told = {"method": "dpo", "dpo": DPO} if name.endswith("-dpo") else {"checkpoint": KeepSection(save_interval=1)}
        config = RlTraining(str(work / "start"), prepared.train, str(work / name), prepared.val, grpo=BASE, **told)
        (work / name).mkdir()
        (work / name / "train.yaml").write_text(json.dumps(dataclasses.asdict(config)))
    forked_ranks(lambda rank: be_rank(work), WORLD, folder=work, env=meeting_point())
    one = everything(work / "one", Ranks())
    return one, [torch.load(work / f"rank{r}.pt", weights_only=False) for r in range(WORLD)], work


@pytest.mark.parametrize("name", CASES)
def test_draws_loss_gradient_and_step_are_those_of_one_rank(both, name):
    one, several, _ = both
    for other in several:
        mine, theirs = one[name], other[name]
        assert [[(ids, reward) for ids, _, reward in g] for g in mine["answers"]] == [[(ids, reward) for ids, _, reward in g] for g in theirs["answers"]]
        size = float(mine["gradient"].norm())
        assert size > 0 and float((mine["gradient"] - theirs["gradient"]).norm()) <= ROUNDED * size
        assert abs(mine["loss"] - theirs["loss"]) <= ROUNDED * (1 + abs(mine["loss"]))
        assert mine["line"]["groups"] == theirs["line"]["groups"] and mine["line"]["moved"]
        assert float((mine["after"] - theirs["after"]).norm()) <= ROUNDED * float(mine["after"].norm())
    assert torch.equal(several[0][name]["after"], several[1][name]["after"]), "ranks part ways"


def test_a_run_on_two_ranks_writes_once_and_what_one_writes(both):
    _, _, work = both
    lines = {n: [line for _, line in metric_lines(work / n / "metrics.jsonl")] for n in ("one", "several")}
    assert [line["kind"] for line in lines["one"]] == [line["kind"] for line in lines["several"]]
    for name in ("rollouts/step_000001.jsonl", "ledger/step_000001.jsonl", "rollouts/valid_000000.jsonl"):
        mine, theirs = ((work / n / name).read_text().splitlines() for n in ("one", "several"))
        drop = lambda row: {k: v for k, v in json.loads(row).items() if k != "logp"}
        assert [drop(r) for r in mine] == [drop(r) for r in theirs]
    assert (work / "several/model/model.safetensors").is_file() and (work / "several/parity.json").is_file()


def test_a_step_of_dpo_is_that_of_one_rank(both):
    one, several, _ = both
    mine = one["dpo"]
    assert len(mine["pairs"]) > DPO.pairs_per_step and len({round(good - bad, 9) for good, bad in mine["reference"]}) > 1
    for theirs in (other["dpo"] for other in several):
        assert theirs["pairs"] == mine["pairs"]
        close = lambda a, b: abs(a - b) <= 4 * ROUNDED * (1 + abs(a))
        assert all(close(a, b) for x, y in zip(mine["reference"], theirs["reference"], strict=True) for a, b in zip(x, y, strict=True))
        assert close(mine["loss"], theirs["loss"]) and all(close(mine["kept"][k], theirs["kept"][k]) for k in mine["kept"])
        size = float(mine["gradient"].norm())
        assert size > 0 and float((mine["gradient"] - theirs["gradient"]).norm()) <= 4 * ROUNDED * size
        assert float((mine["after"] - theirs["after"]).norm()) <= 4 * ROUNDED * float(mine["after"].norm())
    assert torch.equal(several[0]["dpo"]["after"], several[1]["dpo"]["after"]), "ranks part ways"


def test_a_run_of_dpo_on_two_ranks_writes_once_and_what_one_writes(both):
    _, _, work = both
    lines = {n: [line for _, line in metric_lines(work / n / "metrics.jsonl")] for n in ("one-dpo", "several-dpo")}
    assert [line["kind"] for line in lines["one-dpo"]] == [line["kind"] for line in lines["several-dpo"]]
    steps = {n: [line for line in some if line["kind"] == "dpo"] for n, some in lines.items()}
    assert len(steps["one-dpo"]) == DPO.max_num_steps
    for mine, theirs in zip(*steps.values(), strict=True):
        assert abs(mine["loss"] - theirs["loss"]) < 1e-4 and mine["preferred"] == theirs["preferred"]
    one, several = ((work / n / "pairs.jsonl").read_bytes() for n in ("one-dpo", "several-dpo"))
    assert one == several and (work / "several-dpo/model/model.safetensors").is_file()
