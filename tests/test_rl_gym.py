"""Servers of NeMo Gym that fail on purpose, pass rates that are killed, rollouts judged again."""

import dataclasses
import json
import time

import pytest
from test_rl_stage import ASSETS, rows_file, small_model, sums

from nemotron_nb.core import UserError
from nemotron_nb.data.tokenizer import load_tokenizer
from nemotron_nb.rl.grpo import GrpoSettings, make_policy
from nemotron_nb.rl.gym_client import GymClient, GymServer, PracticeServer, gym_servers
from nemotron_nb.rl.judgement import read_reply, said
from nemotron_nb.rl.prepare import TaskFiles, prepare_tasks
from nemotron_nb.rl.profile import PassRate, measure_rates, read_rates, with_rates
from nemotron_nb.rl.tasks import parse_task, read_tasks
from nemotron_nb.rl.training import RlTraining, TaskOrder, ordered, read_training, train
from nemotron_nb.stages.rl import rl_config, with_blend
from nemotron_nb.stages.rl_data import rl_data_config
from nemotron_nb.stages.rl_tools import judge_again, show_rollout
from nemotron_nb.train.checkpoint import export_hf

TASK = parse_task(sums(1)[0])[0]
REPLY = read_reply("x\n</think>\nIt is 1.<|im_end|>")
OK = (200, b'{"reward": 1.0}', 0.0)


def asked(script, reply=REPLY, **settings):
    """(judgement, requests, seconds) of one call."""
    with PracticeServer(script) as server:
        client = GymClient(GymServer(server.url, **{"deadline": 2.0, "retries": 2, "backoff": 0.01} | settings))
        started = time.perf_counter()
        return client(TASK, reply), server.requests, time.perf_counter() - started


@pytest.mark.parametrize("answer, words, attempts", [
    ((500, b"<html>", 0.0), "HTTP 500", 3), ((503, b"", 0.0), "HTTP 503", 3), ((429, b"slow down", 0.0), "HTTP 429", 3), ((422, b"a valid string", 0.0), "valid string", 1),
    ((404, b"", 0.0), "HTTP 404", 1), ((307, b"", 0.0), "HTTP 307", 1), ((200, b"right", 0.0), "no JSON", 1), ((200, b"[" * 10**5, 0.0), "no JSON", 1),
    ((200, b'{"reward": NaN}', 0.0), "reward of nan", 1), ((200, b'{"reward": true}', 0.0), "reward of True", 1), ((200, b'{"reward": 2}', 0.0), "reward of 2", 1),
    ((200, b"[]", 0.0), "reward of None", 1), ((200, b" " * (5 << 20), 0.0), "longer than", 1),
])  # fmt: skip
def test_what_a_server_may_do_is_a_status_and_never_a_zero(answer, words, attempts):
    found, requests, _ = asked(lambda body, n: answer)
    assert (found.status, found.reward, len(requests)) == ("failed", None, attempts) and words in found.detail


def test_a_server_that_hangs_costs_its_deadline_and_one_that_recovers_is_asked_again():
    found, _, seconds = asked(lambda body, n: (200, b"{}", 3.0), deadline=0.3)
    assert found.status == "failed" and seconds < 2.5
    found, requests, _ = asked(lambda body, n: (500, b"", 0.0) if n < 2 else OK)
    assert (found.reward, len(requests)) == (1.0, 3)
    assert requests[0]["expected_answer"] == "1" and requests[0]["response"]["output"][1]["content"][0]["text"] == "It is 1."
    found, _, _ = asked(lambda body, n: OK, reply=read_reply("\ud800 <tool_call>" * 1000))
    assert found.reward == 1.0


def test_a_dead_server_is_left_in_peace_and_a_wrong_row_is_not_its_fault():
    now = [0.0]
    with PracticeServer(lambda body, n: (422, b"", 0.0) if n < 5 else (500, b"", 0.0) if n < 8 else OK) as server:
        client = GymClient(GymServer(server.url, retries=0, strikes=2, quarantine=10), clock=lambda: now[0])
        assert [client(TASK, REPLY).status for _ in range(5)] == ["failed"] * 5 and len(server.requests) == 5
        assert [client(TASK, REPLY).detail[:9] for _ in range(4)] == ["HTTP 500:", "HTTP 500:", "in quaran", "in quaran"]
        now[0] = 11.0
        client(TASK, REPLY), client(TASK, REPLY)
        assert len(server.requests) == 8 and client.counts["spared"] == 3
        now[0] = 30.0
        assert client(TASK, REPLY).reward == 1.0 == client(TASK, REPLY).reward
    closed, _, _ = asked(lambda body, n: OK)
    assert GymClient(GymServer(server.url, retries=0, deadline=1.0))(TASK, REPLY).status == "failed", "nobody listens there"


@pytest.mark.parametrize("said_of", ["mathematics", "maths=http://x", "mathematics=ftp://x", "mathematics=http://u:p@x"])
def test_servers_that_cannot_be_are_refused(said_of):
    with pytest.raises(UserError):
        gym_servers([said_of])
    with pytest.raises(UserError):
        RlTraining("m", "t", "o", gym=[said_of])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one step whose sums are judged by a server: (folder, prepared tasks, requests)."""
    work = tmp_path_factory.mktemp("gym")
    export_hf(small_model(), ASSETS, work / "start")
    prepared = prepare_tasks(TaskFiles(rows_file(work / "rows.jsonl", sums(8)), val_rows=2), work / "tasks")
    grpo = GrpoSettings(num_prompts_per_step=3, num_generations_per_prompt=4, max_num_steps=1, max_new_tokens=8)
    script = lambda body, n: (200, json.dumps({"reward": n % 2}).encode(), 0.0) if n % 5 else (422, b"", 0.0)
    (work / "run").mkdir()
    with PracticeServer(script) as server:
        config = RlTraining(str(work / "start"), prepared.train, str(work / "run"), prepared.val, grpo=grpo, gym=[f"mathematics={server.url}"])
        (work / "run" / "train.yaml").write_text(json.dumps(dataclasses.asdict(config)))
        train(read_training(work / "run" / "train.yaml"))
        return work, prepared, len(server.requests)


def test_a_run_is_judged_by_a_server_and_looked_at_afterwards(run):
    work, prepared, requests = run
    file = work / "run/rollouts/step_000001.jsonl"
    ledger = [json.loads(line) for line in (work / "run/ledger/step_000001.jsonl").read_text().splitlines()]
    assert requests >= 12 and {row["rule"] for row in ledger} == {"gym"} and {row["status"] for row in ledger} == {"judged", "failed"}
    again = judge_again(file)
    different = [k for k, row in enumerate(ledger) if row["reward"] != again.now[k].reward or row["status"] != again.now[k].status]
    assert again.changed == different and len(different) > 2
    shown = again.picture(whole=True).text
    assert "changed" in shown and shown.count(" now") >= 12
    text = show_rollout(file, 2).text
    assert "prompt" in text and "model" in text and "how it was judged" in text
    for bad, words in ((file.parent / "none.jsonl", "no rollouts"), (work / "rows.jsonl", "no rollouts")):
        with pytest.raises(UserError, match=words):
            judge_again(bad)
    with pytest.raises(UserError, match="give 1 to 12"):
        show_rollout(file, 0)


def test_pass_rates_survive_a_kill_and_order_the_next_run(run, tmp_path):
    work, prepared, _ = run
    tokenizer, tasks = load_tokenizer("tiny"), list(read_tasks(prepared.train).tasks)
    settings = GrpoSettings(max_new_tokens=6)
    policy = make_policy(small_model(), tokenizer, settings)
    odd = lambda task, reply: said(len(reply.text) % 2, "length")
    whole = list(measure_rates(policy, tasks, tmp_path / "a.jsonl", settings, 4, "m", odd, portion=99))[-1]
    next(measure_rates(policy, tasks, tmp_path / "b.jsonl", settings, 4, "m", odd, portion=2))
    (tmp_path / "b.jsonl").write_bytes((tmp_path / "b.jsonl").read_bytes()[:-7])  # killed in the middle of a line
    list(measure_rates(policy, tasks, tmp_path / "b.jsonl", settings, 4, "m", odd, portion=2))
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes() and len(whole) == len(tasks)
    with pytest.raises(UserError, match="other pass rates"):
        next(measure_rates(policy, tasks, tmp_path / "a.jsonl", settings, 4, "another model", odd))
    for r in whole:
        low, high = r.interval
        assert r.judged == 4 and 0 <= low <= r.rate <= high <= 1
    order = TaskOrder(on=True, profile=str(tmp_path / "a.jsonl"))
    config = RlTraining("m", "t", "o", grpo=GrpoSettings(num_prompts_per_step=1, max_num_steps=2), curriculum=order)
    asked_of = ordered(tasks, config)
    assert {t.id: t.pass_rate for t in asked_of}.items() <= {r.task: r.rate for r in whole}.items() and len(asked_of) == 2
    assert all(t.pass_rate != 1.0 for t in asked_of)
    other = dataclasses.replace(config, curriculum=dataclasses.replace(order, profile=str(tmp_path / "b.jsonl")))
    assert other.deciding == config.deciding != RlTraining("m", "t", "o", grpo=config.grpo, curriculum=TaskOrder(on=True)).deciding
    unjudged = with_rates(tasks, [PassRate(tasks[0].id, "mathematics", 0, 0, 4)])
    assert [t.pass_rate for t in unjudged] == [None] * len(tasks)
    (tmp_path / "a.jsonl").write_text("{}\n{}\n{}\n")
    with pytest.raises(UserError, match="line 2"):
        read_rates(tmp_path / "a.jsonl")


def test_super_s_blends_are_accepted_and_sections_are_put_once():
    assert with_blend("super3", ["default"], ["rlvr", "grpo.seed=1"]) == (["rlvr"], ["grpo.seed=1"])
    assert with_blend("super3", ["tiny"], ["rlhf"]) == (["tiny", "rlhf"], []) and with_blend("super3", "default", ["rlfh"])[1] == ["rlfh"]
    rlvr, rlhf = (rl_config("super3", name).settings for name in ("rlvr", "rlhf"))
    assert (rlvr.grpo.effort.low_start, rlvr.grpo.effort.low_end, rlvr.grpo.num_prompts_per_step) == (0.02, 0.01, 256)
    assert (rlhf.grpo.num_prompts_per_step, rlhf.grpo.lr, rlhf.grpo.loss_fn.kl_penalty, rlhf.genrm.length.answer) == (128, 1e-6, 1e-4, 0.35)
    assert rl_config("nano3", "tiny", ["curriculum.shares={calls: 0.5, mathematics: 0.5}"]).settings.curriculum.shares == {"calls": 0.5, "mathematics": 0.5}
    told = rl_data_config("nano3", "tiny", ["data.sample=3", "+val_rows=4", "path=a=b", "run.artifacts=x"]).settings
    assert (told.data.sample, told.data.val_rows, told.data.path) == (3, 4, "a=b")
