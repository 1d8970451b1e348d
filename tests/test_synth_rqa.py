"""Questions of passages: what points at the passage, copies it, or is answered in several ways, falls."""

import json

import pytest
from asking import assert_prepared, honest, made_by, reasons, reworded, with_text

from nemotron_nb.core import UserError
from nemotron_nb.rehearsal import Reply
from nemotron_nb.synth import rqa
from nemotron_nb.synth.ask import REHEARSAL, ModelSection
from nemotron_nb.synth.row import PASSED

SCRIPT = rqa.rehearse_rqa


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    made, drops = made_by("rqa", honest(SCRIPT), tmp_path_factory.mktemp("honest"), rows=200)
    assert len(made) == 200 and not drops
    return made


def test_two_hundred_right_rows_pass_and_are_prepared(rows):
    assert_prepared(rows)
    assert all(p.status == PASSED for row in rows for p in rqa.judge_rqa(row))
    assert {row["synth"]["about"]["kind"] for row in rows} == {"short", "long"}
    assert all(row["messages"][1]["reasoning_content"] for row in rows)


def _spoilt(row, part, change):
    other = json.loads(json.dumps(row))
    change(other["messages"][part] if isinstance(part, int) else other["synth"]["check"])
    return other


def test_planted_wrongs_are_refused(rows):
    planted = caught = 0
    for row in rows:
        passage = row["synth"]["check"]["passage"]
        changes = [
            (0, lambda m: m.update(content="According to the passage above, " + m["content"])),
            (0, lambda m: m.update(content=m["content"] + " What does the given text say?")),
            (0, lambda m: m.update(content=m["content"].replace("?", "."))),
            ("check", lambda c: c["scores"].update(correct=2)),
            ("check", lambda c: c["scores"].pop("complete")),
        ]
        if len(rqa.words(passage)) >= 8:
            changes.append((0, lambda m, p=passage: m.update(content=m["content"] + " " + p)))
        if row["synth"]["check"]["kind"] == "short":
            changes.append((1, lambda m: m.update(content=m["content"] + "1")))
            changes.append((1, lambda m: m.update(content=m["content"].split("Answer:")[0])))
            changes.append(("check", lambda c: c.update(votes=1)))
        for part, change in changes:
            planted += 1
            caught += any(p.status != PASSED for p in rqa.judge_rqa(_spoilt(row, part, change)))
    assert planted > 1200 and caught == planted


def _asks(**said):
    return reworded(
        SCRIPT, lambda q, r: with_text(r, json.dumps({**json.loads(r.content), **said})) if q.startswith("Here is") else None
    )


def _answers(act):
    """Answers by a function of a counter."""
    count = iter(range(10**6))
    return reworded(SCRIPT, lambda q, r: None if q.startswith(("Here is", "Judge")) else with_text(r, act(next(count))))


LIES = {
    "points at the passage": (_asks(question="According to the text, how many boats cross the river each day?"), "inspire: teacher_invalid"),
    "asks nothing": (_asks(question="Say how many boats cross the river."), "inspire: teacher_invalid"),
    "another kind": (_asks(kind="middling"), "inspire: teacher_invalid"),
    "no two agree": (_answers(lambda i: f"Answer: {i}"), "answer: no_agreement"),
    "no line for the answer": (_answers(lambda i: "It is seven."), "answer: no_answer"),
    "two answers in one": (_answers(lambda i: "Answer: 7\nAnswer: 8"), "answer: no_answer"),
    "judge says no": (
        reworded(SCRIPT, lambda q, r: json.dumps(dict.fromkeys(rqa.RUBRIC, 2)) if q.startswith("Judge") else None),
        "judge: complete_too_low",
    ),
    "judge praises": (reworded(SCRIPT, lambda q, r: "Excellent!" if q.startswith("Judge") else None), "judge: judge_invalid"),
    "judge gives five": (
        reworded(SCRIPT, lambda q, r: json.dumps(dict.fromkeys(rqa.RUBRIC, 5)) if q.startswith("Judge") else None),
        "judge: judge_invalid",
    ),
    "cut": (reworded(SCRIPT, lambda q, r: Reply(None, finish_reason="length", reasoning="Hm.")), "inspire: teacher_cut"),
}


@pytest.mark.parametrize("name", LIES)
def test_every_lie_is_caught(name, tmp_path):
    script, wanted = LIES[name]
    made, drops = made_by("rqa", script, tmp_path, rows=12)
    kept = [row for row in made if row["synth"]["check"]["kind"] == "short" or not wanted.startswith("answer")]
    assert not kept and reasons(drops) <= {wanted, "distinct: same_chat"} and wanted in reasons(drops)


def test_a_tie_is_no_answer(tmp_path):
    script = _answers(lambda i: f"Answer: {i % 2}")
    _, drops = made_by("rqa", script, tmp_path, rows=8, answers=4, agree=2, teacher=_one_at_a_time())
    assert "answer: tie" in reasons(drops) and not any("no_agreement" in r for r in reasons(drops))


def _one_at_a_time():
    return ModelSection(REHEARSAL, retries=0, concurrency=1)


def test_the_answerer_sees_the_question_alone(tmp_path):
    seen = []

    def script(body, before):
        seen.append(body["messages"])
        return SCRIPT(body, before, honest=True)

    made, _ = made_by("rqa", script, tmp_path, rows=6)
    questions = {row["messages"][0]["content"] for row in made}
    answered = [m for m in seen if m[0]["content"] in questions]
    assert answered and all(len(m) == 1 for m in answered)
    passages = {row["synth"]["check"]["passage"] for row in made}
    assert not any(p in m[0]["content"] for m in answered for p in passages)


def test_files_of_documents(tmp_path):
    rows = [{"text": f"{'tin ' * 20}{d}{i}. " * 100, "domain": d, "level": "b", "license": "CC0-1.0"} for d, n in (("x", 9), ("y", 1)) for i in range(n)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    made, _ = made_by("rqa", honest(SCRIPT), tmp_path / "a", rows=8, documents=str(tmp_path / "d.jsonl"), characters=400)
    assert sorted(row["synth"]["about"]["domain"] for row in made) == ["x"] * 4 + ["y"] * 4  # not nine to one
    assert len({row["messages"][0]["content"] for row in made}) == 8 and {row["license"] for row in made} == {"CC0-1.0"}
    assert all(len(row["synth"]["check"]["passage"]) <= 400 for row in made)
    (tmp_path / "d.txt").write_text("A plain text on tin.")
    made, _ = made_by("rqa", honest(SCRIPT), tmp_path / "b", rows=2, documents=str(tmp_path / "d.txt"))
    assert {row["synth"]["parents"][0]["name"] for row in made} == {"d.txt"} and "license" not in made[0]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [("d.jsonl", b"", "empty"), ("d.jsonl", b'{"text": "\xff"}\n', "not_utf8"), ("d.txt", b"\xff\xfe\xfa", "not_utf8"), ("d.jsonl", b'{"body": "x"}\n', "no row has")],
)
def test_bad_files_stop_before_a_question(name, data, words, tmp_path):
    (tmp_path / name).write_bytes(data)
    asked = []
    with pytest.raises(UserError, match=words):
        made_by("rqa", lambda b, n: asked.append(b), tmp_path / "run", rows=2, documents=str(tmp_path / name))
    assert not asked
