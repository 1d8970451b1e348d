"""Multiple choice: a key that others do not confirm falls, letters are in balance, spoilt rows are refused."""

import json

import pytest
from asking import assert_prepared, honest, made_by, reasons, reworded, with_text

from nemotron_nb.core import UserError
from nemotron_nb.synth import science
from nemotron_nb.synth.row import PASSED

SCRIPT = science.rehearse_science


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    made, drops = made_by("science", honest(SCRIPT), tmp_path_factory.mktemp("honest"), rows=200)
    assert len(made) == 200 and not drops
    return made


def test_two_hundred_right_rows_pass_in_balance(rows):
    assert_prepared(rows)
    assert all(p.status == PASSED for row in rows for p in science.judge_science(row))
    letters = [row["synth"]["check"]["letter"] for row in rows]
    assert [letters.count(letter) for letter in "ABCD"] == [50] * 4
    assert len({row["messages"][0]["content"] for row in rows}) == 200


def test_planted_wrongs_are_refused(rows):
    planted = caught = 0
    for row in rows:
        letter = row["synth"]["check"]["letter"]
        other = "ABCD"[("ABCD".index(letter) + 1) % 4]
        question, said = (m["content"] for m in row["messages"])
        options = dict(science._OPTION.findall(question))
        for text in (
            (question, said.replace(f"{{{letter}}}", f"{{{other}}}")), (question, said + f" \\boxed{{{other}}}"), (question, "It is so."),
            (question.replace(options[other], options[letter]), said), (question.replace(f"\n{letter}) ", "\n"), said),
        ):  # fmt: skip
            planted += 1
            messages = [{"role": r, "content": t} for r, t in zip(("user", "assistant"), text, strict=True)]
            caught += any(p.status != PASSED for p in science.judge_science(row | {"messages": messages}))
        spoilt = json.loads(json.dumps(row))
        for change in ({"letter": other}, {"letter": "J"}, {"votes": 1}, {"agree": 1}, {"asked": 1}):
            spoilt["synth"]["check"] = row["synth"]["check"] | change
            planted += 1
            caught += any(p.status != PASSED for p in science.judge_science(spoilt))
    assert caught == planted == 2000


def _writes(**change):
    def changed(question, reply):
        if question.startswith("Write"):
            value = json.loads(reply.content)
            return with_text(reply, json.dumps(value | {k: v(value) for k, v in change.items()}))

    return reworded(SCRIPT, changed)


def _answers(act):
    count = iter(range(10**6))
    return reworded(SCRIPT, lambda q, r: None if q.startswith("Write") else with_text(r, act(q, next(count))))


LIES = {
    "wrong key": (_writes(right=lambda v: v["wrong"][0], wrong=lambda v: [v["right"], *v["wrong"][1:]]), "answer: key_disagrees"),
    "options repeat": (_writes(wrong=lambda v: [v["right"] + ".", *v["wrong"][1:]]), "write: teacher_invalid"),
    "all of the above": (_writes(wrong=lambda v: ["All of these", *v["wrong"][1:]]), "write: teacher_invalid"),
    "too few options": (_writes(wrong=lambda v: v["wrong"][:2]), "write: teacher_invalid"),
    "all agree and are wrong": (_answers(lambda q, i: r"\boxed{J}"), "answer: key_disagrees"),
    "no box": (_answers(lambda q, i: "B"), "answer: no_answer"),
    "two boxes": (_answers(lambda q, i: r"\boxed{A} \boxed{B}"), "answer: no_answer"),
    "words": (reworded(SCRIPT, lambda q, r: "A question!"), "write: teacher_invalid"),
}


@pytest.mark.parametrize("name", LIES)
def test_every_lie_is_caught(name, tmp_path):
    script, wanted = LIES[name]
    made, drops = made_by("science", script, tmp_path, rows=8)
    assert not made and reasons(drops) == {wanted}


def test_ties_and_differences_are_no_answer(tmp_path):
    def script(body, before):
        seed = body.get("seed", 0)
        asked = body["messages"][0]["content"].startswith("Write")
        return SCRIPT(body, before, honest=True) if asked else f"\\boxed{{{'ABCD'[seed % 2]}}}"

    _, drops = made_by("science", script, tmp_path / "a", rows=4, answers=4, agree=2)
    assert reasons(drops) == {"answer: tie"} and len(drops) == 4
    _, drops = made_by("science", script, tmp_path / "b", rows=4, answers=3, agree=3)
    assert reasons(drops) == {"answer: no_agreement"}


def test_more_options_and_one_topic(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"topic": "tides", "license": "CC0-1.0"}\n')
    more = _writes(wrong=lambda v: [*v["wrong"], "0 x", "1 x"])
    made, _ = made_by("science", more, tmp_path / "a", rows=40, options=6, seeds=str(tmp_path / "t.jsonl"), seed_field="topic")
    assert len(made) == 40 and {row["synth"]["about"]["letter"] for row in made} == set("ABCDEF")  # 15 combinations, asked again
    with pytest.raises(UserError, match="did you mean 'topic'"):
        made_by("science", more, tmp_path / "b", rows=4, seeds=str(tmp_path / "t.jsonl"), seed_field="topics")
