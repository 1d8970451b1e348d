"""Work at a terminal: executed in the sandbox or not at all, and refused when anything in it is not so."""

import json
import random
import shutil

import pytest
from synth_rows import configs_of, made, prepared, reason, reasons, right, spoilt

from nemotron_nb.core import UserError
from nemotron_nb.synth import terminal
from nemotron_nb.synth.steps import Fallen
from nemotron_nb.synth.terminal import SKILLS, TerminalSettings, judge_terminal, result_text, run_session

sandboxed = pytest.mark.skipif(shutil.which("bwrap") is None, reason="needs bubblewrap")
MAKERS = [maker for makers in SKILLS.values() for maker in makers]


def rows(least=18):
    return right("terminal", least, least + least // 4)


@sandboxed
def test_right_rows_pass_and_are_prepared(tmp_path):
    assert reasons("terminal", rows()) == {"": len(rows())}
    prepared(rows(), tmp_path)


@sandboxed
@pytest.mark.long
def test_two_hundred_right_rows_pass():
    assert set(reasons("terminal", rows(200))) == {""}


@sandboxed
@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_the_commands_do_what_python_says(maker):
    exercise = maker(random.Random(maker.__name__))
    session = run_session(exercise.files, [command for _, command in exercise.commands])
    assert session.tree == exercise.expected
    assert exercise.answer in "\n".join(printed for _, printed in session.outputs)
    assert all(code in (0, 1) for code, _ in session.outputs)


def another_output(row):
    row["messages"][-2]["content"] += "."


def do_nothing(row):
    if row["synth"]["check"]["asks"]:
        return False
    del row["messages"][1:-1]


def answer_unseen(row):
    if not row["synth"]["check"]["asks"]:
        return False
    row["synth"]["check"]["answer"] = "zebra"
    row["messages"][-1]["content"] = "Answer: zebra"


def another_answer(row):
    row["messages"][-1]["content"] += "!"


def another_question(row):
    row["messages"][0]["content"] += " Or do not."


def a_result_lost(row):
    del row["messages"][2]


def a_file_changed(row):
    files = row["synth"]["check"]["files"]
    name = next(n for n, text in files.items() if isinstance(text, str))
    files[name] += "one line more\n"


def a_file_expected_that_is_not_there(row):
    row["synth"]["check"]["expected"]["extra.txt"] = ""


def remove_all(row):
    call = row["messages"][-3]["tool_calls"][0]["function"]
    call["arguments"] = json.dumps({"command": "rm -rf ./*; " + json.loads(call["arguments"])["command"]})


WRONGS = {
    another_output: {"other_output"}, do_nothing: {"other_state"}, another_answer: {"wrong_answer"},
    answer_unseen: {"answer_never_printed"}, another_question: {"other_question"}, a_result_lost: {"calls_without_results"},
    a_file_changed: {"other_output", "other_state"}, a_file_expected_that_is_not_there: {"other_state"},
    remove_all: {"other_output", "other_state"},
}  # fmt: skip


@sandboxed
@pytest.mark.parametrize("spoil", WRONGS, ids=lambda spoil: spoil.__name__)
def test_planted_wrongs_are_refused(spoil):
    wrong = spoilt(rows(), spoil)[:4]
    assert len(wrong) >= 2
    assert set(reasons("terminal", wrong)) <= WRONGS[spoil]


@sandboxed
def test_commands_cannot_leave_their_folder(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("treasure")
    commands = [f"cat {secret}", "cat ../../*/secret /root/.bashrc /work/*", "touch /usr/x /etc/x", "cat < /dev/tcp/127.0.0.1/22", "sleep 30", "yes | head -c 90000"]
    session = run_session({}, commands, 1.0)
    outputs = [result_text(*output) for output in session.outputs]
    assert "treasure" not in "".join(outputs) and session.tree == {}
    assert outputs[4] == "[out of time]" and len(outputs[5]) <= terminal.MOST_OUTPUT
    assert all("exit status" in text for text in outputs[:4])


def test_without_a_sandbox_nothing_is_executed(monkeypatch):
    monkeypatch.setattr(terminal.shutil, "which", lambda name: None)
    monkeypatch.setattr(terminal, "run_program", lambda *a: pytest.fail("executed outside of the sandbox"))
    assert run_session({}, ["touch x"]) is None
    fallen = made("terminal", 3, seed=99)
    assert all(isinstance(m, Fallen) and m.reason in ("no_sandbox", "no_one_answer") for m in fallen)
    row = {"messages": [{"role": "user", "content": "x"}], "synth": {"check": {"words": "x", "files": {}}}}
    assert [(p.status, p.reason) for p in judge_terminal(row)] == [("unverified", "no_sandbox")]


def test_settings():
    assert {kind: settings.rows for kind, settings in configs_of("terminal").items()} == {"default": 5000, "tiny": 40}
    for bad in ({"skills": ("x",)}, {"skills": ()}, {"slips": 2}):
        with pytest.raises(UserError):
            TerminalSettings(**bad)


@sandboxed
def test_a_row_made_alone_is_the_row_of_the_run():
    from nemotron_nb.synth.steps import Workshop, make_row

    assert make_row("terminal", terminal.STEPS, Workshop(TerminalSettings()), 7, "recipe") == made("terminal", 22)[7]
    assert reason("terminal", rows()[0]) == ""
