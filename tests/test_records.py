"""Normal form of chats: what is accepted, what is refused, and that nothing invents text."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_nb.core import UserError
from nemotron_nb.data.records import BadRecord, Conversation, Reject, parse_conversation, parse_line, read_chats

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}


def parse(*messages, **more):
    return parse_conversation({"messages": list(messages), **more})


def reason(record):
    with pytest.raises(BadRecord) as error:
        parse_conversation(record)
    return error.value.reason


def test_null_and_absent_content_are_the_empty_string_and_never_the_word_none():
    for message in ({"role": "assistant", "content": None}, {"role": "assistant"}):
        assert parse(USER, message, ANSWER).messages[1] == {"role": "assistant", "content": ""}


def test_arguments_as_text_as_mapping_empty_and_null():
    def arguments(value):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": value}}
        return parse(USER, {"role": "assistant", "content": None, "tool_calls": [call]}).messages[1]["tool_calls"]

    assert arguments('{"a": null, "b": [1]}') == arguments({"a": None, "b": [1]}) == [{"name": "f", "arguments": {"a": None, "b": [1]}}]
    assert arguments("") == arguments(None) == arguments("  ") == arguments("null") == [{"name": "f", "arguments": {}}]


@pytest.mark.parametrize("arguments", ["{", "[1]", "3", '"text"', [1]])
def test_arguments_that_are_no_object_are_refused(arguments):
    assert reason({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]}) == "bad_arguments"


def test_legacy_function_call_is_a_tool_call():
    chat = parse(USER, {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}})
    assert chat.messages[1]["tool_calls"] == [{"name": "f", "arguments": {}}]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("<think>\nwhy\n</think>\nyes", ("why", "yes")),
        ("<think>why</think>yes", ("why", "yes")),
        ("  <think>\nwhy\n</think>\n\n yes", ("why", "\n yes")),
        ("<think></think>yes", (None, "yes")),
    ],
)
def test_inline_thinking_is_moved(content, expected):
    chat = parse(USER, {"role": "assistant", "content": content})
    assert (chat.messages[1].get("reasoning_content"), chat.messages[1]["content"]) == expected
    assert chat.repairs == (("inline_thinking",) if expected[0] else ())


@pytest.mark.parametrize("content", ["yes</think>", "<think>never closed", "a <think>b</think> c", "<think>a</think>b</think>"])
def test_stray_think_tags_are_refused(content):
    assert reason({"messages": [USER, {"role": "assistant", "content": content}]}) == "stray_think_tag"
    assert parse({"role": "user", "content": content}, ANSWER).messages[0]["content"] == content


def test_text_parts_are_joined_and_images_refused():
    assert parse({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, ANSWER).messages[0]["content"] == "ab"
    assert reason({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER]}) == "content_not_text"


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ([], "not_an_object"),
        ({}, "no_messages"),
        ({"messages": []}, "no_messages"),
        ({"messages": "[]"}, "no_messages"),
        ({"messages": "["}, "bad_json_text"),
        ({"messages": ["hi"]}, "message_not_object"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "unknown_role"),
        ({"messages": [{"content": "x"}]}, "unknown_role"),
        ({"messages": [USER]}, "no_assistant_turn"),
        ({"messages": [USER, ANSWER], "tools": [{}]}, "bad_tool"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"arguments": {}}]}]}, "bad_tool_call"),
        ({"messages": [USER, {"role": "assistant", "content": "\ud800"}]}, "not_unicode"),
    ],
)
def test_each_refusal_has_its_word(record, expected):
    assert reason(record) == expected


def test_messages_and_tools_as_json_text():
    plain = parse(USER, ANSWER, tools=[{"name": "f"}])
    assert parse_conversation({"messages": json.dumps([USER, ANSWER]), "tools": json.dumps([{"type": "function", "function": {"name": "f"}}])}).id == plain.id


def test_bom_crlf_and_blank_lines(tmp_path):
    path = tmp_path / "chats.jsonl"
    line = json.dumps({"messages": [USER, ANSWER]}).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n\n" + line)
    rows = list(read_chats(path))
    assert [type(r) for r in rows] == [Conversation, Conversation] and [r.line for r in rows] == [1, 4]


def test_one_bad_line_does_not_take_the_file_with_it(tmp_path):
    path = tmp_path / "chats.jsonl"
    good = json.dumps({"messages": [USER, ANSWER]}).encode()
    path.write_bytes(b"\n".join([good, b"{", b"\xff\xfe", good]))
    rows = list(read_chats(path))
    assert [getattr(r, "reason", None) for r in rows] == [None, "not_json", "not_utf8", None]
    assert rows[1] == Reject(str(path), 2, "not_json", "column 2: Expecting property name enclosed in double quotes")


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.touch(), lambda p: p.mkdir()])
def test_missing_empty_and_folder(tmp_path, make):
    make(tmp_path / "chats.jsonl")
    with pytest.raises(UserError, match="chats.jsonl"):
        list(read_chats(tmp_path / "chats.jsonl"))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60) | st.recursive(st.none() | st.booleans() | st.text(max_size=5), lambda v: st.lists(v, max_size=4) | st.dictionaries(st.sampled_from(["messages", "role", "content", "tools", "tool_calls", "function", "name", "arguments"]), v, max_size=5), max_leaves=12).map(lambda v: json.dumps(v).encode()))
def test_any_line_is_a_conversation_or_a_reject(data):
    assert isinstance(parse_line(data, "f", 1), (Conversation, Reject))
