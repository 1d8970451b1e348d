"""The sample: every chat is right, the checker refuses what is wrong, and the shipped file is the generator's."""

import copy
import json
import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron_nb.core import UserError
from nemotron_nb.data import sample


@pytest.fixture(scope="module")
def chats() -> list[dict]:
    return [json.loads(line) for line in sample.sample_path().read_text(encoding="utf-8").splitlines()]


def test_shipped_file_is_what_the_generator_writes(tmp_path):
    written = sample.write_sample(tmp_path / "chats.jsonl").read_bytes()
    assert written == sample.sample_path().read_bytes()
    assert len(written) < 500_000


def test_generator_repeats_itself_and_seeds_differ():
    first = sample.make_chats(40, seed=3)
    assert first == sample.make_chats(60, seed=3)[:40]
    assert first != sample.make_chats(40, seed=4)


@pytest.mark.parametrize("seed", range(5))
def test_other_seeds_are_right_too(seed):
    for chat in sample.make_chats(100, seed=seed):
        sample.check_chat(chat)


def test_shares_of_kinds_and_languages(chats):
    assert Counter(c["language"] for c in chats) == {"en": 200, "fr": 40, "es": 40, "it": 40, "de": 40, "ja": 40}
    assert set(Counter((c["kind"], c["language"]) for c in chats)) == {(k, l) for k in sample.KINDS for l in sample.PHRASEBOOKS}
    assert len({sample._asked(c) for c in chats}) == len(chats) == 400


def test_every_form_of_the_wire_occurs(chats):
    calls = [(m, call) for c in chats for m in c["messages"] for call in m.get("tool_calls", [])]
    arguments = [call["function"]["arguments"] for _, call in calls]
    assert {type(a) for a in arguments} == {str, dict}
    assert {m["content"] is None for m, _ in calls} == {True, False}
    assert {"reasoning_content" in m for m, _ in calls} == {True, False}
    assert {len(m["tool_calls"]) for m, _ in calls} == {1, 2}
    assert {c["messages"][0]["role"] for c in chats} == {"system", "user"}
    assert not any("reasoning_content" in m for c in chats if c["kind"] == "plain" for m in c["messages"])
    steps = [m["role"] for m in next(c for c in chats if c["kind"] == "steps")["messages"] if m["role"] != "system"]
    assert steps == ["user", "assistant", "tool", "assistant", "tool", "assistant"]


def test_no_chat_holds_a_special_token_or_markup(chats):
    assert not re.search(r"<\||</?think>|</?tool_|\{[a-z]\}", json.dumps(chats, ensure_ascii=False))


def test_phrasebooks_state_the_same_numbers():
    def names(phrase):
        if isinstance(phrase, str):
            return set(re.findall(r"\{(\w+)\}", phrase))
        if isinstance(phrase, dict):
            return {key: names(value) for key, value in phrase.items()}
        return set().union(*map(names, phrase))

    for language, book in sample.PHRASEBOOKS.items():
        assert {key: names(book[key]) for key in book} == {key: names(sample.ENGLISH[key]) for key in sample.ENGLISH}, language


def _shift_numbers(text: str) -> list[str]:
    """The text with one of its numbers made wrong, for each of its numbers."""
    return [text[: m.start()] + str(int(m[0]) + 1) + text[m.end() :] for m in re.finditer(r"\d+", text)]


def test_one_wrong_number_anywhere_is_refused(chats):
    """In the last answer of a turn, in a tool result, in the arguments of a call, in an equation of the reasoning."""
    refused = 0
    for chat in chats[::4]:
        for i, message in enumerate(chat["messages"]):
            final = message["role"] == "assistant" and not message.get("tool_calls")
            false_contents = _shift_numbers(message["content"]) if final or message["role"] == "tool" else []
            for content in false_contents:
                false = copy.deepcopy(chat)
                false["messages"][i]["content"] = content
                with pytest.raises(UserError):
                    sample.check_chat(false)
                refused += 1
            for j, call in enumerate(message.get("tool_calls", [])):
                arguments = call["function"]["arguments"]
                for wire in _shift_numbers(arguments if isinstance(arguments, str) else json.dumps(arguments)):
                    false = copy.deepcopy(chat)
                    false["messages"][i]["tool_calls"][j]["function"]["arguments"] = wire
                    with pytest.raises(UserError):
                        sample.check_chat(false)
                    refused += 1
            for equation in re.findall(r"\d+ [+×÷-] \d+ = \d+", message.get("reasoning_content", "")):
                false = copy.deepcopy(chat)
                false["messages"][i]["reasoning_content"] = message["reasoning_content"].replace(equation, equation + "1")
                with pytest.raises(UserError):
                    sample.check_chat(false)
                refused += 1
    assert refused > 200


def _of(chats, kind):
    return copy.deepcopy(next(c for c in chats if c["kind"] == kind))


def _first_call(chat):
    return next(m for m in chat["messages"] if m.get("tool_calls"))["tool_calls"][0]


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("lookup", lambda c: c["messages"].pop(), "does not end with an answer"),
        ("lookup", lambda c: c.update(tools=[]), "is not declared"),
        ("lookup", lambda c: _first_call(c)["function"].update(arguments={"name": "Lumo", "field": "colour"}), "does not fit"),
        ("lookup", lambda c: _first_call(c)["function"].update(arguments={"field": "price"}), "do not fit"),
        ("lookup", lambda c: _first_call(c)["function"].update(arguments='["Lumo"]'), "do not fit"),
        ("lookup", lambda c: _first_call(c)["function"].update(arguments="{'name': 'Lumo'}"), "are not JSON"),
        ("lookup", lambda c: _first_call(c)["function"].update(arguments={"name": "Lumm", "field": "price"}), "did you mean 'Lumo'"),
        ("lookup", lambda c: _first_call(c)["function"].update(arguments={"name": "Lumo", "field": "price", "unit": "kg"}), "do not fit"),
        ("lookup", lambda c: _first_call(c).update(id="call_9"), ", not "),
        ("lookup", lambda c: c["messages"].insert(-1, {"role": "tool", "tool_call_id": "call_1", "content": "1"}), "answers no call"),
        ("parallel", lambda c: c["messages"].__setitem__(slice(-3, -1), c["messages"][-3:-1][::-1]), ", not "),
        ("word_problem", lambda c: c["checks"][0].update(expression="777 + 1", answer=778), "nobody stated"),
        ("word_problem", lambda c: c["checks"][0].update(answer=1), ", not 1"),
        ("word_problem", lambda c: c["messages"][-1].update(content="I do not know."), "does not state"),
        ("word_problem", lambda c: c["messages"][-1].update(content=c["messages"][-1]["content"] + " Or 7."), "does not state"),
    ],
)
def test_checker_names_what_is_wrong(chats, kind, change, says):
    chat = _of(chats, kind)
    sample.check_chat(chat)
    change(chat)
    with pytest.raises(UserError, match=re.escape(says)):
        sample.check_chat(chat)


def test_numbers_must_have_the_type_of_the_schema(chats):
    chat = copy.deepcopy(next(c for c in chats if c["kind"] == "calculator" and "operation" in c["tools"][0]["function"]["parameters"]["properties"]))
    call = _first_call(chat)["function"]
    arguments = json.loads(call["arguments"]) if isinstance(call["arguments"], str) else call["arguments"]
    call["arguments"] = arguments | {"a": str(arguments["a"])}
    with pytest.raises(UserError, match="does not fit"):
        sample.check_chat(chat)


def test_check_answer_reads_the_text_after_the_thought(chats):
    chat = _of(chats, "steps")
    answer = chat["messages"][-1]["content"]
    assert sample.check_answer(chat, answer)
    assert sample.check_answer(chat, f"I think 1 + 1 = 2.\n</think>\n{answer}")
    assert not sample.check_answer(chat, f"{answer}\n</think>\nIt is 1.")
    assert not sample.check_answer(chat, "")


@given(st.lists(st.integers(0, 999), min_size=1, max_size=6), st.randoms())
def test_sums_agree_with_python(numbers, rng: random.Random):
    expression = str(numbers[0]) + "".join(f" {rng.choice('+-*')} {n}" for n in numbers[1:])
    assert sample.work_out(expression) == eval(expression)


@pytest.mark.parametrize("text", ["7 / 2", "1 / 0", "2 ** 3", "x", "1.5 + 1", "f(1)", "1 +", "", "(1, 2)", "-3", "True"])
def test_what_is_not_a_sum_is_refused(text):
    with pytest.raises(UserError):
        sample.work_out(text)


def test_records_share_nothing():
    one, other, *_ = [c for c in sample.make_chats(20) if "tools" in c]
    one["tools"][0]["function"]["name"] = "changed"
    assert "changed" not in json.dumps([other, *sample.CALCULATORS, *sample.LOOKUPS])
