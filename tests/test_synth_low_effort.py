"""Low effort: thoughts are short, answers are right, rows are marked, and a server that does not obey is found out."""

import json

import pytest
from asking import assert_prepared, honest, made_by, reasons, reworded, with_text

from nemotron_nb.core import UserError
from nemotron_nb.data.records import parse_conversation
from nemotron_nb.rehearsal import Reply
from nemotron_nb.synth import low_effort
from nemotron_nb.synth.ask import REHEARSAL, ModelSection
from nemotron_nb.synth.row import PASSED

SCRIPT = low_effort.rehearse_low_effort
TEACHER = ModelSection(REHEARSAL, retries=0, concurrency=4, options=dict(low_effort.LOW))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    made, drops = made_by("low_effort", honest(SCRIPT), tmp_path_factory.mktemp("honest"), rows=205, answers=2, teacher=TEACHER)
    assert len(made) >= 200 and reasons(drops) <= {"distinct: same_chat"}
    return made


def test_two_hundred_right_rows_pass_and_say_that_they_are_low_effort(rows):
    assert_prepared(rows)
    assert all(p.status == PASSED for row in rows for p in low_effort.judge_low_effort(row))
    assert all(parse_conversation(row).low_effort is True for row in rows)


def test_planted_wrongs_are_refused(rows):
    changes = [
        lambda r: r.pop("low_effort"), lambda r: r.update(low_effort="true"), lambda r: r["messages"][1].update(reasoning_content="Hm. " * 61),
        lambda r: r["messages"][1].update(content="Hm. " * 61 + "\n" + r["messages"][1]["content"]),
        lambda r: r["messages"][1].update(content=r["messages"][1]["content"] + "0"), lambda r: r["messages"][1].update(content="It is 7."),
        lambda r: r["synth"]["check"].update(votes=0), lambda r: r["synth"]["check"].update(needed=0),
        lambda r: r["messages"][1].update(content="Answer: 1\n" + r["messages"][1]["content"]),
    ]  # fmt: skip
    for row in rows:
        for change in changes:
            spoilt = json.loads(json.dumps(row))
            change(spoilt)
            assert any(p.status != PASSED for p in low_effort.judge_low_effort(spoilt)), change


def _says(act):
    count = iter(range(10**6))
    return reworded(SCRIPT, lambda q, r: with_text(r, act(next(count))))


LIES = {
    "wrong": (_says(lambda i: "Answer: -1"), "answer: other_answer"),
    "no line": (_says(lambda i: "It is 7."), "answer: other_answer"),
    "long thought": (reworded(SCRIPT, lambda q, r: Reply(r.content, reasoning="Let me think about it once more. " * 20)), "answer: long_thought"),
    "thinks aloud": (reworded(SCRIPT, lambda q, r: with_text(r, "Let me think about it once more. " * 20 + "\n" + r.content)), "answer: long_thought"),
    "cut": (reworded(SCRIPT, lambda q, r: Reply(None, reasoning="Hm", finish_reason="length")), "answer: teacher_cut"),
}


@pytest.mark.parametrize("name", LIES)
def test_every_lie_is_caught(name, tmp_path):
    script, wanted = LIES[name]
    made, drops = made_by("low_effort", script, tmp_path, rows=6, teacher=TEACHER)
    assert not made and reasons(drops) == {wanted}


def test_without_a_known_answer_answers_must_agree(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"text": "What floats?"}\n{"text": "What sinks?"}\n')
    given = {"rows": 3, "seeds": str(tmp_path / "q.jsonl"), "teacher": TEACHER}
    made, drops = made_by("low_effort", _says(lambda i: "Answer: cork"), tmp_path / "a", **given)
    assert len(made) == 2 and reasons(drops) == {"answer: question_came_before"} and made[0]["synth"]["check"]["votes"] == 3
    _, drops = made_by("low_effort", _says(lambda i: f"Answer: {i}"), tmp_path / "b", **given)
    assert "answer: no_agreement" in reasons(drops)
    tie = lambda body, before: f"Answer: {body.get('seed', 0) % 2}"  # noqa: E731
    _, drops = made_by("low_effort", tie, tmp_path / "c", **given, answers=4)
    assert "answer: tie" in reasons(drops)


@pytest.mark.parametrize(("data", "words"), [(b"", "empty"), (b'{"text": "\xff"}\n', "not_utf8"), (b'{"q": "x"}\n', "no row has")])
def test_bad_files_stop(data, words, tmp_path):
    (tmp_path / "q.jsonl").write_bytes(data)
    with pytest.raises(UserError, match=words):
        made_by("low_effort", honest(SCRIPT), tmp_path / "run", rows=2, seeds=str(tmp_path / "q.jsonl"), teacher=TEACHER)
