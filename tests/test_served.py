"""What a server reads back: random calls come through, another implementation agrees, and what cannot come through is named."""

import json
import re

from hypothesis import example, given, settings
from hypothesis import strategies as st

from nemotron_nb.data.records import Conversation, parse_conversation
from nemotron_nb.data.template import IM_END, render, turns
from nemotron_nb.generate.served import as_message, chat_misreadings, read_served_calls, serve_turn, served_parity

NAMES = st.from_regex(r"[a-z][a-z0-9_.-]{0,11}", fullmatch=True)
TAG = re.compile(r"</?(tool_call|function|parameter)\b")
SPACED = st.text(st.sampled_from(" \n\t\r0a"), max_size=8)
TEXT = (st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | SPACED).filter(lambda t: not TAG.search(t) and "think>" not in t)
JSON = st.recursive(st.none() | st.booleans() | st.integers(-(10**6), 10**6) | TEXT, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6)
FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)
VALUES = {
    "string": TEXT,
    "integer": st.integers(),
    "number": FLOATS | st.integers(-(2**53), 2**53),
    "boolean": st.booleans(),
    "array": st.lists(JSON, max_size=3),
    "object": st.dictionaries(TEXT, JSON, max_size=3),
}


@st.composite
def typed_calls(draw):
    """(tools, calls): functions with declared parameters, and calls whose values have the declared types."""
    tools, calls = [], []
    for name in draw(st.lists(NAMES, min_size=1, max_size=3, unique=True)):
        kinds = draw(st.dictionaries(NAMES, st.sampled_from(sorted(VALUES)), max_size=4))
        properties = {key: {"anyOf": [{"type": kind}, {"type": "null"}]} if draw(st.booleans()) else {"type": kind} for key, kind in kinds.items()}
        tools.append({"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}})
        given_ = {key: draw(VALUES[kind]) for key, kind in kinds.items()}
        nullish = {key for key, value in given_.items() if isinstance(value, str) and value.lower() in ("none", "null")}
        calls.append({"type": "function", "function": {"name": name, "arguments": {k: v for k, v in given_.items() if k not in nullish}}})
    return tools, draw(st.lists(st.sampled_from(calls), min_size=1, max_size=4))


def chat_of(tools, calls, content="", thought=""):
    said = {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})} | ({"reasoning_content": thought} if thought else {})
    return Conversation(messages=({"role": "user", "content": "go"}, said), tools=tuple(tools))


def written(chat):
    """What the model is trained to write in the last turn."""
    return turns(chat.messages).live[-1].text.removesuffix("\n").removesuffix(IM_END)


@settings(deadline=None, max_examples=150)
@given(typed_calls(), TEXT, TEXT, st.booleans())
def test_a_call_with_declared_types_reaches_the_program_as_it_was_trained(drawn, content, thought, calls):
    thought = thought if thought.strip() else ""
    assert chat_misreadings(chat_of(drawn[0], drawn[1] if calls else [], content, thought)) == []


@settings(deadline=None, max_examples=80)
@given(typed_calls(), st.sampled_from(["</parameter>", "</function>", "</tool_call>", "<parameter=", "<tool_call>"]), TEXT)
def test_a_tag_inside_a_value_is_never_silent(drawn, tag, text):
    tools = [{"function": {"name": "f", "parameters": {"properties": {"x": {"type": "string"}}}}}]
    call = {"function": {"name": "f", "arguments": {"x": f"a {tag}b> {text}"}}}
    read = read_served_calls(written(chat_of(tools, [call])), tools)
    if not (len(read) == 1 and read[0]["arguments"] == call["function"]["arguments"]):
        assert chat_misreadings(chat_of(tools, [call]))


def theirs(text):
    """The calls as the reader of transformers for this format of calls finds them, its values raw."""
    from transformers.cli.serving.utils import _TOOL_CALL_FALLBACKS
    from transformers.utils.chat_parsing_utils import recursive_parse

    schema = next(found["schema"] for kinds, found in _TOOL_CALL_FALLBACKS.items() if "qwen3_5" in kinds)
    return recursive_parse(text, schema) or []


@settings(deadline=None, max_examples=40)
@given(typed_calls())
def test_another_reader_of_the_format_finds_the_same_calls(drawn):
    """It keeps every value as text and trims it, so names, keys and trimmed texts are compared."""
    tools, calls = drawn
    text = written(chat_of(tools, calls))
    bare = [{"function": {"name": t["function"]["name"]}} for t in tools]  # nothing declared: our values stay text, too
    ours = read_served_calls(text, bare)
    found = theirs(text)
    assert [c["name"] for c in ours] == [c["name"] for c in found] == [c["function"]["name"] for c in calls]
    for a, b in zip(ours, found, strict=True):
        assert {k: v.strip() for k, v in a["arguments"].items()} == {k: str(v).strip() for k, v in (b.get("arguments") or {}).items()}


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(TEXT.filter(str.strip), TEXT, TEXT.filter(str.strip)), min_size=1, max_size=3))
def test_a_served_turn_sent_back_is_rendered_as_it_was_trained(rounds):
    messages = [m for asked, thought, answer in rounds for m in ({"role": "user", "content": asked}, {"role": "assistant", "content": answer} | ({"reasoning_content": thought.strip()} if thought.strip() else {}))]
    chat = parse_conversation({"messages": [*messages, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "yes"}]})
    said = {c.message: c.text.removesuffix("\n").removesuffix(IM_END) for c in turns(chat.messages).live if c.generated}
    back = [as_message(serve_turn(said[i], (), bool(m.get("reasoning_content")))) if i in said else m for i, m in enumerate(chat.messages)]
    assert render(back) == render(chat.messages)


@given(st.text(max_size=200), st.booleans())
@example("<tool_call>" * 3, True)
@example("<function=f><parameter=", False)
def test_whatever_a_model_writes_is_read_without_an_error(text, thinking):
    turn = serve_turn(text, [{"function": {"name": "f", "parameters": {"properties": {"x": {"type": "object"}}}}}], thinking)
    json.dumps(as_message(turn))


def test_a_long_number_keeps_its_digits():
    tools = [{"function": {"name": "f", "parameters": {"properties": {"x": {"type": "integer"}}}}}]
    assert chat_misreadings(chat_of(tools, [{"function": {"name": "f", "arguments": {"x": 2**60 + 1}}}])) == []


def test_counts_of_a_file():
    tools = [{"function": {"name": "f", "parameters": {"properties": {"x": {"type": "string"}}}}}]
    calls = [{"function": {"name": "f", "arguments": {"x": 7}}}, {"function": {"name": "f", "arguments": {"x": "7"}}}]
    found = served_parity([chat_of(tools, calls)])
    assert (found.turns, found.calls, len(found.misread)) == (1, 2, 1)
    assert "declared as string" in found.picture().text and "'7'" in found.picture().text
