"""Verifiers that judge by doing: every planted wrong is caught, no right row is refused, and who could not judge says so."""

import contextlib
import copy
import io
import json
import random
import re
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_nb.core import UserError, digest
from nemotron_nb.rl.code import Limits, NoSandbox, sandbox_command
from nemotron_nb.rl.workplace import TABLES, office_tools
from nemotron_nb.synth import verify_cuda as cuda
from nemotron_nb.synth import verify_lean as lean
from nemotron_nb.synth import verify_python as python
from nemotron_nb.synth.row import PASSED, REFUSED, UNVERIFIED
from nemotron_nb.synth.verify_json import closed, verify_json
from nemotron_nb.synth.verify_lean import verify_lean, without_comments
from nemotron_nb.synth.verify_python import ProgramTests, verify_python
from nemotron_nb.synth.verify_tools import Office, ToolGoal, exchanges_of, says, verify_tools
from nemotron_nb.synth.verify_translation import parts_of, same_numbers, values_of, verify_translated_chat, verify_translation

BOXED = sandbox_command(Path("."))[1] == "bubblewrap"
boxed = pytest.mark.skipif(not BOXED, reason="bubblewrap is not installed, or cannot make a box here")
QUICK = Limits(seconds=3.0)
TRUST = {"without_box": True}  # the programs here are ours


def last(proofs):
    """(status, reason) of what decides."""
    return proofs[-1].status, proofs[-1].reason


# Programs ------------------------------------------------------------------------------------------------------------


def program(rng):
    """(program, wrong programs, tests): a small task with numbers of its own."""
    a, b = rng.randint(2, 9), rng.randint(1, 9)
    kinds = [
        (f"n = int(input())\nprint({a} * n + {b})", lambda n: a * n + b, [("+", "-"), (f"{a} *", f"{a + 1} *"), ("int(input())", "int(input()[0])"), ("print(", "print(1 + ")]),
        (f"print(sum(i for i in range(int(input()) + 1) if i % {a} == 0))", lambda n: sum(i for i in range(n + 1) if i % a == 0), [(" + 1)", ")"), ("== 0", "== 1"), ("sum(i ", "sum(1 ")]),
        (f"s = input()\nprint(s[::-1] + '{b}' * len(s))", lambda n: str(n)[::-1] + str(b) * len(str(n)), [("[::-1]", ""), ("len(s)", "(len(s) - 1)"), (f"'{b}'", f"'{b + 1}'")]),
        (f"n = int(input())\nwhile n % {a}:\n    n += 1\nprint(n)", lambda n: n + -n % a, [("n += 1", "n -= 1"), ("n += 1", "n += 2"), ("while", "if")]),
    ]
    source, act, changes = rng.choice(kinds)
    inputs = sorted({rng.randint(1, 3), rng.randint(10, 60), rng.randint(100, 400), a * 12, a * 7 + 1, a * 7 + a - 1, 37})
    wrong = [w for old, new in changes if (w := source.replace(old, new, 1)) != source]
    return source, wrong, ProgramTests(tuple(map(str, inputs)), tuple(str(act(n)) for n in inputs)), act


def gives(source, given):
    """What a program prints, here; the programs are those above. `TimeoutError` where it does not end soon."""
    out, steps = io.StringIO(), iter(range(20_000))

    def count(*_):
        if next(steps, None) is None:
            raise TimeoutError
        return count

    before = sys.gettrace()
    try:
        with contextlib.redirect_stdout(out):
            sys.settrace(count)
            exec(source, {"input": lambda: given, "__name__": "__main__"})
    finally:
        sys.settrace(before)
    return out.getvalue().strip()


def judged_programs(count):
    """Judge so many right programs, and one wrong variant of each that differs in some test."""
    rng, right, planted, caught = random.Random(4), 0, 0, 0
    for _ in range(count):
        source, wrong, tests, act = program(rng)
        right += last(verify_python(source, tests, QUICK, runs=1, **TRUST)) == (PASSED, "")
        spoilt = rng.choice(wrong)
        try:
            differs = any(gives(spoilt, g) != w for g, w in zip(tests.inputs, tests.outputs))
        except Exception:
            differs = True
        planted += differs
        caught += differs and verify_python(spoilt, tests, QUICK, runs=1, **TRUST)[-1].status == REFUSED
    return right, planted, caught


def test_right_programs_pass_and_wrong_ones_are_caught():
    right, planted, caught = judged_programs(12)
    assert right == 12 and planted >= 8 and caught == planted


@pytest.mark.long
def test_two_hundred_programs():
    right, planted, caught = judged_programs(200)
    assert right == 200 and planted >= 150 and caught == planted


ADD = ProgramTests(asserts=("assert add(2, 3) == 5", "assert add(0, -1) == -1"))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def add(a, b):\n    return a + b\nif __name__ == '__main__':\n    print(input())", ""),
        ("def add(a, b):\n    print('noise')\n    return a + b", ""),
        ("def add(a, b):\n    return a - b", "failed_assert"),
        ("def add(a, b):\n    return 5", "failed_assert"),
        ("def add(a, b):\n    raise SystemExit(0)", "left_early"),
        ("import os\nos._exit(0)", "left_early"),
        ("import sys\nsys.exit(0)", "left_early"),
        ("def add(a, b)\n    return a + b", "error"),
        ("pass", "error"),
        ("  \n", "no_program"),
        ("def add(a, b):\n    while True: pass", "out_of_time"),
        ("\x00", "error"),
    ],
)
def test_asserts_are_run_behind_the_program(source, reason):
    limits = Limits(seconds=1.0) if reason == "out_of_time" else QUICK
    assert last(verify_python(source, ADD, limits, **TRUST)) == ((REFUSED, reason) if reason else (PASSED, ""))


@pytest.mark.parametrize("tests", [ProgramTests(("1", "2"), ("7", "7\n")), ProgramTests(("1",), ("7",)), ProgramTests(asserts=("assert True",))])
def test_tests_that_say_nothing_are_refused(tests):
    assert last(verify_python("print(7)", tests, QUICK, **TRUST)) == (REFUSED, "tests_say_nothing")


def test_a_program_that_differs_between_runs_is_refused(monkeypatch):
    found = iter([("", {}), ("wrong_output", {"test": 1})])
    monkeypatch.setattr(python, "_first_fault", lambda *_: next(found))
    assert last(verify_python("print(input())", ProgramTests(("1", "2"), ("1", "2")), QUICK, **TRUST)) == (REFUSED, "differs_between_runs")


def test_who_cannot_run_a_program_does_not_judge_it(monkeypatch):
    tests = ProgramTests(("1", "2"), ("1", "2"))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None)
        assert last(verify_python("print(input())", tests)) == (UNVERIFIED, "no_sandbox")
        assert last(verify_python("print(input())", tests, **TRUST)) == (PASSED, "")

    def broken(*_):
        raise NoSandbox("no box")

    monkeypatch.setattr(python, "run_tests", broken)
    assert last(verify_python("print(input())", tests, **TRUST)) == (UNVERIFIED, "sandbox_broken")


def test_evidence_is_the_same_every_time_and_is_json():
    tests = ProgramTests(("1", "2"), ("1", "2"))
    for source in ("print(input())", "print(3)", "1/0"):
        one, other = (verify_python(source, tests, QUICK, **TRUST) for _ in range(2))
        assert one == other and json.dumps([dict(p.evidence) for p in one])


# Tool chats ----------------------------------------------------------------------------------------------------------


def office_chat(rng):
    """(messages, goal) of a chat in which some things are looked up, noted, changed and removed."""
    office, messages, facts, number = Office(), [{"role": "user", "content": "Please see to it."}], [], 0
    for _ in range(rng.randint(1, 3)):
        calls, results = [], []
        for _ in range(rng.randint(1, 2)):
            table = rng.choice(sorted(TABLES))
            action = rng.choice(["find", "add", "change", "remove"])
            there = sorted(office.state()[table])
            values = {field: f"{field} {rng.randint(100, 999)}" for field in TABLES[table]}
            if action == "add":
                arguments = values
            elif action == "change":
                arguments = {"id": rng.choice([*there, "77"]), rng.choice(TABLES[table]): f"new {rng.randint(1000, 9999)}"}
            elif action == "remove":
                arguments = {"id": rng.choice([*there, "88"])}
            else:
                arguments = {rng.choice(TABLES[table]): f"none {rng.randint(1000, 9999)}"} if rng.random() < 0.5 else {}
            name, number = f"{action}_{table}", number + 1
            if (name, arguments) in [(json.loads(c["function"]["arguments"]), 0) for c in calls]:
                continue
            calls.append({"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}})
            results.append({"role": "tool", "tool_call_id": f"call_{number}", "content": office.call(name, arguments)})
        messages += [{"role": "assistant", "content": "", "tool_calls": calls}, *results]
    facts = [str(rng.randint(10, 99)), f"{rng.randint(1, 9)},{rng.randint(100, 999)}"]
    messages.append({"role": "assistant", "content": f"Done: {facts[0]} of {facts[1]}."})
    return messages, ToolGoal(tuple(facts), (), digest(office.state()))


def plant(messages, kind, rng):
    """A wrong of some kind in a copy of a chat."""
    chat = copy.deepcopy(messages)
    callers = [i for i, m in enumerate(chat) if m.get("tool_calls")]
    at = rng.choice(callers)
    call = rng.choice(chat[at]["tool_calls"])
    function, result = call["function"], next(m for m in chat if m.get("tool_call_id") == call["id"])
    arguments = json.loads(function["arguments"])
    if kind == "undeclared_tool":
        function["name"] = rng.choice(["pay_invoice", "find_invoices", "Find_invoice", ""])
    elif kind == "unknown_argument":
        function["arguments"] = json.dumps(arguments | {rng.choice(["limit", "Id", "year"]): "1"})
    elif kind == "bad_arguments":
        function["arguments"] = rng.choice(["{", "[]", '"x"', '{"id": 5}', '{"id": "1", "id": "2"}', json.dumps(arguments)[:-1]])
    elif kind == "wrong_id":
        result["tool_call_id"] = rng.choice(["call_99", "", None])
    elif kind == "missing_result":
        chat.remove(result)
    elif kind == "stray_result":
        chat.insert(chat.index(result) + 1, dict(result))
    elif kind == "same_call_twice":
        again = {"role": "assistant", "content": "", "tool_calls": [{"id": "call_x", "type": "function", "function": {"name": "find_task", "arguments": "{}"}}, {"id": "call_y", "type": "function", "function": {"name": "find_task", "arguments": " {} "}}]}
        world = Office()
        for e in exchanges_of(chat):
            world.call(e.name, json.loads(e.arguments))
        said = world.call("find_task", {})
        chat[-1:-1] = [again, {"role": "tool", "tool_call_id": "call_x", "content": said}, {"role": "tool", "tool_call_id": "call_y", "content": said}]
    elif kind == "result_changed":
        text = result["content"]
        others = ['{"id": "12345"}', "{}x", text[:-1] + ', "more": 1}'] if text.startswith("{") else [text + " ", text.replace("id", "no"), "", "ok"]
        result["content"] = rng.choice(others)
    elif kind == "wrong_answer":
        text = chat[-1]["content"]
        chat[-1]["content"] = rng.choice([re.sub(r"\d", lambda m: str((int(m[0]) + 1) % 10), text, count=1), "Done.", text.replace(",", ""), re.sub(r"(\d\d) of", r"\g<1>5 of", text)])
    elif kind == "no_answer":
        chat[-1]["content"] = rng.choice(["", "  ", None])
    return chat


KINDS = ("undeclared_tool", "unknown_argument", "bad_arguments", "wrong_id", "missing_result", "stray_result", "same_call_twice", "result_changed", "wrong_answer", "no_answer")


def test_two_hundred_tool_chats_pass_and_ten_kinds_of_wrongs_are_caught():
    rng, caught = random.Random(1), {kind: 0 for kind in KINDS}
    for _ in range(200):
        messages, goal = office_chat(rng)
        right = verify_tools(messages, office_tools(), Office, goal)
        repeated = right[-1].reason == "same_call_twice"  # the draw may repeat a call; then that is what must be said
        assert all(p.status == PASSED for p in right) or repeated, right
        for kind in KINDS:
            found = verify_tools(plant(messages, kind, rng), office_tools(), Office, goal)
            assert found[-1].status == REFUSED, (kind, messages)
            caught[kind] += found[-1].reason == kind
    assert min(caught.values()) >= 170 and sum(caught.values()) >= 1900, caught


def test_a_chat_whose_calls_were_left_out_has_another_state():
    rng = random.Random(2)
    for _ in range(50):
        messages, goal = office_chat(rng)
        without = [messages[0], messages[-1]]
        if goal.state != digest(Office().state()):
            assert last(verify_tools(without, office_tools(), Office, goal)) == (REFUSED, "wrong_state")


@pytest.mark.parametrize(("text", "fact", "said"), [("it is 240", "24", False), ("it is 24.", "24", True), ("24.5", "24", False), ("0.24", "24", False), ("24, or 25", "24", True), ("New  York", "new york", True), ("Yorkshire", "York", False), ("costs $24!", "24", True), ("x", "", False), ("-24", "24", True), ("1,240", "240", False)])
def test_a_fact_is_a_whole_word_or_number(text, fact, said):
    assert says(text, fact) == said


def test_tools_that_cannot_be_used_and_worlds_that_break_are_no_refusal():
    messages, goal = office_chat(random.Random(5))
    name = messages[1]["tool_calls"][0]["function"]["name"]

    class Broken(Office):
        def call(self, name, arguments):
            raise RuntimeError("gone")

    assert last(verify_tools(messages, office_tools(), Broken, goal)) == (UNVERIFIED, "world_failed")
    for parameters in ({"type": "x"}, {"$ref": "http://127.0.0.1:1/x"}):
        tools = [t for t in office_tools() if t["function"]["name"] != name] + [{"name": name, "parameters": parameters}]
        assert verify_tools(messages, tools, Office, goal)[-1].status == UNVERIFIED


# Translations --------------------------------------------------------------------------------------------------------

SENTENCES = {  # of one pattern: {n} a number, {m} money, {f} a formula, {l} an address, {c} code
    "en": ["The number of boxes in the store is {n}, and that is not all of it.", "It costs {m} euros in the shop on the corner, see {l} for the rest of it.", "We know from {f} that the result is right, as it was in the book.", "With `{c}` you can see that it is done, and this is not the end of it."],
    "de": ["Die Zahl der Kisten im Lager ist {n}, und das ist noch nicht alles.", "Es kostet {m} Euro in dem Laden an der Ecke, siehe {l} für den Rest.", "Wir wissen aus {f}, dass das Ergebnis richtig ist, wie es auch in dem Buch war.", "Mit `{c}` kann man sehen, dass es fertig ist, und das ist nicht das Ende."],
    "fr": ["Le nombre de boîtes dans le magasin est de {n}, et ce n'est pas tout.", "Cela coûte {m} euros dans la boutique du coin, voir {l} pour le reste.", "Nous savons par {f} que le résultat est juste, comme il est dit dans le livre.", "Avec `{c}` on voit que le travail est fait, et ce n'est pas la fin de tout."],
    "es": ["El número de cajas en el almacén es {n}, y no es todo lo que hay.", "Cuesta {m} euros en la tienda de la esquina, mira {l} para el resto.", "Sabemos por {f} que el resultado es correcto, como está en el libro.", "Con `{c}` se puede ver que está hecho, y no es el final de la historia."],
}


def number(value, language, places=0):
    """A number as it is written in a language."""
    text = f"{value:,.{places}f}"
    return text if language == "en" else text.translate(str.maketrans(",.", ".,")) if language != "fr" else text.replace(",", "\u202f").replace(".", ",")


def translated(rng, language):
    """(English, translation) with the same facts."""
    order = [rng.randrange(4) for _ in range(rng.randint(2, 5))]
    n, m, k = rng.randint(2, 99999), rng.randint(100, 999999) / 100, rng.randint(2, 50)
    code, formula, link = f"total({k})", f"$x_{k} = \\frac{{{n}}}{{{k}}}$", f"https://shop.example/{k}?q={n}"
    fence = f"```python\nprint({k} * {n})  # the total\n```"
    end = f"\\boxed{{{n}}}"

    def text(language):
        """The text in a language."""
        said = [SENTENCES[language][i].format(n=number(n, language), m=number(m, language, 2), f=formula, l=link, c=code) for i in order]
        return "\n\n".join([*said, fence, f"**{end}**"])

    return text("en"), text(language), (n, m, k)


def spoil(text, source, kind, facts, rng):
    """A wrong translation; None where this kind has no place."""
    n, _, k = facts
    paragraphs = text.split("\n\n")
    change = {
        "fence": (f"print({k} *", f"print({k + 1} *"), "comment": ("# the total", "# total"), "code": (f"`total({k})`", f"`summe({k})`"), "boxed": (f"boxed{{{n}}}", f"boxed{{{n + 1}}}"),
        "formula": (f"\\frac{{{n}}}", f"\\frac{{{n + 1}}}"), "link": (f"?q={n}", f"?q={n}0"), "fence lost": ("```python", "```"),
    }.get(kind)  # fmt: skip
    if change:
        return text.replace(*change) if change[0] in text else None
    if kind == "number":
        place = next((i for i, p in enumerate(paragraphs[:-2]) if re.search(r"\d", re.sub(r"`.*?`|\$.*?\$|https\S*", "", p))), None)
        if place is None:
            return None
        outside = re.sub(r"`.*?`|\$.*?\$|https\S*", lambda m: "\0" * len(m[0]), paragraphs[place])
        at = re.search(r"\d", outside).start()
        paragraphs[place] = paragraphs[place][:at] + str((int(paragraphs[place][at]) % 9) + 1) + paragraphs[place][at + 1 :]
    elif kind == "paragraph lost":
        paragraphs.pop(0)
    elif kind == "one left":
        paragraphs[0] = source.split("\n\n")[0]
    elif kind == "two swapped numbers":
        return None
    elif kind == "not translated":
        return source
    return "\n\n".join(paragraphs)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("we know $ a $ and $ x^2 + \\alpha $ too", ("a", "x^2+\\alpha")), ("it costs $ 5 and $ 6", ()), ("$ 5, $ 6 or $7", ()),
        ("the $a$ and $ b $.", ("a", "b")), ("either $ 5 or nothing $ at all", ()), ("\\$ a $ b", ()),
    ],
)  # fmt: skip
def test_a_formula_may_have_blanks_inside_and_money_is_none(text, found):
    assert parts_of(text).maths == found


WRONGS = ("fence", "comment", "code", "boxed", "formula", "link", "fence lost", "number", "paragraph lost", "one left", "not translated")


@pytest.mark.parametrize("language", ["de", "fr", "es"])
def test_right_translations_pass_and_wrong_ones_are_caught(language):
    rng, planted = random.Random(7), 0
    for _ in range(70):
        source, text, facts = translated(rng, language)
        assert last(verify_translation(source, text, language)) == (PASSED, ""), (source, text)
        for kind in WRONGS:
            wrong = spoil(text, source, kind, facts, rng)
            if wrong is not None:
                planted += 1
                assert verify_translation(source, wrong, language)[-1].status == REFUSED, (kind, source, wrong)
    assert planted >= 70 * 6


def test_a_translation_into_another_language_than_asked_for():
    source, text, _ = translated(random.Random(1), "de")
    assert last(verify_translation(source, text, "fr")) == (REFUSED, "wrong_language")
    with pytest.raises(UserError, match="unknown language 'german'"):
        verify_translation(source, text, "german")


@pytest.mark.parametrize(("source", "text", "found"), [("x = 1", "x = 1", UNVERIFIED), ("Yes.", "Ja.", UNVERIFIED), ("$x^2$", "$x^2$", PASSED), ("42", "42", PASSED), ("", "", PASSED), ("The cat is on the mat.", "42", REFUSED), ("The cat is on the mat and it is not for you.", "\u732b\u306f\u30de\u30c3\u30c8\u306e\u4e0a\u306b\u3044\u307e\u3059\u3002", REFUSED)])
def test_texts_that_have_no_language_or_too_little_of_it(source, text, found):
    assert verify_translation(source, text, "de")[-1].status == found


@pytest.mark.parametrize("change", [("\n\nDas ist alles, was wir von der Katze und dem Hund wissen.", ""), ("- ", ""), ("## ", ""), ("- die", "1. die"), ("Hund.", "Hund.\n\nUnd das ist nicht wahr.")])
def test_lines_keep_their_number_and_their_marks(change):
    source = "## The animals of the house\n\n- the cat and the dog of it.\n\nThat is all that we know of the cat and the dog."
    text = "## Die Tiere von dem Haus\n\n- die Katze und der Hund.\n\nDas ist alles, was wir von der Katze und dem Hund wissen."
    assert last(verify_translation(source, text, "de")) == (PASSED, "")
    wrong = text.replace(*change)
    assert wrong != text and last(verify_translation(source, wrong, "de")) in [(REFUSED, "lines_differ"), (REFUSED, "numbers_differ" if "1." in wrong else "")]


def test_json_is_translated_in_its_texts_only():
    source = '{"title": "The cat is on the mat, and it is not for you.", "n": 2, "tags": ["of the house"]}'
    right = '{"title": "Die Katze ist auf der Matte, und sie ist nicht für dich.", "n": 2, "tags": ["von dem Haus"]}'
    assert last(verify_translation(source, right, "de")) == (PASSED, "")
    for wrong in (right.replace("title", "Titel"), right.replace("2,", "3,"), right.replace('"von dem Haus"', ""), right.replace('["von dem Haus"]', '""'), right[:-1], right.replace("von dem Haus", " ")):
        assert last(verify_translation(source, wrong, "de")) == (REFUSED, "json_differs")
    fenced = [f"Here it is, and this is all of it:\n\n```json\n{t}\n```" for t in (source, right)]
    assert verify_translation(fenced[0], fenced[1].replace("Here it is, and this is all of it", "Hier ist es, und das ist alles, was wir haben"), "de")[-1].status == PASSED


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 10**7), max_size=8), st.randoms(use_true_random=False))
def test_numbers_are_the_same_in_any_order_and_spelling_and_no_others(numbers, rng):
    other = numbers[:]
    rng.shuffle(other)
    one, two = "; ".join(number(n, "en") for n in numbers), "; ".join(number(n, rng.choice(["de", "fr"])) for n in other)
    assert same_numbers(one, two)
    assert not same_numbers(one, two + "; 5") and (not numbers or not same_numbers(one, "; ".join(number(n + 1, "de") for n in other)))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 99))
def test_a_number_with_places_has_one_value_in_each_spelling(whole, part):
    value = whole + part / 100
    spelt = {values_of(number(value, language, 2)) for language in ("en", "de", "fr")}
    assert len(spelt) == 1 and len(next(iter(spelt))) == 1


def test_a_chat_is_translated_as_a_whole():
    source, text, _ = translated(random.Random(3), "de")
    call = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    chat = [{"role": "user", "content": source}, {"role": "assistant", "content": "", "tool_calls": call}, {"role": "tool", "content": "17", "tool_call_id": "a"}, {"role": "assistant", "content": source, "reasoning_content": source}]
    there = [{**m, **{k: text for k in ("content", "reasoning_content") if m.get(k) == source}} for m in chat]
    assert {p.status for p in verify_translated_chat(chat, there, "de")} == {PASSED}
    for index, field, value, reason in [(0, "role", "system", "chat_differs"), (1, "tool_calls", [], "chat_differs"), (2, "content", "18", "result_differs"), (3, "reasoning_content", source, "not_translated"), (3, "content", text.replace("boxed{", "boxed{1"), "boxed_differ")]:
        assert last(verify_translated_chat(chat, [*there[:index], {**there[index], field: value}, *there[index + 1 :]], "de")) == (REFUSED, reason)
    assert last(verify_translated_chat(chat[1:3], chat[1:3], "de"))[0] == PASSED
    short = [{"role": "user", "content": "Yes."}]
    assert verify_translated_chat(short, [{"role": "user", "content": "Ja."}], "de")[-1].status == UNVERIFIED


# Lean ----------------------------------------------------------------------------------------------------------------

STAND_IN = """#!/bin/sh
case "$1" in
  --print-prefix) cd "$(dirname "$0")/.." && pwd; exit 0;;
  --version) echo "stand-in for Lean"; exit 0;;
esac
if grep -q 'breaks' "$1"; then exit 139; fi
if grep -q 'slow' "$1"; then sleep 60; fi
if grep -q 'wrong' "$1"; then echo "$1:2:4: error: unsolved goals"; exit 1; fi
name=$(sed -n 's/^#print axioms //p' "$1")
if grep -q 'trusts' "$1"; then echo "'$name' depends on axioms: [propext, myAxiom]"; exit 0; fi
if grep -q 'choice' "$1"; then echo "'$name' depends on axioms: [propext,
 Classical.choice]"; exit 0; fi
echo "'$name' does not depend on any axioms"
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A `lean` on PATH that answers as Lean does; it proves nothing."""
    (tmp_path / "bin").mkdir()
    path = tmp_path / "bin" / "lean"
    path.write_text(STAND_IN)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    return tmp_path


TWO = "theorem two : 1 + 1 = 2"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        (f"{TWO} := rfl", (PASSED, "")),
        ("import Init\n\ntheorem  two :\n  1 + 1 = 2 := by\n  rfl -- no sorry here\n/- nor an axiom -/", (PASSED, "")),
        (f"{TWO} := by choice", (PASSED, "")),
        (f"{TWO} := by wrong", (REFUSED, "does_not_compile")),
        (f"{TWO} := by trusts", (REFUSED, "rests_on_more")),
        (f"{TWO} := by breaks", (UNVERIFIED, "lean_failed")),
        (f"{TWO} := by slow", (UNVERIFIED, "out_of_time")),
        ("theorem two : 1 + 1 = 3 := rfl", (REFUSED, "other_statement")),
        ("theorem two : 1 + 1 = 22 := rfl", (REFUSED, "other_statement")),
        (f"-- {TWO} := rfl", (REFUSED, "other_statement")),
        (f"{TWO} := rfl\nnamespace A\n{TWO} := rfl", (REFUSED, "other_statement")),
        ("", (REFUSED, "other_statement")),
    ],
)
def test_a_proof_is_read_and_then_given_to_lean(stand_in, source, found):
    limits = Limits(seconds=1.0 if "slow" in source else 20.0)
    assert last(verify_lean(TWO, source, limits=limits, **TRUST)) == found


@pytest.mark.parametrize("word", sorted(lean.FORBIDDEN))
def test_words_that_open_holes_are_found_wherever_they_stand(word):
    for source in (f"{TWO} := by {word}", f"{word} a : p\n{TWO} := a", f"{TWO} := by\n  exact (x).{word}" if word[0] != "#" else f"{TWO} := a\n{word} x", f'{TWO} := by simp [show "/-" = "/-" from rfl]; {word} /- -/', f"{TWO} := rfl\n/- /- -/ -/ {word}", f"{TWO} := rfl -- -/\n@[{word}] def x := 1"):
        assert last(verify_lean(TWO, source)) == (REFUSED, "forbidden_word"), source


def test_two_hundred_proofs_are_not_refused_where_there_is_no_lean(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    rng = random.Random(1)
    for i in range(200):
        a, b = rng.randint(1, 99), rng.randint(1, 99)
        statement = f"theorem sum_{i} (h : {a} < {b} + n) : {a} + {b} = {a + b}"
        words = rng.choice(["by norm_num", "by\n  have axioms_of := 1\n  decide", "rfl -- sorry about that", 'by simp /- admit -/ ["sorry"]', "by exact Nat.constants_add h'"])
        assert last(verify_lean(statement, f"import Mathlib\nopen Nat\n\n{statement} := {words}\n")) == (UNVERIFIED, "no_lean")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["/-", "-/", "--", "\n", '"', "\\", "'", "a", " ", "-", "/"]), max_size=12).map("".join))
def test_comments_are_taken_out_of_anything(source):
    left = without_comments(source + '\n-/"')
    assert isinstance(left, str) and len(left) <= len(source) + 4


# CUDA ----------------------------------------------------------------------------------------------------------------


def kernel(rng):
    """(source, wrong sources): a kernel over one array."""
    name, factor = f"k{rng.randint(0, 10**6)}", rng.randint(2, 99)
    body = rng.choice(["a[i] += {f} * b[i];", "a[i] = b[i] > {f} ? b[i] : {f};", "for (int j = 0; j < {f}; ++j) a[i] += b[i] * j;", "__shared__ float s[{f}]; s[i % {f}] = b[i]; __syncthreads(); a[i] = s[0];"]).replace("{f}", str(factor))
    source = f"__global__ void {name}(float* a, const float* b, int n) {{\n  int i = blockIdx.x * blockDim.x + threadIdx.x;\n  if (i < n) {{ {body} }}\n}}\n"
    changes = [("blockIdx", "blockId"), ("}\n", "\n"), ("const float* b", "const flot* b"), ("__global__ void", "__global__ int"), ("int n", "int m"), ("a[i]", "b[i]")]
    return source, [source.replace(old, new, 1) for old, new in changes]


compiles = pytest.mark.skipif(not cuda.find_nvcc()[0], reason="nvcc is not installed")


@compiles
@pytest.mark.parametrize("count", [2, pytest.param(40, marks=pytest.mark.long)])
def test_right_kernels_compile_and_wrong_ones_do_not(count):
    rng = random.Random(3)
    for _ in range(count):
        source, wrong = kernel(rng)
        [proof] = cuda.verify_cuda(source, **TRUST)
        assert proof.status == PASSED and proof.evidence["kernels"][0]["registers"] > 0, proof
        assert last(cuda.verify_cuda(rng.choice(wrong), **TRUST)) == (REFUSED, "does_not_compile")


@compiles
def test_what_is_no_kernel_and_what_nvcc_cannot_say():
    assert last(cuda.verify_cuda("int f() { return 1; }", **TRUST)) == (REFUSED, "no_kernel")
    assert last(cuda.verify_cuda(kernel(random.Random(1))[0], "sm_9999", **TRUST)) == (UNVERIFIED, "nvcc_failed")
    assert last(cuda.verify_cuda(kernel(random.Random(1))[0], limits=Limits(seconds=0.01, memory=16 << 30), **TRUST)) == (UNVERIFIED, "out_of_time")


@compiles
@boxed
def test_a_kernel_can_include_nothing_of_the_user(tmp_path):
    (tmp_path / "secret").write_text("int SECRET_4711 = x;")
    proof = cuda.verify_cuda(f'#include "{tmp_path}/secret"\n{kernel(random.Random(1))[0]}')[-1]
    assert proof.reason == "does_not_compile" and "SECRET_4711" not in json.dumps(dict(proof.evidence))


def test_without_nvcc_or_box_no_kernel_is_judged(monkeypatch):
    monkeypatch.setattr(cuda, "find_nvcc", lambda: ("", ""))
    assert last(cuda.verify_cuda("nonsense")) == (UNVERIFIED, "no_nvcc")
    monkeypatch.setattr(cuda, "find_nvcc", lambda: ("/usr/bin/nvcc", "13.0"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert last(cuda.verify_cuda("nonsense")) == (UNVERIFIED, "no_sandbox")


# JSON ----------------------------------------------------------------------------------------------------------------


def shaped(rng, depth=0):
    """(schema, value) that fit."""
    kind = rng.choice(["object", "array", "string", "integer", "number", "boolean"][: 6 if depth else 1])
    if depth > 2 and kind in ("object", "array"):
        kind = "string"
    if kind == "object":
        fields = {f"f{i}": shaped(rng, depth + 1) for i in range(rng.randint(1, 4))}
        return {"type": "object", "properties": {k: s for k, (s, _) in fields.items()}, "required": sorted(fields)}, {k: v for k, (_, v) in fields.items()}
    if kind == "array":
        schema, value = shaped(rng, depth + 1)
        return {"type": "array", "items": schema, "minItems": 1}, [value]
    values = {"string": f"word {rng.randint(1, 99)}", "integer": rng.randint(1, 99), "number": rng.random() + 0.5, "boolean": True}
    return {"type": kind}, values[kind]


def objects(value):
    """All objects in a value."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return ([value] if isinstance(value, dict) else []) + [o for v in inner for o in objects(v)]


def test_two_hundred_values_fit_and_wrong_ones_do_not():
    rng = random.Random(9)
    for _ in range(200):
        schema, value = shaped(rng)
        text = json.dumps(value)
        for answer in [rng.choice([text, f"```json\n{text}\n```", f" {json.dumps(value, indent=2)}\n"])]:
            assert last(verify_json(answer, schema)) == (PASSED, "")
        for spoilt, reason in (("unknown", "unknown_field"), ("missing", "does_not_fit"), ("kind", "does_not_fit")):
            wrong = json.loads(text)
            place = rng.choice(objects(wrong))
            key = rng.choice(sorted(place))
            if spoilt == "unknown":
                place["other"] = 1
            elif spoilt == "missing":
                del place[key]
            else:
                place[key] = None
            assert last(verify_json(json.dumps(wrong), schema)) == (REFUSED, reason)
        broken = (text[:-1], f"So: {text}", f"{text} {text}", f"```json\n{text}", f"```python\n{text}\n```", text.replace('"f0"', "'f0'"), "{" + text[1:-1] + ", " + text[1:-1] + "}", "")
        for answer in rng.sample(broken, 2):
            assert last(verify_json(answer, schema)) == (REFUSED, "not_json")


@pytest.mark.parametrize("schema", [{"type": "x"}, {"$ref": "http://127.0.0.1:1/x"}, {"$ref": "file:///etc/passwd"}, {"$ref": "#/$defs/none"}, {"pattern": "("}, {"properties": 5}])
def test_a_schema_that_cannot_be_used_leaves_the_answer_open(schema):
    assert last(verify_json('{"a": "b"}', schema) if "pattern" not in schema else verify_json('"b"', schema)) == (UNVERIFIED, "schema_cannot_be_used")


def test_combined_schemas_are_not_closed_against_each_other():
    both = {"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}}, {"type": "object", "properties": {"b": {"type": "integer"}}}]}
    assert last(verify_json('{"a": 1, "b": 2}', both)) == (PASSED, "")
    assert closed({"properties": {"a": {}}, "additionalProperties": True})["additionalProperties"] is True
    assert last(verify_json('{"a": "", "b": [0]}', {"type": "object"})) == (REFUSED, "hollow")
    assert last(verify_json('{"a": ""}', {"type": "object"}, allow_hollow=True)) == (PASSED, "")
