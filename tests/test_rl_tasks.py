"""Rows, placeholders and verifiers: the round trip, the reasons, the hacks, the guard."""

import json
import random
import threading
import time

import pytest

from nemotron_nb.core import UserError
from nemotron_nb.rl.curriculum import CurriculumSettings, curriculum, shares_of
from nemotron_nb.rl.environments import ENVIRONMENTS, HACKS, environment, hack_table, judge, judge_all
from nemotron_nb.rl.instructions import CHECKS, run_check
from nemotron_nb.rl.judgement import guarded, read_reply, said
from nemotron_nb.rl.placeholders import DAPO, SKYWORK, LostRow, answer_text, bare_question, resolve_all
from nemotron_nb.rl.sample_tasks import KINDS, sample_tasks, write_careless_chats
from nemotron_nb.rl.tasks import FAMILIES, BadTask, Task, parse_task, read_tasks, task_row, write_tasks

TRUTHS = {
    "mathematics": ({"expected_answer": "7"}, r"\boxed{7}"),
    "choice": ({"options": [{"A": "x"}, {"B": "y"}], "expected_answer": "B"}, r"\boxed{B}"),
    "structured": (
        {"schema_str": '{"type": "object", "properties": {"a": {"type": "string"}}}', "schema_type": "json"},
        '{"a": "x"}',
    ),
    "instructions": (
        {"instruction_id_list": ["punctuation:no_comma", "keywords:existence"], "kwargs": [{}, {"keywords": ["lamp"]}]},
        "a lamp",
    ),
    "code": (
        {"verifier_metadata": {"unit_tests": {"inputs": ["2"], "outputs": ["4"]}}},
        "```python\nprint(2 * int(input()))\n```",
    ),
    "workplace": (
        {"ground_truth": [{"name": "remove_email", "arguments": '{"id": "1"}'}]},
        "<tool_call>\n<function=remove_email>\n<parameter=id>\n1\n</parameter>\n</function>\n</tool_call>\n",
    ),
    "long_context": ({"expected_answer": "the Seine"}, "Answer: Seine"),
    "calls": ({"forbid_numbers": True}, "I do not know."),
    "preference": ({"human_ranking": 2.0}, '{"score_1": 4, "score_2": 2, "ranking": 2}'),
}
REPLIES = {name: read_reply(f"x\n</think>\n{right}<|im_end|>") for name, (_, right) in TRUTHS.items()}


def row_of(name, **more):
    agent = {"type": "responses_api_agents", "name": FAMILIES[name].agents[0] + "_simple_agent"}
    tool = {
        "type": "function",
        "name": "f",
        "description": "d",
        "parameters": {"type": "object", "properties": {}},
        "strict": False,
    }
    return {
        "responses_create_params": {"input": [{"role": "user", "content": "What is it?"}], "tools": [tool]},
        **TRUTHS[name][0],
        "agent_ref": agent,
        "other": [1, None],
        **more,
    }


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "chat"])  # a chat has no right answer
def test_a_row_comes_back_and_its_right_answer_is_paid(name):
    task, repairs = parse_task(row_of(name, pass_rate=0.25))
    assert (task.environment, repairs, task_row(task)) == (name, (), row_of(name, pass_rate=0.25))
    found = judge(task, REPLIES[name], switched_on=["code"])
    assert (found.status, found.reward) == ("judged", 1.0), found
    assert (
        judge(task, read_reply(REPLIES[name].text.removesuffix("<|im_end|>")), ["code"]).reward == 0.0
    )  # a turn without an end


@pytest.mark.parametrize(
    "name,more,answer,rule",
    [
        ("mathematics", {}, r"\boxed{8}, no, \boxed{7}", "no_box"),
        ("choice", {"grading_mode": "lenient_answer_colon"}, "Answer: A\nAnswer: B", "lenient_answer_colon"),
        ("choice", {"template_metadata": {"output_regex": r"take (\w)"}}, "I take A, no, I take B", "output_regex"),
        ("long_context", {}, "Answer: the Loire\nAnswer: the Seine", "answer_line"),
        ("structured", {}, '{"a": ""}', "hollow"),
    ],
)
def test_an_answer_that_hedges_or_says_nothing_is_not_paid(name, more, answer, rule):
    found = judge(parse_task(row_of(name, **more))[0], read_reply(f"x\n</think>\n{answer}<|im_end|>"))
    assert (found.status, found.reward, found.rule) == ("judged", 0.0, rule)


@pytest.mark.parametrize("value", ["34", "1.50", "true", "1e400", "null", "[]", "007"])
def test_answers_stay_text(value):
    assert parse_task(row_of("mathematics", expected_answer=value))[0].truth["expected_answer"] == value
    assert answer_text(value, DAPO) == value


def test_numbers_become_their_digits_and_are_counted():
    assert [
        parse_task(row_of("mathematics", expected_answer=v))[0].truth["expected_answer"] for v in (34, -2, 0.5)
    ] == ["34", "-2", "0.5"]
    assert parse_task(row_of("mathematics", expected_answer=34))[1] == ("number_as_text",)


@pytest.mark.parametrize(
    "changes,reason",
    [
        ({"expected_answer": None}, "missing_truth"), ({"expected_answer": ""}, "bad_truth"), ({"expected_answer": True}, "bad_truth"), ({"expected_answer": ["3"]}, "bad_truth"),
        ({"responses_create_params": {}}, "no_input"), ({"responses_create_params": None}, "no_input"), ({"responses_create_params": {"input": [{"role": "user"}]}}, "bad_message"), ({"responses_create_params": {"input": [3]}}, "bad_message"),
        ({"responses_create_params": {"input": "x", "tools": [{"name": 3}]}}, "bad_tool"), ({"agent_ref": {"name": "chess"}}, "unknown_environment"), ({"agent_ref": None}, "unknown_environment"),
        ({"pass_rate": 1.01}, "bad_pass_rate"), ({"pass_rate": "0.5"}, "bad_pass_rate"), ({"pass_rate": True}, "bad_pass_rate"), ({"_hf_placeholder": {"row": 1}}, "placeholder"), ({"_hf_placeholder": {}, "question": "x"}, "placeholder_and_question"),
    ],
)  # fmt: skip
def test_rows_that_are_no_tasks(changes, reason):
    with pytest.raises(BadTask) as error:
        parse_task(row_of("mathematics") | changes)
    assert error.value.reason == reason and error.value.detail


def test_files(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [row_of("mathematics"), row_of("mathematics"), [], row_of("choice")]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) + "{\n")
    found = read_tasks(path)
    assert [(r.line, r.reason) for r in found.rejects] == [
        (2, "duplicate_task"),
        (3, "not_an_object"),
        (5, "not_json"),
    ] and len(found.tasks) == 2
    assert [t.id for t in read_tasks(write_tasks(tmp_path / "again.jsonl", found.tasks)).tasks] == [
        t.id for t in found.tasks
    ]


def test_placeholders_lose_nothing_in_silence():
    framed = "Solve the following math problem step by step.\n\nQ1\n\nQ2\n\nRemember."
    assert bare_question(framed, DAPO) == "Q1\n\nQ2" and bare_question("a\n\nb\n\nc", DAPO, "nvidia") == "b"
    for prompt in ("a\n\nb\n\nc", "a"):
        with pytest.raises(LostRow):
            bare_question(prompt, DAPO)
    assert [answer_text(x, DAPO, "nvidia") for x in ("34", "1.50", "[]", "x")] == [34, 1.5, [], "x"]
    for stored in ("", None, 3):
        with pytest.raises(LostRow):
            answer_text(stored, DAPO)
    for stored in ("x", "[]", "[3]", '{"a": 1}'):
        with pytest.raises(LostRow):
            answer_text(stored, SKYWORK)
    shelf = [{"prompt": [{"content": framed}], "reward_model": {"ground_truth": "34"}}, {"prompt": []}]
    place = lambda **p: {
        "_hf_placeholder": {"row": 0, "question_template": {"prefix": "<", "suffix": ">\n\n"}} | p,
        "dataset": "nano_v3_sft_profiled_dapo17k",
    }
    rows = [
        (1, place()),
        (2, place(row=1)),
        (3, place(row=9)),
        (4, place(row=-1)),
        (5, place(row=True)),
        (6, place(question_template=None)),
        (7, place() | {"dataset": "x"}),
        (8, {"question": "plain"}),
        (9, place() | {"question": "x"}),
    ]
    found, lost = resolve_all(rows, lambda origin, n: shelf[n])
    assert [line for line, _ in found] == [1, 8] and found[0][1]["responses_create_params"]["input"][0][
        "content"
    ] == "<Q1\n\nQ2>"
    assert [r.reason for r in lost] == [
        "missing_field",
        "row_out_of_range",
        "bad_placeholder",
        "bad_placeholder",
        "bad_template",
        "unknown_dataset",
        "placeholder_and_question",
    ]
    with pytest.raises(UserError, match="nvidia"):
        resolve_all([], lambda *a: {}, compat="nvida")


def test_hacks_earn_nothing():
    samples = [
        (parse_task(row_of(name))[0], right) for name, (_, right) in TRUTHS.items() if name not in ("code", "calls")
    ]
    table = hack_table(samples)
    assert all(row == {"right": 1.0, **dict.fromkeys(HACKS, 0.0)} for row in table.values()), table


def test_a_failed_verification_is_a_status():
    late = lambda task, reply: said(time.sleep(5) is None, "sleep")
    task, reply = parse_task(row_of("mathematics"))[0], REPLIES["mathematics"]
    for verifier in (late, lambda t, r: 1 / 0, lambda t, r: said(2, "two"), lambda t, r: None):
        found = guarded(verifier, task, reply, 0.2)
        assert (found.status, found.reward) == ("failed", None) and found.detail and found.milliseconds < 2000
    aside = []
    thread = threading.Thread(target=lambda: aside.append(guarded(late, task, reply, 0.2)))
    thread.start()
    thread.join()
    assert aside[0].status == "failed" and "within 0.2 s" in aside[0].detail


def test_garbage_neither_raises_nor_pays():
    rng = random.Random(1)
    parts = [
        r"\boxed{",
        "}",
        "{",
        "<tool_call>\n",
        "<function=remove_email>\n",
        "<parameter=id>\n",
        "\x00",
        "\ud83d",
        "Answer:",
        "\n",
        "***",
        "[",
        "#",
        '"',
        "9" * 500,
        "</think>",
        "<think>",
        "```",
        "\\frac{1}{0}",
        "(" * 500,
    ]
    pairs = [
        (
            parse_task(row_of(name))[0],
            read_reply("".join(rng.choices(parts, k=rng.randrange(50))) + "<|im_end|>" * rng.randrange(2)),
        )
        for name in TRUTHS
        if name not in ("code", "calls")
        for _ in range(40)
    ]
    found = judge_all(pairs)
    assert all(j.status == "judged" and j.reward == 0.0 and j.milliseconds < 5000 for j in found)
    assert [j.reward for j in judge_all(pairs[:3], workers=2)] == [0.0] * 3


def test_environments_that_are_off_or_unknown():
    assert not ENVIRONMENTS["code"].on
    with pytest.raises(UserError, match="is off"):
        environment("code")
    with pytest.raises(UserError, match="mathematics"):
        environment("mathematic")


def test_unknown_checks_and_odd_truths_fail():
    ask = lambda name, **truth: judge(Task("t", name, (), truth=truth), REPLIES["instructions"])
    assert ask("instructions", instruction_id_list=["x:y"], kwargs=[{}]).status == "failed"
    assert ask("instructions", instruction_id_list=["punctuation:no_comma"] * 2, kwargs=[{}]).status == "failed"
    assert ask("choice", options=[{"A": "x"}, {"A": "y"}], expected_answer="A").status == "failed"
    assert ask("structured", schema_str='{"type": 3}').status == "failed"
    assert ask("workplace", ground_truth=[{"name": "fly", "arguments": {}}]).status == "failed"
    assert len(CHECKS) >= 40
    with pytest.raises(LookupError, match="no_comma"):
        run_check("punctuation:no_coma", "a", {})


def test_sample_tasks_and_careless_chats(tmp_path):
    tasks = sample_tasks(30)
    assert tasks == sample_tasks(30) and {t.extra["kind"] for t in tasks} == set(KINDS)
    assert all(bool(t.tools) == (t.extra["kind"] == "tool") for t in tasks)
    lines = write_careless_chats(tmp_path / "c.jsonl", 50).read_text().splitlines()
    chats = [json.loads(line) for line in lines]
    undeclared = [c for c in chats if "tools" not in c and c["messages"][-1].get("tool_calls")]
    assert len(chats) == 50 and 0 < len(undeclared) < 25


def test_curriculum_follows_what_was_asked():
    rng = random.Random(0)
    supply = [
        Task(str(i), "mathematics", (), pass_rate=round(rng.betavariate(1, 3) * 16) / 16) for i in range(2000)
    ] + [Task(f"c{i}", "calls", (), pass_rate=0.5) for i in range(100)]
    shares = {"mathematics": 0.7, "calls": 0.3}
    order = curriculum(supply, 10, 10, shares)
    assert (
        order == curriculum(supply, 10, 10, shares)
        and len({t.id for t in order}) == 100
        and all(t.pass_rate < 1 for t in order)
    )
    assert [sum(t.environment == "calls" for t in order[k : k + 10]) for k in range(0, 100, 10)] == [3] * 10
    early, late = ([t.pass_rate for t in o if t.environment == "mathematics"] for o in (order[:30], order[-30:]))
    assert sum(early) / len(early) > 0.55 > 0.45 > sum(late) / len(late)
    plain = [
        t.pass_rate
        for t in curriculum(supply, 10, 10, {"mathematics": 1.0}, CurriculumSettings(density_correction=False))[:30]
    ]
    assert sum(plain) / len(plain) < sum(early) / len(early)
    assert shares_of(7, {"a": 0.5, "b": 0.25, "c": 0.25}) == {"a": 3, "b": 2, "c": 2}
    for wrong in (
        lambda: curriculum(supply, 100, 10, shares),
        lambda: curriculum(supply, 1, 2, {"calls": 0.9}),
        lambda: curriculum([Task("x", "calls", ())], 1, 1, {"calls": 1.0}),
        lambda: CurriculumSettings(sigma=0.0),
        lambda: CurriculumSettings(mean_start=0.2, mean_end=0.8),
    ):
        with pytest.raises(UserError):
            wrong()
