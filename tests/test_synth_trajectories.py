"""Logs of agents as chats: every form gives the same chat, and what is lost is counted."""

import json
import random

import pytest
from synth_rows import configs_of, made, prepared, reasons, right, spoilt

from nemotron_nb.core import UserError
from nemotron_nb.synth.steps import Fallen
from nemotron_nb.synth.trajectories import FORMS, SAMPLE_LOGS, draw_session, form_of, read_trajectories, trajectory_of


def said(trajectory):
    """What is said and called, without system turns and ids."""
    return [
        (m["role"], m["content"], [(c["function"]["name"], c["function"]["arguments"]) for c in m.get("tool_calls", ())])
        for m in trajectory.messages
        if m["role"] != "system"
    ]


def test_right_rows_pass_and_are_prepared(tmp_path):
    rows = right("trajectories")
    assert reasons("trajectories", rows) == {"": 200}
    prepared(rows, tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_session(form):
    for seed in range(20):
        session = draw_session(random.Random(seed))
        log = SAMPLE_LOGS[form](session)
        assert form_of(log) == form
        wanted = [("user", session.task, [])]
        for text, command, output in session.steps:
            wanted += [("assistant", text, [("run", {"command": command})]), ("tool", output, [])]
        assert said(trajectory_of(log)) == [*wanted, ("assistant", session.final, [])]


def log_of(form, seed=3):
    return json.loads(json.dumps(SAMPLE_LOGS[form](draw_session(random.Random(seed)))))


def test_a_model_that_calls_functions():
    """SWE-agent and mini-SWE-agent with calls in the messages; the thought of the model is kept apart."""
    call = {"id": "c1", "type": "function", "function": {"name": "bash", "arguments": '{"command": "ls"}'}}
    swe = {
        "history": [
            {"role": "user", "content": "Mend it.", "message_type": "observation"},
            {"role": "user", "content": "an example", "is_demo": True},
            {"role": "assistant", "content": "", "thought": "I look.", "action": "ls", "tool_calls": [call], "message_type": "action"},
            {"role": "tool", "content": [{"type": "text", "text": "a.py"}], "message_type": "observation", "tool_call_ids": ["c1"]},
        ],
        "info": {"exit_status": "exit_cost"},
    }
    found = trajectory_of(swe)
    assert said(found)[1:] == [("assistant", "I look.", [("bash", {"command": "ls"})]), ("tool", "a.py", [])]
    assert found.outcome == "exit_cost" and found.lost["demonstration"] == 1
    mini = {
        "messages": [
            {"role": "user", "content": "Mend it."},
            {"role": "assistant", "content": None, "reasoning_content": "Hm.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "a.py"},
        ],
        "trajectory_format": "mini-swe-agent-1.1",
    }
    found = trajectory_of(mini)
    assert found.messages[1]["reasoning_content"] == "Hm." and said(found)[2] == ("tool", "a.py", [])


def test_thoughts_and_tools_of_the_openhands_sdk():
    log = log_of("openhands_sdk")
    tool = {"type": "function", "function": {"name": "run", "description": "d", "parameters": {"type": "object", "properties": {}}}}
    log[0]["tools"] = [tool]
    log[2]["reasoning_content"] = "Hm."
    found = trajectory_of({"history": log})
    assert list(found.tools) == [tool] and "tools_not_declared" not in found.lost
    assert found.messages[2]["reasoning_content"] == "Hm."


def lose_last_result(log):
    rows = log if isinstance(log, list) else log.get("history") or log["messages"]
    index = {"openhands": -2, "openhands_sdk": -3, "swe_agent": -2, "mini_swe_agent": -3, "qwen_code": -2}[form_of(log)]
    if form_of(log) == "qwen_code":  # the parent of the next one is the one before
        rows[-1]["parentUuid"] = rows[-3]["uuid"]
    del rows[index]


@pytest.mark.parametrize("form", ["openhands", "openhands_sdk", "qwen_code"])
def test_a_call_without_result_is_left_out_and_counted(form):
    log = log_of(form)
    whole = trajectory_of(log)
    lose_last_result(log)
    cut = trajectory_of(log)
    assert cut.lost["call_without_result"] == 1
    assert sum(m["role"] == "tool" for m in cut.messages) == sum(m["role"] == "tool" for m in whole.messages) - 1


def test_other_things_that_are_lost_have_reasons():
    log = log_of("openhands")
    log.append({"id": 90, "observation": "run", "content": "of nobody", "tool_call_metadata": {"tool_call_id": "none"}})
    log.append({"id": 91, "observation": "error", "content": "x"})
    log.append({"id": 92, "action": "recall", "args": {}})
    log.append({"id": 93, "action": "message", "source": "user", "args": {"content": ""}})
    lost = trajectory_of(log).lost
    assert {name: lost[name] for name in ("result_without_call", "event_error", "event_recall", "empty_turn")} == dict.fromkeys(
        ("result_without_call", "event_error", "event_recall", "empty_turn"), 1
    )
    qwen = log_of("qwen_code")
    qwen[3]["message"]["parts"].append({"functionCall": {"name": "run", "args": {}}})
    assert trajectory_of(qwen).lost["unreadable_call"] == 1
    qwen[0]["parentUuid"] = qwen[-1]["uuid"]  # a circle of parents
    assert trajectory_of(qwen).messages


@pytest.mark.parametrize("log", [{}, [], {"a": 1}, [{"a": 1}], [1, 2], "text", None, {"messages": []}, {"history": []}])
def test_what_is_no_log(log):
    assert form_of(log) == ""
    with pytest.raises(UserError, match="no log that can be read"):
        trajectory_of(log)


@pytest.mark.parametrize("form", FORMS)
def test_damaged_logs_give_a_chat_or_a_reason_never_a_crash(form):
    """Values of a log are replaced at random; what comes out is in step, whatever it is."""
    from nemotron_nb.synth.trajectories import judge_trajectories

    whole = 0
    for seed in range(150):
        rng, log = random.Random(seed), log_of(form, seed)
        rows = log if isinstance(log, list) else log.get("history") or log["messages"]
        row = rng.choice(rows)
        if rng.random() < 0.4:
            rows.remove(row)
        else:
            row[rng.choice(list(row))] = rng.choice((None, "", "text", [], ["text"]))
        try:
            found = trajectory_of(log)
        except UserError:
            continue
        whole += "damaged_log" not in found.lost
        assert not found.messages or "damaged_log" not in found.lost
        check = {"chat": "", "lost": {}, "fewest_calls": 0}
        proofs = judge_trajectories({"messages": list(found.messages), "tools": list(found.tools), "synth": {"check": check}})
        assert proofs[0].reason == ""
    assert whole > 90


def test_files_and_folders(tmp_path):
    for form in SAMPLE_LOGS:
        log = log_of(form)
        text = "\n".join(map(json.dumps, log)) if form == "qwen_code" else json.dumps(log)
        (tmp_path / f"{form}.jsonl").write_text(text)
    many = "\n".join(json.dumps({"history": log_of("openhands", seed), "instance_id": seed}) for seed in range(3))
    (tmp_path / "output.jsonl").write_text(many + "\n")
    found = list(read_trajectories(tmp_path))
    assert [t.name for t in found if t.name.startswith("output")] == ["output.jsonl:1", "output.jsonl:2", "output.jsonl:3"]
    assert len(found) == 8 and {t.form for t in found} == set(FORMS)
    rows = right("trajectories", 8, logs=str(tmp_path), logs_licence="MIT")
    assert set(reasons("trajectories", rows)) == {""} and {row["license"] for row in rows} == {"MIT"}
    fallen = made("trajectories", 9, logs=str(tmp_path), logs_licence="MIT")[8]
    assert isinstance(fallen, Fallen) and fallen.reason == "no_more_logs"
    only = made("trajectories", 8, logs=str(tmp_path), outcomes=("submitted",))
    assert sorted(m.reason for m in only if isinstance(m, Fallen)) == ["other_outcome"] * 7
    for bad in ("nonsense", ""):
        (tmp_path / "bad.traj").write_text(bad)
        with pytest.raises(UserError, match="bad.traj"):
            list(read_trajectories(tmp_path / "bad.traj"))
    with pytest.raises(UserError, match="no such file"):
        list(read_trajectories(tmp_path / "none"))


def lose_a_result(row):
    del row["messages"][next(i for i, m in enumerate(row["messages"]) if m["role"] == "tool")]


def change_a_word(row):
    row["messages"][-1]["content"] += "."


def lose_a_tool(row):
    row["tools"] = []


def another_id(row):
    next(m for m in row["messages"] if m["role"] == "tool")["tool_call_id"] = "x"


def no_user(row):
    row["messages"] = [m for m in row["messages"] if m["role"] != "user"]


def no_calls(row):
    row["messages"] = [{k: v for k, v in m.items() if k != "tool_calls"} for m in row["messages"] if m["role"] != "tool"]


WRONGS = {
    lose_a_result: {"call_without_result"}, change_a_word: {"changed"}, lose_a_tool: {"tool_not_declared"},
    another_id: {"result_without_call"}, no_user: {"nobody_speaks"}, no_calls: {"too_few_calls"},
}  # fmt: skip


@pytest.mark.parametrize("spoil", WRONGS, ids=lambda spoil: spoil.__name__)
def test_planted_wrongs_are_refused(spoil):
    assert set(reasons("trajectories", spoilt(right("trajectories"), spoil))) == WRONGS[spoil]


def test_settings():
    assert configs_of("trajectories")["tiny"].rows == 200 and configs_of("trajectories")["default"].logs == ""
