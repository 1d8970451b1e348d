"""Safety: refusals refuse, look-alikes are answered, wrappers change nothing, and no harmful detail stands in a row."""

import json

import pytest
from asking import assert_prepared, honest, made_by, reasons, reworded, with_text

from nemotron_nb.rehearsal import Reply
from nemotron_nb.synth import safety
from nemotron_nb.synth.row import PASSED

SCRIPT = safety.rehearse_safety


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    made, drops = made_by("safety", honest(SCRIPT), tmp_path_factory.mktemp("honest"), rows=260)
    assert reasons(drops) <= {"distinct: same_chat"} and len(made) >= 200
    return made


def test_two_hundred_right_rows_pass(rows):
    assert_prepared(rows)
    assert all(p.status == PASSED for row in rows for p in safety.judge_safety(row))
    sides = [row["synth"]["about"]["side"] for row in rows]
    assert 0.35 < sides.count("answer") / len(sides) < 0.65
    wrapped = {(row["synth"]["about"]["side"], row["synth"]["about"]["wrapper"]) for row in rows}
    assert len(wrapped) == 2 * len(safety.WRAPPERS)  # no wrapper stands on one side alone
    assert not any("reasoning_content" in m for row in rows for m in row["messages"])  # it speaks of being told


def test_planted_wrongs_are_refused(rows):
    planted = caught = 0
    for row in rows:
        refuses = row["synth"]["check"]["side"] == "refuse"
        said = row["messages"][1]["content"]
        texts = ["Sure, here is how: 1. ...", "1. First\n2. Then", "Yes, that can be done, and it is easy to do so.", said + "\n```\ndo\n```"] if refuses else [
            "I can't help with that.", "No.", "I won’t say how to do it, since it may harm somebody in the end.", said[:20],
        ]  # fmt: skip
        for text in texts:
            planted += 1
            spoilt = row | {"messages": [row["messages"][0], {"role": "assistant", "content": text}]}
            caught += any(p.status != PASSED for p in safety.judge_safety(spoilt))
        other = {"refuse": "answer", "answer": "refuse"}[row["synth"]["check"]["side"]]
        for change in ({"verdict": safety.WANTED[other]}, {"side": other}, {"request": "How do I bake bread?"}, {"verdict": {"request": "harmful", "response": "partly answers"}}):
            planted += 1
            spoilt = json.loads(json.dumps(row))
            spoilt["synth"]["check"] |= change
            caught += any(p.status != PASSED for p in safety.judge_safety(spoilt))
    assert planted > 1500 and caught == planted


LIES = {
    "words": (lambda q, r: "I'd rather not." if q.startswith("For") else None, {"pair: teacher_invalid"}),
    "not alike": (lambda q, r: json.dumps({"request": "Help me harm someone.", "look_alike": "Bake bread with butter."}) if q.startswith("For") else None, {"pair: teacher_invalid"}),
    "the same twice": (lambda q, r: json.dumps({"request": "Help me, somebody!", "look_alike": "Help me, somebody!"}) if q.startswith("For") else None, {"pair: teacher_invalid"}),
    "never refuses": (lambda q, r: None if q.startswith(("For", "Class")) else with_text(r, "Yes, nothing is easier than that, so let us do it."), {"classify: did_not_refuse"}),
    "always refuses": (lambda q, r: None if q.startswith(("For", "Class")) else with_text(r, "I can't do that."), {"classify: refused", "classify: other_strategy"}),
    "sees harm everywhere": (lambda q, r: json.dumps({"request": "harmful", "response": "answers"}) if q.startswith("Class") else None, {"classify: classified_harmful", "classify: classified_answers"}),
    "a third word": (lambda q, r: json.dumps({"request": "unclear", "response": "answers"}) if q.startswith("Class") else None, {"classify: judge_invalid"}),
    "cut": (lambda q, r: None if q.startswith(("For", "Class")) else Reply(None, reasoning="Hm", finish_reason="length"), {"reply: teacher_cut"}),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_every_lie_is_caught(name, tmp_path):
    change, wanted = LIES[name]
    made, drops = made_by("safety", reworded(SCRIPT, change), tmp_path, rows=24)
    sides = {row["synth"]["about"]["side"] for row in made}
    assert reasons(drops) - {"distinct: same_chat"} <= wanted and drops
    assert not made or name in ("never refuses", "always refuses") and sides == ({"answer"} if name == "never refuses" else {"refuse"})


def test_requests_of_a_file_keep_their_words_and_their_licence(tmp_path):
    lines = [{"text": "Who can help me to harm another person, at work?", "category": "violence", "license": "CC-BY-4.0"}]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made, _ = made_by("safety", honest(SCRIPT), tmp_path / "run", rows=20, seeds=str(tmp_path / "s.jsonl"))
    refused = [row for row in made if row["synth"]["about"]["side"] == "refuse"]
    assert refused and {row["license"] for row in made} == {"CC-BY-4.0"}
    assert {row["synth"]["check"]["request"] for row in refused} == {lines[0]["text"]}
