"""Instructions: every turn follows all of its own, and a row that breaks one is refused."""

import json
import random

import pytest
from asking import assert_prepared, honest, made_by, reasons, reworded, with_text

from nemotron_nb.rehearsal import Reply
from nemotron_nb.rl.instructions import CHECKS
from nemotron_nb.synth import instruction_following as following
from nemotron_nb.synth.row import PASSED

SCRIPT = following.rehearse_instruction_following


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    made, drops = made_by("instruction_following", honest(SCRIPT), tmp_path_factory.mktemp("honest"), rows=200)
    assert len(made) == 200 and not drops, reasons(drops)
    return made


def test_two_hundred_right_rows_pass(rows):
    assert_prepared(rows)
    assert all(p.status == PASSED for row in rows for p in following.judge_instruction_following(row))
    names = {name for row in rows for turn in row["synth"]["check"]["turns"] for name, *_ in turn}
    assert names == {one.name for group in following.GROUPS.values() for one in group} <= set(CHECKS)


def _breaks(name, arguments, text):
    """The text with one instruction broken."""
    word = (arguments.get("keywords") or arguments.get("forbidden_words") or [arguments.get("keyword")])[0]
    return {
        "keywords:existence": lambda: text.replace(word, "elsewhere"),
        "keywords:frequency": lambda: text.replace(word, "elsewhere", 1).replace(word, "elsewhere", 1) if arguments["frequency"] > 1 else "",
        "keywords:forbidden_words": lambda: f"{word} {text}",
        "punctuation:no_exclamation": lambda: text.replace(".", "!", 1),
        "punctuation:no_comma": lambda: text.replace(" ", ", ", 1),
        "length_constraints:number_sentences": lambda: "One. Two.",
        "length_constraints:number_words": lambda: text + " word" * 200,
        "detectable_format:number_bullet_lists": lambda: text + "\n* one more",
        "detectable_format:title": lambda: text.replace("<<", ""),
        "detectable_content:number_placeholders": lambda: text.replace("[", ""),
        "change_case:english_lowercase": lambda: "Yes. " + text,
        "startend:end_checker": lambda: text + " bye.",
        "detectable_content:postscript": lambda: text.replace("P.", "Q.").replace("p.", "q."),
    }[name]()


def test_every_planted_break_is_refused(rows):
    planted = caught = 0
    for row in rows:
        for turn, drawn in enumerate(row["synth"]["check"]["turns"]):
            for name, arguments, words in drawn:
                spoilt = json.loads(json.dumps(row))
                spoilt["messages"][2 * turn + 1]["content"] = _breaks(name, arguments, row["messages"][2 * turn + 1]["content"])
                unasked = json.loads(json.dumps(row))
                unasked["messages"][2 * turn]["content"] = row["messages"][2 * turn]["content"].replace(words, "")
                for one in (spoilt, unasked):
                    planted += 1
                    caught += any(p.status != PASSED for p in following.judge_instruction_following(one))
    assert planted > 2000 and caught == planted


def test_no_two_instructions_of_a_turn_contradict():
    """The rehearsed model follows any combination, so there is a text that does."""
    for seed in range(600):
        drawn = following.draw_instructions(random.Random(seed), 1, len(following.GROUPS))
        question = "\n".join(words for _, _, words in drawn)
        text = SCRIPT({"messages": [{"role": "user", "content": question}]}, 0, honest=True).content
        assert not following.broken_instructions(text, drawn), (drawn, text)


LIES = {
    "words": (lambda q, r: "Gladly!" if q.startswith("Say") else None, {"request: teacher_invalid"}),
    "too few": (lambda q, r: json.dumps({"requests": ["Write a speech, please."]}) if q.startswith("Say") else None, {"request: teacher_invalid"}),
    "the same twice": (lambda q, r: json.dumps({"requests": ["Write a speech, please."] * 2}) if q.startswith("Say") else None, {"request: teacher_invalid"}),
    "says nothing": (lambda q, r: None if q.startswith("Say") else with_text(r, " "), None),
    "same answer for every question": (lambda q, r: None if q.startswith("Say") else with_text(r, "Very nice thing, really!"), None),
    "cut": (lambda q, r: None if q.startswith("Say") else Reply(None, reasoning="Hm", finish_reason="length"), {"answer: teacher_cut"}),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_every_lie_is_caught(name, tmp_path):
    change, wanted = LIES[name]
    made, drops = made_by("instruction_following", reworded(SCRIPT, change), tmp_path, rows=20, least=3, most=4)
    assert not made and (reasons(drops) == wanted if wanted else all(d["step"] == "answer" for d in drops))


def test_a_turn_that_fails_ends_the_row_at_once(tmp_path):
    asked = []

    def script(body, before):
        asked.append(len(body["messages"]))
        reply = SCRIPT(body, before, honest=True)
        return reply if body["messages"][0]["content"].startswith("Say") else with_text(reply, "Very nice thing, really!")

    made_by("instruction_following", script, tmp_path, rows=5, turns=4, least=4, most=4)
    assert asked.count(1) == 10 and max(asked) == 1  # requests and first turns, and nothing after them
