"""Stage 2 as a thing people run: tasks prepared, a run that is killed and goes on, its report and lineage, DPO, NeMo RL's configuration."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import ENV_TOML, ONE_THREAD, nemotron
from omegaconf import OmegaConf
from precision import EXACT, exact
from typer.testing import CliRunner

import nemotron_nb
from nemotron_nb.cli import app
from nemotron_nb.core import UserError
from nemotron_nb.data.template import chunks
from nemotron_nb.data.tokenizer import load_tokenizer
from nemotron_nb.ops.artifacts import Store
from nemotron_nb.ops.run_folder import read_metrics, read_status
from nemotron_nb.rl.grpo import GrpoSettings, draw_and_judge, make_policy, policy_gradient
from nemotron_nb.rl.judgement import said
from nemotron_nb.rl.nemo_rl import MAPPED, ONLY_THERE, nemo_rl_config, our_names
from nemotron_nb.rl.prepare import TaskFiles, prepare_tasks
from nemotron_nb.loss.policy import PolicyRules
from nemotron_nb.rl.preferences import BadPair, DpoSettings, dpo_gradient, own_pairs, pair_of_row, read_pairs, reference_logp
from nemotron_nb.rl.sample_tasks import sample_tasks
from nemotron_nb.rl.tasks import read_tasks, task_row
from nemotron_nb.rl.training import KeepSection, RlTraining, set_up, train
from nemotron_nb.stages.rl import rl_config, write_rl_report
from nemotron_nb.train.checkpoint import export_hf
from nemotron_nb.train.metrics import MetricsFile
from nemotron_nb.train.model import build_model
from nemotron_nb.train.lora import load_adapter
from nemotron_nb.train.settings import ModelConfig, PeftSection

TOKENIZER = load_tokenizer("tiny")
ASSETS = Path(nemotron_nb.__file__).parent / "data" / "assets" / "tokenizer"
MATH = {"name": "math"}


def small_model(loud=14):
    """A model of random weights that ends its turns soon."""
    model = build_model(ModelConfig(hidden_size=64, pattern="ME*M", experts=4), TOKENIZER.vocab_size, seed=1)
    with torch.no_grad():
        model.lm_head.weight[[TOKENIZER.im_end_id, *range(300, 1400, 100)]] *= loud
    return model


def odd(task, reply):
    """Rewards that no model can have learned, so that groups are live."""
    return said(len(reply.text) % 2, "length")


def rows_file(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def sums(count):
    return [{"responses_create_params": {"input": f"{n} + 1?"}, "expected_answer": str(n + 1), "agent_ref": MATH} for n in range(count)]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The folder of a start model."""
    folder = tmp_path_factory.mktemp("start") / "model"
    export_hf(small_model(), ASSETS, folder)
    return folder


# ---- preparation


BAD_ROWS = {
    "no_input": {"agent_ref": MATH, "expected_answer": "1"},
    "unknown_environment": sums(1)[0] | {"agent_ref": {"name": "poetry"}},
    "missing_truth": {k: v for k, v in sums(1)[0].items() if k != "expected_answer"},
    "bad_truth": sums(1)[0] | {"expected_answer": []},
    "bad_pass_rate": sums(1)[0] | {"pass_rate": 1.5},
    "bad_message": sums(1)[0] | {"responses_create_params": {"input": [{"role": "judge", "content": "?"}]}},
    "bad_tool": sums(1)[0] | {"responses_create_params": {"input": "?", "tools": [{"type": "function"}]}},
    "not_an_object": "[1]",
    "not_json": "{",
    "unknown_dataset": {"_hf_placeholder": {"row": 0, "question_template": "{question}"}, "dataset": "x", "agent_ref": MATH},
    "bad_placeholder": {"_hf_placeholder": {"row": -1}, "dataset": "nano_v3_sft_profiled_dapo17k", "agent_ref": MATH},
    "placeholder_and_question": {"_hf_placeholder": {"row": 0}, "question": "?", "dataset": "x", "agent_ref": MATH},
    "duplicate_task": sums(7)[6],
}


ASK_WHICH = {"responses_create_params": {"input": "Which?"}}
NO_TRUTH = [
    ASK_WHICH | {"agent_ref": {"name": "choice"}, "options": [{"A": "x"}, {"B": "y"}], "expected_answer": "C"},
    ASK_WHICH | {"agent_ref": {"name": "choice"}, "options": [{"A": "x"}, {"A": "y"}], "expected_answer": "A"},
    *(ASK_WHICH | {"agent_ref": {"name": "structured"}, "schema_type": "json", "schema_str": s} for s in ('{"type": 3}', "{", '{"$ref": "#"}', '{"$ref": "http://127.0.0.1/x"}')),
    ASK_WHICH | {"agent_ref": {"name": "instructions"}, "instruction_id_list": ["no:such"], "kwargs": [{}]},
    ASK_WHICH | {"agent_ref": {"name": "instructions"}, "instruction_id_list": ["punctuation:no_comma"] * 2, "kwargs": [{}]},
    *(ASK_WHICH | {"agent_ref": {"name": "code"}, "verifier_metadata": {"unit_tests": {"inputs": ["1"] * n, "outputs": ["1"] * n}}} for n in (0, 51)),
    ASK_WHICH | {"agent_ref": {"name": "workplace"}, "ground_truth": [{"name": "no_such_tool", "arguments": {}}]},
]


@pytest.mark.parametrize("row", NO_TRUTH)
def test_a_task_that_no_answer_could_solve_is_left_out_before_it_costs_a_rollout(tmp_path, row):
    """A group of answers to it would be drawn and end as failed verifications, again and again."""
    path = rows_file(tmp_path / "rows.jsonl", [*sums(3), row])
    prepared = prepare_tasks(TaskFiles(path, val_rows=1), tmp_path / "out")
    assert prepared.values["rejects"] == {"bad_truth": 1} and prepared.values["tasks"] == {"train": 2, "val": 1}
    (listed,) = [json.loads(line) for line in (prepared.folder / "rejects.jsonl").read_text().splitlines()]
    assert listed["line"] == 4 and "no answer could be judged: " in listed["detail"]
    with pytest.raises(UserError, match="line 1: no answer could be judged"):
        prepare_tasks(TaskFiles(rows_file(tmp_path / "alone.jsonl", [row]), val_rows=0), tmp_path / "none")


def test_every_lost_row_is_counted_by_its_reason_and_listed_with_its_line(tmp_path):
    prepared = prepare_tasks(TaskFiles(rows_file(tmp_path / "rows.jsonl", [*sums(7), *BAD_ROWS.values()]), val_rows=2), tmp_path / "out")
    assert prepared.values["rejects"] == dict.fromkeys(BAD_ROWS, 1)
    listed = [json.loads(line) for line in (prepared.folder / "rejects.jsonl").read_text().splitlines()]
    assert {r["reason"]: r["line"] for r in listed} == {reason: 8 + k for k, reason in enumerate(BAD_ROWS)}
    assert prepared.values["rows"] == 7 + len(BAD_ROWS) == sum(prepared.values["tasks"].values()) + len(listed)
    train_tasks, val_tasks = (read_tasks(path) for path in (prepared.train, prepared.val))
    assert not train_tasks.rejects and [t.truth["expected_answer"] for t in train_tasks.tasks] == list("12345")
    assert [t.truth["expected_answer"] for t in val_tasks.tasks] == list("67"), "the last ones are measured on, in order"


@pytest.mark.parametrize("settings, words", [
    ({"path": ""}, "no tasks are given"),
    ({"path": "none.jsonl"}, "none.jsonl"),
    ({"val_rows": 7}, "nothing is left to train on"),
    ({"val_rows": -1}, "val_rows is -1"),
    ({"sample": 0}, "sample is 0"),
    ({"compat": "nvida"}, "unknown compat"),
    ({"origins": ["DAPO=x"]}, "no file of questions"),
    ({"val_path": "rows.jsonl"}, "trained on"),
    ({"path": "sample", "sample_tasks": 200}, "different tasks"),
    ({"path": "empty.jsonl"}, "empty"),
    ({"path": "chats.jsonl", "val_rows": 0}, "no row is a task"),
])  # fmt: skip
def test_files_and_settings_that_cannot_serve_are_refused_and_leave_nothing(tmp_path, monkeypatch, settings, words):
    monkeypatch.chdir(tmp_path)
    rows_file(tmp_path / "rows.jsonl", sums(7))
    rows_file(tmp_path / "chats.jsonl", [{"messages": []}])
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match=words):
        prepare_tasks(TaskFiles(**{"path": "rows.jsonl", "val_rows": 1} | settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_measured_on_is_not_trained_on(tmp_path):
    train_rows, val_rows = rows_file(tmp_path / "a.jsonl", sums(5)), rows_file(tmp_path / "b.jsonl", sums(2))
    prepared = prepare_tasks(TaskFiles(train_rows, val_path=val_rows), tmp_path / "out")
    assert prepared.values["tasks"] == {"train": 3, "val": 2} and prepared.values["rejects"] == {"in_validation": 2}


def test_the_old_behaviour_makes_numbers_of_answers(tmp_path):
    dapo = [{"prompt": [{"content": "Solve the following.\n\nWhat?\n\nBox it."}], "reward_model": {"ground_truth": "34"}}]
    origin = f"BytedTsinghua-SIA/DAPO-Math-17k={rows_file(tmp_path / 'dapo.jsonl', dapo)}"
    row = {"_hf_placeholder": {"row": 0, "question_template": {"prefix": "Q: "}}, "dataset": "nano_v3_sft_profiled_dapo17k", "agent_ref": MATH}
    path, found = rows_file(tmp_path / "rows.jsonl", [row]), {}
    for compat in ("", "nvidia"):
        prepared = prepare_tasks(TaskFiles(path, val_rows=0, origins=[origin], compat=compat), tmp_path / "out")
        found[compat] = json.loads(Path(prepared.train).read_text())["expected_answer"]
    assert found == {"": "34", "nvidia": 34}


# ---- settings


@pytest.mark.parametrize("override, words", [
    ("grpo.num_generations_per_prompt=1", "nothing to be compared with"),
    ("grpo.num_step=3", "grpo.max_num_steps"),
    ("method=dppo", "did you mean 'dpo'"),
    ("engine=megatron", "unknown engine"),
    ("run.nodes=2", "has one"),
    ("loss_fn.ratio_clip_mn=0.1", "loss_fn.ratio_clip_min"),
    ("policy.megatron_cfg.tensor_parallel=2", "policy.megatron_cfg.tensor_model_parallel_size"),
    ("grpo.batch_size=100", "a batch of 100"),
    ("loss_fn.token_level_loss=3", "true or false"),
    ("dpo.beta=0", "let beta"),
    ("environments=[cod]", "did you mean 'code'"),
    ("validation.generations=1", "at least 2"),
    ("checkpoint.save_interval=-1", "below 0"),
    ("data.val_rows=x", "val_rows"),
    ("curriculum.settings.sigma=0", "sigma"),
])  # fmt: skip
def test_settings_that_cannot_be_meant_are_refused(override, words):
    with pytest.raises(UserError, match=words):
        effective = rl_config("nano3", "tiny", [override])
        RlTraining("m", "t", "o", environments=effective.settings.environments)


def test_names_of_nemo_rl_and_of_older_texts_mean_the_same():
    given = ["grpo.num_iterations=7", "policy.megatron_cfg.optimizer.lr=1e-4", "policy.train_global_batch_size=96", "cluster.num_nodes=1", "policy.generation.top_p=0.9"]
    effective = rl_config("nano3", "tiny", given)
    s = effective.settings
    assert (s.grpo.max_num_steps, s.grpo.lr, s.run.nodes, s.nemo_rl) == (7, 1e-4, 1, {"policy.generation.top_p": 0.9})
    assert any("grpo.num_iterations" in note for note in effective.notes)


def test_published_numbers_come_out_as_published():
    """All keys of the table, from papermill_runs to NeMo RL's configuration."""
    from nemotron_nb.stages.rl import cluster_config

    values = cluster_config(rl_config("nano3").settings).values
    differing = {m.theirs: (values.get(m.theirs), m.published) for m in MAPPED if m.ours != "model" and values.get(m.theirs) != m.published}
    assert not differing and all(values[name] == value for name, value in ONLY_THERE.items())
    assert values["policy.train_global_batch_size"] == 2048
    super_values = cluster_config(rl_config("super3").settings).values
    assert super_values["policy.megatron_cfg.context_parallel_size"] == 8 and super_values["loss_fn.truncated_importance_sampling_type"] == "tis"


def test_there_and_back():
    """Every key of NeMo RL that has a name here leads back to it."""
    here, said_of_it = our_names({m.theirs: m.published for m in MAPPED if m.theirs not in ("grpo.max_num_steps",)}, "x")
    assert not said_of_it and set(here) | {"grpo.max_num_steps"} == {m.ours for m in MAPPED}
    assert nemo_rl_config(here | {"grpo.max_num_steps": 3}).values["grpo.max_num_steps"] == 3


# ---- one gradient


@pytest.fixture
def all_in_float64():
    """Norms and routers too, which the library computes in float32."""
    with exact():
        yield


def in_float64():
    return make_policy(small_model().double(), TOKENIZER, GRPO)


GRPO = GrpoSettings(num_prompts_per_step=3, num_generations_per_prompt=4, max_new_tokens=8, silent_groups="keep")


def gradient(policy):
    found = torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])
    policy.optimizer.zero_grad()
    return found


@pytest.mark.usefixtures("all_in_float64")
def test_micro_batches_do_not_change_the_gradient_of_either_method():
    policy = in_float64()
    answers = draw_and_judge(policy, sample_tasks(3), 0, dataclasses.replace(GRPO, num_generations_per_prompt=8), odd)
    pairs = own_pairs(answers, TOKENIZER, 4)
    reference = [(good - 1.0, bad + 1.0) for good, bad in reference_logp(policy.model, pairs)]
    found = {"grpo": [], "dpo": []}
    for tokens in (10_000, 200, 1):
        policy_gradient(policy, answers, dataclasses.replace(GRPO, micro_batch_tokens=tokens))
        found["grpo"].append(gradient(policy))
        dpo_gradient(policy, pairs, reference, DpoSettings(), tokens)
        found["dpo"].append(gradient(policy))
    for whole, *cuts in found.values():
        assert float(whole.norm()) > 0 and len(pairs) > 3
        assert max(float((cut - whole).norm() / whole.norm()) for cut in cuts) < EXACT


# ---- preferences


@pytest.fixture(scope="module")
def preferences():
    policy = in_float64()
    answers = draw_and_judge(policy, sample_tasks(6), 0, dataclasses.replace(GRPO, num_generations_per_prompt=8), odd)
    return policy, answers, own_pairs(answers, TOKENIZER, 3)


@pytest.mark.usefixtures("all_in_float64")
def test_at_the_reference_the_loss_is_log_2_and_the_fine_tuning_part(preferences):
    policy, _, pairs = preferences
    reference = reference_logp(policy.model, pairs)
    for settings in (DpoSettings(), DpoSettings(beta=0.5), DpoSettings(average=True), DpoSettings(sft_weight=0.0)):
        was = reference_logp(policy.model, pairs, settings.average)
        loss, stats = dpo_gradient(policy, pairs, was, settings)
        assert loss == pytest.approx(math.log(2) + settings.sft_weight * stats.nll / len(pairs), abs=EXACT)
    assert all(good < 0 and bad < 0 for good, bad in reference)
    policy.optimizer.zero_grad()


@pytest.mark.usefixtures("all_in_float64")
def test_the_other_way_round_turns_the_sign_of_the_margin(preferences):
    policy, _, pairs = preferences
    moved = [(good - 3.0, bad + 1.0) for good, bad in reference_logp(policy.model, pairs)]
    swapped = [dataclasses.replace(p, chosen=p.rejected, rejected=p.chosen) for p in pairs]
    settings = DpoSettings(sft_weight=0.0)
    (one, a), (other, b) = (dpo_gradient(policy, ps, refs, settings) for ps, refs in ((pairs, moved), (swapped, [(y, x) for x, y in moved])))
    policy.optimizer.zero_grad()
    assert a.margin == pytest.approx(-b.margin, rel=EXACT) and a.margin == pytest.approx(0.05 * 4.0 * len(pairs), rel=EXACT)
    assert other - one == pytest.approx(a.margin / len(pairs), rel=EXACT), "softplus(m) - softplus(-m) = m"


@pytest.mark.usefixtures("all_in_float64")
def test_the_gradient_of_a_pair_is_that_of_finite_differences(preferences):
    policy, _, pairs = preferences
    pairs, settings = pairs[:2], DpoSettings(beta=0.3)
    reference = [(good - 1.0, bad + 2.0) for good, bad in reference_logp(policy.model, pairs)]
    dpo_gradient(policy, pairs, reference, settings)
    weight = policy.model.lm_head.weight  # the model's routers compute in float32; behind them all is float64
    way = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slope = float((weight.grad * way).sum())

    def difference(step):
        losses = []
        for sign in (1, -2, 1):  # there, to the other side, and back
            with torch.no_grad():
                weight.add_(way, alpha=sign * step)
            losses.append(dpo_gradient(policy, pairs, reference, settings)[0])
        return (losses[0] - losses[1]) / (2 * step)

    coarse, fine = difference(2e-3), difference(1e-3)
    policy.optimizer.zero_grad()
    assert abs(fine - slope) < 0.3 * abs(coarse - slope), "the error is of second order in the step"
    assert abs((4 * fine - coarse) / 3 - slope) < 0.01 * abs(fine - slope), "of fourth order, once that is taken out"


def test_pairs_are_made_of_right_and_wrong_answers_with_their_reason(preferences):
    _, answers, pairs = preferences
    rewards = {(a.task.id, r.member): j.reward for a in answers for r, j in zip(a.rollouts, a.judgements, strict=True)}
    tools = {a.task.id: bool(a.task.tools) for a in answers}
    for pair in pairs:
        task, _, members = pair.name.partition("#")
        good, bad = map(int, members.split("-"))
        assert (rewards[task, good], rewards[task, bad]) == (1.0, 0.0) and pair.reason
        assert pair.category == ("with_tools" if tools[task] else "no_tools")
    assert len({p.name.split("#")[0] + "#" + side for p in pairs for side in p.name.split("#")[1].split("-")}) == 2 * len(pairs)


def test_a_call_to_a_tool_that_nobody_declared_is_a_category_of_its_own():
    from nemotron_nb.rl.grpo import Answers
    from nemotron_nb.rl.rollout import Rollout, Segment
    from nemotron_nb.rl.advantage import value_group

    task = sample_tasks(1, ["no_tool"])[0]
    texts = {1.0: "Hm.\n</think>\nI do not know.<|im_end|>", 0.0: "Hm.\n</think>\n<tool_call>\n<function=lookup>\n</function>\n</tool_call>\n<|im_end|>"}
    prompt = TOKENIZER.encode_pieces([(c.text, True) for c in chunks(task.messages, add_generation_prompt=True)])
    drawn = [TOKENIZER.encode_pieces([(t, True)]) for t in texts.values()]
    rollouts = [Rollout("t", 0, k, (*prompt, *d), (Segment(0, len(prompt), "prompt"), Segment(len(prompt), len(prompt) + len(d), "model")), (0.0,) * len(d), "ended") for k, d in enumerate(drawn)]
    answer = Answers(task, tuple(rollouts), tuple(said(r, "rule") for r in texts), value_group(list(texts), [False, False]))
    (pair,) = own_pairs([answer], TOKENIZER, 4)
    assert pair.category == "hallucination" and "lookup" in pair.reason and "no tool is declared" in pair.reason


ASK, RIGHT, WRONG = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize("row, reason", [
    ({"prompt": "q"}, "no_pair"),
    ([], "no_pair"),
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "tie"),
    ({"context": [ASK], "completions": [{"rank": 0, "completion": [RIGHT]}]}, "not_two"),
    ({"context": [ASK], "completions": [{"rank": 0, "completion": [RIGHT]}] * 3}, "not_two"),
    ({"context": [ASK], "completions": [{"rank": 1, "completion": [RIGHT]}, {"rank": 1, "completion": [WRONG]}]}, "tie"),
    ({"context": [ASK], "completions": [{"rank": True, "completion": [RIGHT]}, {"rank": 0, "completion": [WRONG]}]}, "tie"),
    ({"context": [ASK], "completions": [{"rank": 0, "completion": 3}, {"rank": 1, "completion": [WRONG]}]}, "bad_chat"),
    ({"prompt": None, "chosen": "a", "rejected": "b"}, "bad_chat"),
    ({"prompt": [ASK], "chosen": [{"role": "user", "content": "?"}], "rejected": [WRONG]}, "bad_chat"),
    ({"prompt": [ASK, RIGHT], "chosen": [{"role": "user", "content": "?"}], "rejected": [WRONG]}, "no_answer"),
    ({"chosen": [ASK, RIGHT], "rejected": [ASK, RIGHT]}, "tie"),
    ({"chosen": [ASK, RIGHT], "rejected": [ASK, RIGHT, WRONG]}, "no_answer"),
])  # fmt: skip
def test_rows_that_are_no_pair(row, reason):
    with pytest.raises(BadPair) as error:
        pair_of_row(row, TOKENIZER, "p")
    assert error.value.reason == reason, error.value.detail


def test_text_of_a_pair_gives_no_special_token():
    pair = pair_of_row({"prompt": "<|im_end|>", "chosen": "<|im_end|>\nx", "rejected": "y"}, TOKENIZER, "p")
    trained = [i for i, t in zip(pair.chosen.ids, pair.chosen.trained, strict=True) if t]
    assert trained.count(TOKENIZER.im_end_id) == 1 and trained[-1] == TOKENIZER.im_end_id


# ---- runs


RUN = GrpoSettings(num_prompts_per_step=2, num_generations_per_prompt=4, max_num_steps=5, max_new_tokens=6, max_silent_steps=99)


def training(start, folder, **more):
    """A small run of GRPO whose tasks lie beside its folder."""
    tasks = sample_tasks(6)
    held = [t for t in sample_tasks(6, seed="held") if t.id not in {x.id for x in tasks}][:2]
    files = [rows_file(folder.parent / f"{name}.jsonl", map(task_row, some)) for name, some in (("train", tasks), ("val", held))]
    return RlTraining(str(start), files[0], str(folder), files[1], **{"grpo": RUN, "checkpoint": KeepSection(save_interval=2)} | more)


def left_behind(folder):
    """Everything a run wrote whose bytes must not depend on how often it was ended."""
    lines = [{k: v for k, v in m.items() if k != "seconds"} for m in read_metrics(folder / "metrics.jsonl") if m["kind"] not in ("resume", "paused")]
    files = [p for pattern in ("model/*", "rollouts/*", "ledger/*", "parity.json", "pairs.jsonl", "reference.json") for p in folder.glob(pattern)]
    return lines, {str(p.relative_to(folder)): p.read_bytes() for p in files}


class Killed(Exception):
    """Stands for a power cut."""


@pytest.mark.parametrize("method", ["grpo", "dpo"])
def test_a_run_that_dies_anywhere_ends_with_the_same_bytes(start, tmp_path, monkeypatch, method):
    more = {} if method == "grpo" else {"method": "dpo", "dpo": DpoSettings(solutions=6, min_pairs=4, pairs_per_step=4, max_num_steps=5)}
    whole = training(start, tmp_path / "whole", **more)
    train(whole, judge_one=odd)
    kept, written = MetricsFile.write, []
    for deaths in range(1, 9):
        broken = dataclasses.replace(whole, output_dir=str(tmp_path / "broken"))
        written.clear()

        def dying(self, line, deaths=deaths):
            written.append(line["kind"])
            if len(written) == deaths:
                raise Killed
            kept(self, line)

        monkeypatch.setattr(MetricsFile, "write", dying)
        try:
            train(broken, judge_one=odd)
            break
        except Killed:
            continue
        finally:
            monkeypatch.setattr(MetricsFile, "write", kept)
    assert deaths > 5
    if not (tmp_path / "broken" / "model").exists():
        train(broken, judge_one=odd)
    assert left_behind(tmp_path / "broken") == left_behind(tmp_path / "whole")


LORA = PeftSection(enabled=True, dim=4)


def test_lora_is_trained_beside_the_base_which_is_the_reference_of_preferences(start, tmp_path):
    told = training(start, tmp_path / "run", method="dpo", peft=LORA, dpo=DpoSettings(solutions=6, min_pairs=4, pairs_per_step=4, max_num_steps=3))
    train(told, judge_one=odd)
    lines = [m for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if m["kind"] == "dpo"]
    assert (lines[0]["chosen"], lines[0]["rejected"]) == (0.0, 0.0) and lines[-1]["chosen"] != 0.0, "the model begins as its base"
    base, whole = (build_model(ModelConfig(name=str(p)), TOKENIZER.vocab_size) for p in (start, tmp_path / "run" / "model"))
    kept, found = json.loads((tmp_path / "run" / "reference.json").read_text()), reference_logp(base, read_pairs(tmp_path / "run" / "pairs.jsonl"))
    assert all(abs(a - b) < 1e-3 for one, other in zip(found, kept, strict=True) for a, b in zip(one, other, strict=True))
    adapted = load_adapter(build_model(ModelConfig(name=str(start)), TOKENIZER.vocab_size), tmp_path / "run" / "adapter")
    moved = {n for n, p in whole.named_parameters() if not torch.equal(p, dict(base.named_parameters())[n])}
    assert moved and not any(".experts." in n or "embeddings" in n for n in moved), "what has no pair stands still"
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert float((adapted(ids).logits - whole(ids).logits).abs().max()) < 1e-4, "model/ is the sum of base and adapter"


def test_with_lora_a_penalty_holds_the_model_near_its_base_without_a_second_model(start, tmp_path):
    settings = dataclasses.replace(RUN, max_num_steps=3, lr=0.05, loss_fn=PolicyRules(kl_penalty=0.1))
    config = training(start, tmp_path / "run", peft=LORA, grpo=settings)
    under_way = set_up(config)
    assert under_way.policy.reference is under_way.policy.model
    train(config, judge_one=odd)
    steps = [m for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if m["kind"] == "rl"]
    assert steps[0]["kl_reference"] == 0.0 and steps[-1]["kl_reference"] > 0.0
    again = training(start, tmp_path / "again", peft=LORA, grpo=settings)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "STOP").touch()
    for _ in range(2):
        train(again, judge_one=odd)
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), "a checkpoint keeps the pairs"
    with pytest.raises(UserError, match="other settings: peft"):
        train(dataclasses.replace(again, peft=dataclasses.replace(LORA, alpha=8.0)), judge_one=odd)


@pytest.mark.long
def test_a_process_that_is_killed_goes_on_to_the_same_bytes(start, tmp_path):
    """SIGKILL in the middle of a step, for real."""
    whole = training(start, tmp_path / "whole", grpo=dataclasses.replace(RUN, max_num_steps=8))
    broken = dataclasses.replace(whole, output_dir=str(tmp_path / "broken"))
    for config in (whole, broken):
        Path(config.output_dir).mkdir()
        OmegaConf.save(OmegaConf.create(dataclasses.asdict(config)), Path(config.output_dir) / "train.yaml")
    command = [sys.executable, "-c", "from nemotron_nb.rl.training import main; main()"]
    subprocess.run([*command, str(tmp_path / "whole" / "train.yaml")], check=True, env=ONE_THREAD, timeout=240)
    dying = subprocess.Popen([*command, str(tmp_path / "broken" / "train.yaml")], env=ONE_THREAD)
    deadline = time.monotonic() + 200
    while not any(m.get("step") == 3 and m["kind"] == "rl" for m in read_metrics(tmp_path / "broken" / "metrics.jsonl")):
        assert time.monotonic() < deadline and dying.poll() is None
        time.sleep(0.01)
    dying.send_signal(signal.SIGKILL)
    dying.wait()
    assert not (tmp_path / "broken" / "model").exists()
    subprocess.run([*command, str(tmp_path / "broken" / "train.yaml")], check=True, env=ONE_THREAD, timeout=240)
    assert left_behind(tmp_path / "broken") == left_behind(tmp_path / "whole")


@pytest.mark.parametrize("change, words", [
    ({"grpo": dataclasses.replace(RUN, num_generations_per_prompt=8)}, "other settings: grpo"),
    ({"grpo": dataclasses.replace(RUN, seed=5)}, "other settings: grpo"),
    ({"train": "other"}, "tokenizer or chat template|tasks|given"),
])  # fmt: skip
def test_a_checkpoint_is_not_gone_on_from_under_other_settings_or_tasks(start, tmp_path, change, words):
    config = training(start, tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "STOP").touch()
    train(config, judge_one=odd)
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["kind"] == "paused"
    if "train" in change:
        change = {"train": rows_file(tmp_path / "more.jsonl", map(task_row, sample_tasks(3, seed="more")))}
    with pytest.raises(UserError, match=words):
        train(dataclasses.replace(config, **change), judge_one=odd)


@pytest.mark.parametrize("rows, words", [
    ([], "empty|holds nothing|no task"),
    (["{"], "no tasks: line 1 is not_json"),
    ([{"responses_create_params": {"input": "write"}, "verifier_metadata": {"unit_tests": {"inputs": ["1"], "outputs": ["1"]}}, "agent_ref": {"name": "code_gen"}}], "is off"),
])  # fmt: skip
def test_tasks_that_cannot_be_trained_on_are_refused_before_the_first_draw(start, tmp_path, rows, words):
    config = training(start, tmp_path / "run")
    with pytest.raises(UserError, match=words):
        train(dataclasses.replace(config, train=rows_file(tmp_path / "bad.jsonl", rows)))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_tasks_that_are_measured_on_and_trained_on_are_refused(start, tmp_path):
    config = training(start, tmp_path / "run")
    with pytest.raises(UserError, match="measured on and trained on"):
        train(dataclasses.replace(config, val=config.train))


def test_all_groups_silent_ends_the_run_and_says_why(start, tmp_path):
    config = training(start, tmp_path / "run", grpo=dataclasses.replace(RUN, max_silent_steps=2))
    with pytest.raises(UserError, match="2 steps without a group"):
        train(config, judge_one=lambda task, reply: said(1.0, "all right"))


def test_silent_steps_before_a_stop_count(start, tmp_path):
    """Stopped after each step and gone on with, it ends where it would have ended in one piece."""
    config = training(start, tmp_path / "run", grpo=dataclasses.replace(RUN, max_silent_steps=2))
    right = lambda task, reply: said(1.0, "all right")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "STOP").touch()
    train(config, judge_one=right)
    assert [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "paused"] == [1]
    (tmp_path / "run" / "STOP").unlink(missing_ok=True)
    with pytest.raises(UserError, match="2 steps without a group"):
        train(config, judge_one=right)
    steps = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "rl"]
    assert steps == [1, 2]


# ---- the command


SMALL = ["-c", "tiny", "grpo.num_prompts_per_step=2", "grpo.num_generations_per_prompt=4", "grpo.max_num_steps=2", "grpo.max_new_tokens=6", "data.sample_tasks=6", "data.val_rows=3", "validation.generations=2", "start.careless=false", "grpo.max_silent_steps=9"]


@pytest.fixture(scope="module")
def done(start, tmp_path_factory):
    """A run of the command in a folder of its own."""
    folder = tmp_path_factory.mktemp("command")
    said = nemotron("nano3", "rl", *SMALL, f"model={start}", cwd=folder)
    assert said.returncode == 0, said.stdout + said.stderr
    (run,) = folder.glob("output/nano3/rl/*")
    return folder, run, said.stdout


def test_a_run_ends_with_a_model_a_report_and_a_status(done):
    folder, run, said_aloud = done
    assert read_status(run)["state"] == "done" and (run / "model" / "tokenizer.json").is_file()
    build_model(ModelConfig(name=str(run / "model")), TOKENIZER.vocab_size)
    kinds = [m["kind"] for m in read_metrics(run / "metrics.jsonl")]
    assert kinds == ["start", "rl_valid", "rl", "rl", "rl_valid", "end"]
    assert "2 of 2 steps of GRPO" in said_aloud and "held-out tasks after step 2" in said_aloud
    page = (run / "report.html").read_text()
    for title in ("Before and after", "Reward by environment, and silent groups", "Advantages, token by token", "The ledger", "Sampling against training", "What came from what", "Settings in force"):
        assert f"<h2>{title}</h2>" in page, title
    assert "<script" not in page and "<svg" not in page
    assert write_rl_report(run).read_text() == page, "the report is drawn from the folder alone"


@pytest.mark.long
def test_the_lineage_leads_back_to_tasks_and_start(done, start):
    folder, run, _ = done
    store = Store(folder / "output" / "artifacts")
    made = store.get("ModelArtifact-rl:latest")
    assert made.path == run / "model" and {s.name for s in made.inputs} == {"DataBlendsArtifact-rl", "model"}
    assert "sample tasks" in store.lineage("ModelArtifact-rl").text
    said_aloud = nemotron("nano3", "rl", *SMALL, f"model={run}", "run.label=again", cwd=folder)
    assert said_aloud.returncode == 0, said_aloud.stderr
    again = store.get("ModelArtifact-rl:latest")
    assert {s.uri for s in again.inputs} == {"art://DataBlendsArtifact-rl:v1", "art://ModelArtifact-rl:v1"}


def test_sigterm_leaves_a_run_that_is_preempted_and_goes_on(done, start):
    folder = done[0]
    words = ["nano3", "rl", *SMALL, f"model={start}", "grpo.max_num_steps=4000", "grpo.max_silent_steps=4000", "run.label=long"]
    command = subprocess.Popen([str(Path(sys.executable).with_name("nemotron")), *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ONE_THREAD)
    deadline = time.monotonic() + 240
    while not (found := list(folder.glob("output/nano3/rl/*-long-*/metrics.jsonl"))) or not any(m["kind"] == "rl" for m in read_metrics(found[0])):
        assert time.monotonic() < deadline and command.poll() is None
        time.sleep(0.1)
    command.send_signal(signal.SIGTERM)
    said_aloud, run = command.communicate(timeout=120)[0], found[0].parent
    assert command.returncode == 128 + signal.SIGTERM, said_aloud
    status, last = read_status(run), read_metrics(run / "metrics.jsonl")[-1]
    assert status["state"] == "preempted" and last["kind"] == "paused" and list((run / "checkpoints").glob("step_*"))
    assert f"Go on with: nemotron nano3 rl --resume output/nano3/rl/{run.name}" in said_aloud and not (run / "model").exists()
    error = CliRunner().invoke(app, ["nano3", "rl", "--resume", str(run), "grpo.lr=1"]).exception
    assert isinstance(error, UserError) and "together with --resume" in str(error)


@pytest.mark.long
@pytest.mark.parametrize("more", [["grpo.max_num_steps=6", "genrm.judge=rule"], ["method=dpo", "dpo.max_num_steps=24", "dpo.pairs=pairs.jsonl", "dpo.min_pairs=8", "dpo.pairs_per_step=4"]], ids=["grpo", "dpo"])
def test_two_ranks_by_the_command_line_are_stopped_and_go_on_to_the_same_bytes(start, tmp_path, more):
    """`run.nproc_per_node=2`, in one go and with a SIGTERM on the way: every line, rollout, judgement, pair and weight is the same to the last bit."""
    pairs = [{"prompt": f"What is {n} + 1?", "chosen": f"It is {n + 1}.", "rejected": f"It is {n} times one, or less than that."} for n in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    words = ["nano3", "rl", *SMALL, f"model={start}", *more, "run.nproc_per_node=2"]
    whole = nemotron(*words, "run.label=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    command = [str(Path(sys.executable).with_name("nemotron")), *words, "run.label=broken"]
    dying = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ONE_THREAD)
    deadline = time.monotonic() + 240
    while not (found := list(tmp_path.glob("output/nano3/rl/*-broken-*/metrics.jsonl"))) or not any(m["kind"] in ("rl", "dpo") for m in read_metrics(found[0])):
        assert time.monotonic() < deadline and dying.poll() is None
        time.sleep(0.05)
    dying.send_signal(signal.SIGTERM)
    said_aloud, run = dying.communicate(timeout=240)[0], found[0].parent
    assert dying.returncode == 128 + signal.SIGTERM and read_metrics(run / "metrics.jsonl")[-1]["kind"] == "paused", said_aloud
    again = nemotron("nano3", "rl", "--resume", str(run), cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    (straight,) = tmp_path.glob("output/nano3/rl/*-whole-*/")
    (lines, files), (other_lines, other_files) = left_behind(run), left_behind(straight)
    assert lines == other_lines and files.keys() == other_files.keys() and "model/model.safetensors" in files
    assert not [name for name in files if files[name] != other_files[name] and name != "model/README.md"]  # a card names its run


def test_the_plan_for_a_cluster_shows_nemo_rls_configuration_and_starts_nothing(tmp_path, monkeypatch):
    (tmp_path / "env.toml").write_text(ENV_TOML)
    monkeypatch.chdir(tmp_path)
    shown = CliRunner().invoke(app, ["nano3", "rl", "-c", "default", "--run", "YOUR-CLUSTER", "--dry-run", "run.nodes=16"])
    assert shown.exit_code == 0, shown.exception
    for words in ("NeMo RL was not run", "num_prompts_per_step: 128", "ratio_clip_max: 0.28", "context_parallel_size: 4", "sbatch --nodes=16 --account=YOUR-ACCOUNT", "ray.sub", "run_grpo_nemo_gym.py"):
        assert words in shown.output, words
    for more in (["--run", "YOUR-CLUSTER"], []):
        error = CliRunner().invoke(app, ["nano3", "rl", *more]).exception
        assert isinstance(error, UserError) and "does not start" in str(error) and "--dry-run" in str(error)
    assert [p.name for p in tmp_path.iterdir()] == ["env.toml"]


@pytest.mark.parametrize("stage, words", [
    ("rlvr", ["num_prompts_per_step: 256", "tensor_model_parallel_size: 4"]),
    ("swe1", ["num_prompts_per_step: 64", "train_global_batch_size: 1024", "max_total_sequence_length: 131072", "num_val_generations_per_prompt: 1", "swe_pivot_single_step_tool_use", "invalid_tool_call_advantage: -5.0", "context_parallel_size: 16"]),
    ("swe2", ["num_prompts_per_step: 16", "num_generations_per_prompt: 32", "max_total_sequence_length: 196608", "swebench_openhands_training.yaml", "agent_max_turns: 200", "concurrency: 768", "swebench_agent_timeout: 3600"]),
    ("rlhf", ["comparison_strategy: circular", "reference_policy_kl_penalty: 0.0001"]),
])  # fmt: skip
def test_every_stage_of_super_has_a_configuration_that_is_shown_and_not_started(tmp_path, monkeypatch, stage, words):
    monkeypatch.chdir(tmp_path)
    for asked in (["super3", "rl", stage], ["super3", "rl", "-c", stage]):
        shown = CliRunner().invoke(app, [*asked, "--dry-run"])
        assert shown.exit_code == 0, shown.exception
        assert all(word in shown.output for word in ["NeMo RL was not run", "tool_parser: qwen3_coder", *words]), [w for w in words if w not in shown.output]
    assert isinstance(CliRunner().invoke(app, ["super3", "rl", stage]).exception, UserError) and not list(tmp_path.iterdir())
    source = (Path(nemotron_nb.__file__).parents[1] / "papermill_runs/super3/rl" / f"{stage}.yaml").read_text()
    assert "Source" in source or stage == "rlvr"
    with pytest.raises(UserError, match="did you mean 'policy.megatron_cfg.mtp_num_layers'"):
        rl_config("super3", stage, ["nemo_rl.policy.megatron_cfg.mtp_num_layer=1"])


def test_a_small_run_has_a_plan_with_a_job_script(tmp_path, monkeypatch, start):
    (tmp_path / "env.toml").write_text(ENV_TOML)
    monkeypatch.chdir(tmp_path)
    words = ["super3", "rl", "-c", "tiny", "--batch", "YOUR-CLUSTER", "--dry-run", f"model={start}", "run.nodes=1", "run.nproc_per_node=1"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.exception
    assert "#SBATCH --job-name=nemotron-rl" in shown.output and "nbs/runs/rl.ipynb" in shown.output and "12 tasks x 8" in shown.output


def test_prepared_tasks_are_entered_and_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ask = lambda *words: CliRunner().invoke(app, ["nano3", *words])
    rows_file(tmp_path / "rows.jsonl", [*sums(5), "{"])
    made = ask("data", "prep", "rl", "path=rows.jsonl", "val_rows=2", "output_dir=tasks", "--sample", "6")
    assert made.exit_code == 0 and "not_json" in made.output and "DataBlendsArtifact-rl:v1" in made.output, made.exception
    other = ask("data", "prep", "rl", "path=rows.jsonl", "val_rows=1", "output_dir=tasks").exception
    assert isinstance(other, UserError) and "holds other tasks" in str(other)
    assert ask("data", "prep", "rl", "path=rows.jsonl", "val_rows=1", "output_dir=tasks", "--force").exit_code == 0
    assert "art://mine:v1" in ask("data", "import", "rl", "tasks", "-n", "mine").output
    refused = ask("data", "import", "rl", ".").exception
    assert isinstance(refused, UserError) and "no manifest.json" in str(refused)
    plan = ask("data", "prep", "rl", "--dry-run", "path=rows.jsonl")
    assert plan.exit_code == 0 and "data.path" in plan.output and len(os.listdir("output")) == 1
