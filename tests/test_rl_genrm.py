"""Answers compared in a circle: symmetry, ties, lost verdicts and rollouts, length control, judges, and the run of it."""

import dataclasses
import itertools
import json
import math
import random
import time

import pytest
import torch
from precision import FACTOR
from test_rl_stage import ASSETS, TOKENIZER, rows_file, small_model

from nemotron_nb.core import UserError
from nemotron_nb.data.template import chunks
from nemotron_nb.endpoint import Endpoint, rehearsal
from nemotron_nb.endpoint import Reply as Served
from nemotron_nb.ops.run_folder import read_metrics
from nemotron_nb.rl.genrm import Verdict, circular_pairs, no_verdict, points, read_verdict, standings
from nemotron_nb.rl.grpo import GrpoSettings
from nemotron_nb.rl.judge_tasks import agreement, judge_messages, verify_preference
from nemotron_nb.rl.judgement import read_reply
from nemotron_nb.rl.judges import CircleJudge, Duel, GenrmSettings, circle_judge, endpoint_judge, rule_judge, verdicts_within
from nemotron_nb.rl.length_control import SUPER_LENGTH, LengthControl, adjust, bonus_place, centred_weights
from nemotron_nb.rl.prepare import TaskFiles, prepare_tasks
from nemotron_nb.rl.sample_tasks import VERDICT_SLIPS, sample_tasks, write_careless_verdicts
from nemotron_nb.rl.tasks import read_tasks
from nemotron_nb.rl.training import KeepSection, RlTraining, judge_writer, train
from nemotron_nb.stages.rl import rl_config
from nemotron_nb.train.checkpoint import export_hf
from nemotron_nb.train.model import build_model
from nemotron_nb.train.settings import ModelConfig

EPS = 2.0**-52
TASK = sample_tasks(1, ["sum"], "tests")[0]


def turn(answer, thought="Hm."):
    return read_reply(f"{thought}\n</think>\n{answer}<|im_end|>")


def as_verdict(a, b, bias=0.0, ranking=3.0):
    return Verdict(a + bias, b, ranking)


@pytest.mark.parametrize("count", [2, 3, 5, 16])
def test_a_bias_for_a_side_cancels_in_the_circle_and_only_there(count):
    rng = random.Random(count)
    true = [rng.uniform(1, 4) for _ in range(count)]

    def differences(pairs, bias):
        found = [s.reward for s in standings(count, pairs, [as_verdict(true[a], true[b], bias) for a, b in pairs])]
        return [r - found[0] for r in found]

    circle = circular_pairs(count)
    assert sorted(itertools.chain(*circle)) == sorted(2 * list(range(count)))
    for one, other in zip(differences(circle, 0.0), differences(circle, 0.9), strict=True):
        assert abs(one - other) <= FACTOR * 5 * EPS
    if count > 2:
        pairs = list(itertools.combinations(range(count), 2))
        assert max(abs(a - b) for a, b in zip(differences(pairs, 0.0), differences(pairs, 0.9))) > 0.3


def test_swapping_two_answers_swaps_their_points_and_a_tie_is_broken_by_the_ranking_alone():
    for a, b in itertools.product(range(1, 6), repeat=2):
        for ranking in range(1, 7):
            assert points(Verdict(a, b, ranking)) == points(Verdict(b, a, 7 - ranking))[::-1]
            moved = points(Verdict(a, b, ranking)) != (a, b)
            assert moved == (a == b)
    assert points(Verdict(3, 3, 1)) == (5.5, 0.5)


def test_a_lost_verdict_is_no_opinion():
    pairs = circular_pairs(3)
    placed = standings(3, pairs, [Verdict(5, 1, 1), no_verdict("HTTP 500"), Verdict(2, 4, 5)])
    assert [(s.reward, s.failed, s.balanced) for s in placed] == [(4.5, 0, True), (1.0, 1, False), (2.0, 1, False)]
    nobody = standings(2, circular_pairs(2), [no_verdict("gone")] * 2)
    assert [(s.reward, s.why) for s in nobody] == [(None, "gone")] * 2


@pytest.mark.parametrize("text, why", [
    ("", "no object"), ("The first.", "no object"), ('{"score_1": 4, "score_2": 2}', "no ranking"), ("{" * 10**6, "no object"),
    ('{"score_1": NaN, "score_2": 2, "ranking": 2}', "score_1"), ('{"score_1": true, "score_2": 2, "ranking": 2}', "not numbers"),
    ('{"score_1": 4, "score_2": 2, "ranking": 1e400}', "ranking"), ('{"score_1": ' + "9" * 5000 + ', "score_2": 2, "ranking": 2}', ""),
    ("[" * 10**5 + '{"ranking": []}', "no score_1"),
])  # fmt: skip
def test_what_is_no_verdict_is_a_status(text, why):
    started = time.perf_counter()
    found = read_verdict(text)
    assert found.status == "failed" and why in found.detail and time.perf_counter() - started < 5


def test_length_control_adds_up_to_zero_and_its_bonus_may_go_to_nobody():
    rng = random.Random(3)
    for _ in range(50):
        texts = [("t" * rng.randrange(400), "x" * rng.randrange(400)) for _ in range(rng.randrange(1, 17))]
        scores = [rng.uniform(1, 5) for _ in texts]
        found = adjust(scores, texts, SUPER_LENGTH)
        for name in ("thought_length", "answer_length", "style"):
            assert abs(math.fsum(a.parts[name] for a in found)) <= len(texts) * EPS
        bonuses = sum("thought_bonus" in a.parts for a in found), sum("answer_bonus" in a.parts for a in found)
        assert max(bonuses) <= 1
        for score, a in zip(scores, found, strict=True):
            assert abs(a.score - score - math.fsum(a.parts.values())) <= FACTOR * 5 * EPS
    assert centred_weights([7, 7, 7]) == [0.0] * 3 == [a.score for a in adjust([0.0] * 3, [("", "")] * 3, SUPER_LENGTH)]
    assert bonus_place([10, 20], [1.0, 5.0]) is None  # the shortest is not among the best: nobody
    assert [a.score for a in adjust([1.0, 5.0], [("t", "x")] * 2, LengthControl())] == [1.0, 5.0]


def test_an_answer_in_bad_form_is_not_brief():
    judge = CircleJudge(rule_judge(), LengthControl(thought=0.3, answer=0.35))
    truth = TASK.truth["expected_answer"]
    (judged,) = judge.judge_groups([(TASK, [turn(f"It is {truth}."), read_reply("no"), turn("It is 1000 or more.")])])
    assert judged[1].parts["answer_length"] < 0 and judged[1].parts["thought_length"] < 0
    assert judged[0].reward > judged[2].reward > judged[1].reward


def test_a_judge_that_hangs_or_breaks_loses_its_own_verdicts_alone():
    def hangs(duels):
        yield 1, Verdict(4, 2, 2)
        time.sleep(60)

    def breaks(duels):
        yield 0, Verdict(4, 2, 2)
        raise OSError("gone")

    duels = [Duel(TASK, turn("1"), turn("2"))] * 3
    started = time.perf_counter()
    assert [v.status for v in verdicts_within(hangs, duels, 0.2)] == ["failed", "judged", "failed"]
    assert [v.detail for v in verdicts_within(breaks, duels, 60)] == ["", "OSError: gone", "OSError: gone"]
    assert time.perf_counter() - started < 30
    replies = [turn("1"), None, turn("2")]
    (group,) = CircleJudge(rule_judge()).judge_groups([(TASK, replies)])
    assert [j.status for j in group] == ["judged", "failed", "judged"] and "lost" in group[1].detail
    (alone,) = CircleJudge(rule_judge()).judge_groups([(TASK, [turn("1"), None])])
    assert [j.reward for j in alone] == [None, None]


def test_a_server_may_answer_nonsense_errors_and_late():
    def script(body, before):
        shown = body["messages"][1]["content"]
        if "broken" in shown:
            return Served("", 500)
        if "slow" in shown:
            return Served("x", delay=5)
        return "Both are nice." if len(body["messages"]) < 6 else '{"score_1": 1, "score_2": 5, "ranking": 6}'

    duels = [Duel(TASK, turn(word), turn("other")) for word in ("broken", "slow", "good")]
    with rehearsal(script) as served:
        found = dict(endpoint_judge(Endpoint(served.url, "g", retries=0, timeout=1), tries=3)(duels))
    assert [found[k].status for k in range(3)] == ["failed", "failed", "judged"]
    assert "HTTP 500" in found[0].detail and "within 1 s" in found[1].detail and found[2] == Verdict(1, 5, 6)


@pytest.mark.parametrize("settings, words", [
    ({"judge": "rules"}, "did you mean 'rule'"), ({"judge": "endpoint"}, "without base_url"), ({"judge": "model"}, "without model"),
    ({"judge": "rule", "deadline": 0.0}, "limit"), ({"judge": "rule", "tries": 0}, "limit"),
])  # fmt: skip
def test_settings_that_cannot_serve_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        circle_judge(GenrmSettings(**settings))


def test_pairs_become_tasks_in_both_orders_and_what_is_no_pair_is_counted(tmp_path):
    two = {"response1": "12 euros.", "response2": "Lamps!"}
    rows = [
        {"context": [{"role": "user", "content": f"Price of {k}?"}, {"role": "assistant", "content": "?"}, {"role": "user", "content": "Well?"}], **two, "overall_preference": p}
        for k, p in enumerate((-3, 1, 0, 2))
    ]
    bad = [{"context": "x", **two}, rows[0] | {"overall_preference": 9}, two | {"overall_preference": 1}]
    path = rows_file(tmp_path / "pairs.jsonl", [*rows, *bad])
    judge = prepare_tasks(TaskFiles(path, preferences="judge", val_rows=2), tmp_path / "out")
    assert judge.values["tasks"] == {"train": 6, "val": 2} and sum(judge.values["rejects"].values()) == 3
    tasks = read_tasks(judge.train).tasks
    assert [t.truth["human_ranking"] for t in tasks] == [1.0, 6.0, 4.0, 3.0, 3.5, 3.5]
    chat = prepare_tasks(TaskFiles(path, preferences="chat", val_rows=0), tmp_path / "out")
    assert {t.environment for t in read_tasks(chat.train).tasks} == {"chat"} and chat.values["tasks"]["train"] == 5
    with pytest.raises(UserError, match="even"):
        TaskFiles(path, preferences="judge", val_rows=3)
    with pytest.raises(UserError, match="did you mean 'judge'"):
        TaskFiles(path, preferences="judg")


class Killed(Exception):
    """Stands for SIGKILL."""


def test_a_run_is_judged_in_a_circle_measured_by_verifiers_and_resumed_to_the_byte(tmp_path):
    export_hf(small_model(), ASSETS, tmp_path / "start")
    prepared = prepare_tasks(TaskFiles("sample", val_rows=3, sample_tasks=6), tmp_path / "tasks")
    grpo = GrpoSettings(num_prompts_per_step=2, num_generations_per_prompt=4, max_num_steps=3, max_new_tokens=8)
    config = RlTraining(
        str(tmp_path / "start"), prepared.train, str(tmp_path / "straight"), prepared.val, grpo=grpo,
        genrm=GenrmSettings("rule", length=SUPER_LENGTH), checkpoint=KeepSection(save_interval=1),
    )  # fmt: skip
    train(config)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "STOP").touch()
    train(dataclasses.replace(config, output_dir=str(tmp_path / "broken")))
    train(dataclasses.replace(config, output_dir=str(tmp_path / "broken")))
    for name in ("model/model.safetensors", "ledger/step_000003.jsonl", "rollouts/step_000002.jsonl"):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "broken" / name).read_bytes()
    ledger = [json.loads(line) for line in (tmp_path / "straight/ledger/step_000001.jsonl").read_text().splitlines()]
    assert {row["rule"] for row in ledger} == {"circle"} and all("score" in row["parts"] for row in ledger)
    held = [json.loads(line) for line in (tmp_path / "straight/ledger/valid_000000.jsonl").read_text().splitlines()]
    assert "circle" not in {row["rule"] for row in held}, "what is measured is not compared"
    assert any(line["kind"] == "rl" and line["moved"] for line in read_metrics(tmp_path / "straight/metrics.jsonl"))


def test_older_checkpoints_are_gone_on_with_and_the_command_line_reaches_every_setting():
    plain = RlTraining("m", "t", "o")
    assert "genrm" not in plain.deciding and "effort" not in plain.deciding["grpo"]
    assert "genrm" in dataclasses.replace(plain, genrm=GenrmSettings("rule")).deciding
    told = rl_config("nano3", "rlhf", ["genrm.length.answer=0.1", "genrm.judge=endpoint", "genrm.base_url=http://localhost/v1", "genrm.model=g"]).settings.genrm
    assert (told.judge, told.length.answer, told.length.thought) == ("endpoint", 0.1, 0.3)


# ---- a model that judges, and a judge that is trained


def always_the_first(folder):
    """A small model that writes the same verdict whatever it is shown: overfitted in seconds."""
    model = build_model(ModelConfig(hidden_size=64, pattern="ME*M", experts=2), TOKENIZER.vocab_size, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    verdict = {"role": "assistant", "reasoning_content": "Hm.", "content": '{"score_1": 4, "score_2": 2, "ranking": 2}'}
    chats = [[*judge_messages([{"role": "user", "content": "?" * n}], "It is 7.", "abc" * n), verdict] for n in (1, 2, 3)]
    encoded = lambda chat, **how: [i for c in chunks(chat, **how) for i in TOKENIZER.encode_pieces(c.pieces)]
    rows = [(encoded(chat), len(encoded(chat[:-1], add_generation_prompt=True))) for chat in chats]
    for _ in range(25):
        for ids, begin in rows:
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, begin - 1 : -1]
            torch.nn.functional.cross_entropy(logits, torch.tensor(ids[begin:])).backward()
        optimizer.step()
        optimizer.zero_grad()
    export_hf(model, ASSETS, folder)
    return str(folder)


def test_a_model_of_this_house_judges_a_run_and_its_liking_for_a_side_cancels(tmp_path):
    """judge=model: every answer is once first (4) and once second (2), so all earn 3, and nothing moves."""
    export_hf(small_model(), ASSETS, tmp_path / "start")
    judging = GenrmSettings("model", model=always_the_first(tmp_path / "judge"), max_new_tokens=60)
    write = judge_writer(judging)
    said_twice = write([judge_messages([{"role": "user", "content": "2 + 2?"}], "It is 5.", "It is 4.")] * 2)
    assert [read_verdict(text) for text in said_twice] == [Verdict(4, 2, 2)] * 2
    prepared = prepare_tasks(TaskFiles("sample", val_rows=3, sample_tasks=3), tmp_path / "tasks")
    grpo = GrpoSettings(num_prompts_per_step=2, num_generations_per_prompt=3, max_num_steps=1, max_new_tokens=8)
    train(RlTraining(str(tmp_path / "start"), prepared.train, str(tmp_path / "run"), prepared.val, grpo=grpo, genrm=judging))
    ledger = [json.loads(line) for line in (tmp_path / "run/ledger/step_000001.jsonl").read_text().splitlines()]
    assert [(row["rule"], row["status"], row["reward"]) for row in ledger] == [("circle", "judged", 3.0)] * 6
    (line,) = [m for m in read_metrics(tmp_path / "run/metrics.jsonl") if m["kind"] == "rl"]
    assert line["groups"] == {"live": 0, "silent": 2, "unjudged": 0} and not line["moved"]


def test_a_judge_has_tasks_of_its_own_whose_truth_is_the_rule_judges(tmp_path):
    told = rl_config("nano3", "genrm", ["data.sample_tasks=20", "data.val_rows=6"]).settings
    assert told.start.verdicts and told.data.preferences == "judge" and not told.genrm.on
    prepared = prepare_tasks(told.data, tmp_path / "tasks")
    train_tasks, val_tasks = (read_tasks(path).tasks for path in (prepared.train, prepared.val))
    assert (len(train_tasks), len(val_tasks)) == (20, 6) and not {t.id for t in train_tasks} & {t.id for t in val_tasks}
    assert sorted({t.truth["human_ranking"] for t in train_tasks}) == [2.0, 5.0], "each pair in both orders"
    for task in train_tasks:
        first, second = task.messages[1]["content"].split("<answer 2 ")
        assert ("I do not know." in first.split("<answer 1 ")[1]) == (task.truth["human_ranking"] == 2.0)
        right = {2.0: '{"score_1": 5, "score_2": 2, "ranking": 2}', 5.0: '{"score_1": 2, "score_2": 5, "ranking": 5}'}[task.truth["human_ranking"]]
        verdicts = [verify_preference(task, turn(v)) for v in (right, '{"score_1": 3, "score_2": 3, "ranking": 3.5}')]
        assert verdicts[0].reward == 1.0 and agreement(verdicts[:1]) == 1.0


def test_careless_verdicts_are_right_as_often_as_was_designed(tmp_path):
    lines = write_careless_verdicts(tmp_path / "v.jsonl", 300).read_text().splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    right = sum(("I do not know." in c[1]["content"].split("<answer 2 ")[0]) == (json.loads(c[2]["content"])["ranking"] == 2) for c in chats)
    assert abs(right / 300 - (1 - VERDICT_SLIPS)) < 0.1
