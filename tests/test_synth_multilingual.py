"""Translations: code, numbers, links and boxes survive in six languages; what is lost is named; spoilt rows are refused."""

import json
import re

import pytest
from asking import assert_prepared, honest, made_by, reasons, reworded, with_text

from nemotron_nb.core import UserError
from nemotron_nb.synth import multilingual
from nemotron_nb.synth.row import PASSED

SCRIPT = multilingual.rehearse_multilingual


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    made, drops = made_by("multilingual", honest(SCRIPT), tmp_path_factory.mktemp("honest"), rows=204)
    assert len(made) == 204 and not drops, [(d["step"], d["reason"], d["detail"]) for d in drops[:3]]
    return made


def test_two_hundred_right_rows_pass_in_six_languages(rows):
    assert_prepared(rows)
    assert all(p.status == PASSED for row in rows for p in multilingual.judge_multilingual(row))
    languages = [row["synth"]["about"]["language"] for row in rows]
    assert {languages.count(code) for code in multilingual.NAMES} == {34}


CHANGES = {
    "box": lambda s: s.replace("\\boxed{", "\\boxed{1"),
    "box lost": lambda s: re.sub(r"\\boxed\{(\d+)\}", r"\1", s),
    "code": lambda s: s.replace("# the sum", "# la somme"),
    "fence": lambda s: s.replace("```python", "```"),
    "formula": lambda s: s.replace("\\cdot", "+"),
    "inline code": lambda s: s.replace("total(boxes)", "summe(kisten)"),
    "address": lambda s: s.replace("boxes.example", "kisten.example"),
    "number": lambda s: s + " 77",
    "list": lambda s: s.replace("- ", "", 1),
    "line lost": lambda s: "\n".join(s.split("\n")[1:]),
    "English": lambda s: s + "\n\nAnd this is all that there is to say about the price of it, and of what is in the boxes of the house.",
}


def test_planted_wrongs_are_refused(rows):
    planted = caught = 0
    for row in rows:
        for change in CHANGES.values():
            spoilt = json.loads(json.dumps(row))
            spoilt["messages"][1]["content"] = change(spoilt["messages"][1]["content"])
            planted += 1
            caught += any(p.status != PASSED for p in multilingual.judge_multilingual(spoilt))
        for change in ({"meaning": 2}, {"least_score": 0}, {"language": "de" if row["synth"]["check"]["language"] != "de" else "fr"}):
            spoilt = json.loads(json.dumps(row))
            spoilt["synth"]["check"] |= change
            planted += 1
            caught += any(p.status != PASSED for p in multilingual.judge_multilingual(spoilt))
        untranslated = row | {"messages": row["synth"]["check"]["source"]}
        planted += 1
        caught += any(p.status != PASSED for p in multilingual.judge_multilingual(untranslated))
    assert planted == 15 * 204 and caught == planted


def _lines(act):
    def changed(question, reply):
        if question.startswith("Translate"):
            return with_text(reply, json.dumps({"lines": act(json.loads(question.rpartition("\n\n")[2]), json.loads(reply.content)["lines"])}))

    return reworded(SCRIPT, changed)


LIES = {
    "not translated": (_lines(lambda lines, said: lines), {"compare: not_translated", "compare: wrong_language"}),
    "a line fewer": (_lines(lambda lines, said: said[:-1]), {"translate: teacher_invalid"}),
    "same output for every input": (_lines(lambda lines, said: ["Ja."] * len(lines)), {"translate: teacher_invalid"}),
    "two lines in one": (_lines(lambda lines, said: [said[0] + "\n", *said[1:]]), {"translate: teacher_invalid"}),
    "a number more": (_lines(lambda lines, said: [*said[:-1], said[-1] + " 5"]), {"translate: teacher_invalid"}),
    "words": (reworded(SCRIPT, lambda q, r: "Voilà!" if q.startswith("Trans") else None), {"translate: teacher_invalid"}),
    "other meaning": (reworded(SCRIPT, lambda q, r: '{"meaning": 1}' if q.startswith("Does") else None), {"compare: other_meaning"}),
    "judge gives nine": (reworded(SCRIPT, lambda q, r: '{"meaning": 9}' if q.startswith("Does") else None), {"compare: judge_invalid"}),
}


@pytest.mark.parametrize("name", LIES)
def test_every_lie_is_caught(name, tmp_path):
    script, wanted = LIES[name]
    made, drops = made_by("multilingual", script, tmp_path, rows=6)
    assert not made and reasons(drops) <= wanted, reasons(drops)


def test_a_loss_is_named_and_mended(tmp_path):
    told = []

    def script(body, before):
        reply = SCRIPT(body, before, honest=True)
        first = body["messages"][0]["content"]
        if first.startswith("Translate") and len(body["messages"]) == 1:
            said = json.loads(reply.content)["lines"]
            return json.dumps({"lines": [re.sub(r"\d+", "0", line) for line in said]})
        told.extend(m["content"] for m in body["messages"][1:] if m["role"] == "user")
        return reply

    made, drops = made_by("multilingual", script, tmp_path, rows=6)
    assert len(made) == 6 and not drops
    assert any("Keep your translation and mend this: line 1: numbers" in text for text in told)


@pytest.mark.parametrize("text", ["", "```\nonly code\n", "a\n```py\nb\n", '{"a": ["b c", 3, null], "d": {"e": "ff"}}', "[1, 2]", "{not json", "# H\n\n- x\n> yy\n$$a$$"])
def test_a_text_taken_apart_is_the_same_again(text):
    lines, rebuild = multilingual.lines_of(text)
    again = rebuild(lines)
    assert again == text or json.loads(again) == json.loads(text)


def test_chats_of_a_file_with_tools_keep_calls_and_results(tmp_path):
    own = multilingual.own_chat(1, 0).fields["messages"]
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"of": "the box"}'}}]}
    chat = [own[0], call, {"role": "tool", "tool_call_id": "c1", "content": "the boxes"}, own[1]]
    tools = [{"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {"of": {"type": "string"}}}}}]
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"messages": chat, "tools": tools, "license": "CC0-1.0"}) + "\n")
    made, drops = made_by("multilingual", honest(SCRIPT), tmp_path / "run", rows=3, seeds=str(path), languages="ja de")
    assert len(made) == 2 and reasons(drops) == {"take: chat_came_before"} and made[0]["license"] == "CC0-1.0"
    assert all(row["messages"][1:3] == chat[1:3] and row["tools"] == tools for row in made)
    assert_prepared(made)
    for data, words in ((b"", "empty"), (b"\xff\n", "not_utf8"), (b'{"chat": []}\n', "no row has")):
        path.write_bytes(data)
        with pytest.raises(UserError, match=words):
            made_by("multilingual", honest(SCRIPT), tmp_path / words.replace(" ", "_"), rows=1, seeds=str(path))
