"""Normal form of chats: what is accepted, what is refused, and that nothing invents text."""

import ast
import datetime
import gzip
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_nb.core import UserError, digest
from nemotron_nb.data import files, levels, records, sources
from nemotron_nb.data.records import REJECTS, REPAIRS, BadRecord, Conversation, Reject, parse_conversation, parse_line, parse_row, read_chats
from nemotron_nb.data.sample import sample_path
from nemotron_nb.data.template import render

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}


def parse(*messages, **more):
    return parse_conversation({"messages": list(messages), **more})


def reason(record):
    with pytest.raises(BadRecord) as error:
        parse_conversation(record)
    return error.value.reason


def test_null_and_absent_content_are_the_empty_string_and_never_the_word_none():
    for message in ({"role": "assistant", "content": None}, {"role": "assistant"}):
        assert reason({"messages": [USER, message, ANSWER]}) == "empty_turn"
        assert parse_conversation({"messages": [USER, message, ANSWER]}, allow_empty_turns=True).messages[1] == {"role": "assistant", "content": ""}


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


@pytest.mark.parametrize("content", ["a</think>yes</think>", "yes</think><think>", "<think>never closed", "a <think>b</think> c", "<think>a</think>b</think>"])
def test_stray_think_tags_are_refused(content):
    assert reason({"messages": [USER, {"role": "assistant", "content": content}]}) == "stray_think_tag"
    assert parse({"role": "user", "content": content}, ANSWER).messages[0]["content"] == content


def test_text_parts_are_joined_and_images_refused():
    assert parse({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, ANSWER).messages[0]["content"] == "a\nb"
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


# ---- repairs and refusals beyond the plain ones


def one(message, **more):
    """(the message in normal form without its role, repairs) of an assistant message behind a user's."""
    chat = parse(USER, {"role": "assistant"} | message, **more)
    return {k: v for k, v in chat.messages[1].items() if k != "role"}, chat.repairs


def call_text(name, arguments, lead=""):
    """A call as the chat format writes it, taken from the renderer."""
    text = render([USER, {"role": "assistant", "content": lead, "tool_calls": [{"name": name, "arguments": arguments}]}])
    return text.partition("<think></think>")[2].removesuffix("<|im_end|>\n")


parameter_text = st.text(st.sampled_from("a \n<>=/é{\"")) | st.sampled_from(["</b>", "1", "<think", "x\n\ny"])


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["", "Let me look.", "a < b"]), st.dictionaries(st.sampled_from(["a", "b", "long name"]), parameter_text, max_size=3), st.booleans())
def test_a_call_written_as_text_is_read_back_to_what_renders_it(lead, arguments, twice):
    text = call_text("f", arguments, lead)
    text += text[text.index("<tool_call>") :] if twice else ""
    message, repairs = one({"content": text})
    assert message == {"content": lead, "tool_calls": [{"name": "f", "arguments": arguments}] * (2 if twice else 1)} and repairs == ("call_text",)


GOOD_CALL = call_text("f", {"a": "1"})


@pytest.mark.parametrize(
    "content",
    [
        GOOD_CALL + "Done.",
        GOOD_CALL.replace("</function>\n", ""),
        GOOD_CALL.replace("\n</tool_call>", ""),
        GOOD_CALL.replace("<tool_call>\n", "<tool_call>"),
        GOOD_CALL.replace("\n1\n", "1"),
        GOOD_CALL.replace("1", "1\n</parameter>\n<parameter=a>\n2"),
        GOOD_CALL.replace("1", "<tool_call>"),
        GOOD_CALL.replace("1", "x </function>"),
        GOOD_CALL.replace("1", "x <parameter=b>"),
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
        "</tool_call>" + GOOD_CALL,
        "<tool_call>\n<function=f>\n" + "<parameter=a>\n1\n</parameter>\n" * 3000,
    ],
)
def test_a_call_written_otherwise_is_refused_and_only_by_the_assistant(content):
    for tools in ([], [{"name": "f"}]):
        assert reason({"messages": [USER, {"role": "assistant", "content": content}], "tools": tools}) == "call_text"
        for role in ("user", "system", "tool"):
            assert parse({"role": role, "content": content}, ANSWER, tools=tools).messages[0]["content"] == content
    assert reason({"messages": [USER, {"role": "assistant", "content": content, "tool_calls": [{"name": "f"}]}]}) == "call_text"


def test_calls_given_twice_are_refused():
    assert reason({"messages": [USER, {"role": "assistant", "content": GOOD_CALL, "tool_calls": [{"name": "f"}]}]}) == "call_text"


def test_blank_lines_before_a_thought_are_removed():
    assert one({"content": "4", "reasoning_content": " \n\n  r\n"}) == ({"content": "4", "reasoning_content": "  r\n"}, ("blank_lines_before_thought",))


@pytest.mark.parametrize("content", ["A call opens with <tool_call> and a line break.", "<tool_call>", "see <function=f>"])
def test_talk_about_the_format_is_text(content):
    assert one({"content": content}) == ({"content": content}, ())


def test_reasoning_under_either_name():
    assert one({"content": "4", "reasoning": "easy"}) == ({"content": "4", "reasoning_content": "easy"}, ("other_name:message.reasoning",))
    assert one({"content": "4", "reasoning": "easy", "reasoning_content": "easy"}) == ({"content": "4", "reasoning_content": "easy"}, ())
    assert one({"content": "4", "reasoning": None, "reasoning_content": "easy"}) == ({"content": "4", "reasoning_content": "easy"}, ())
    assert one({"content": "4", "reasoning": "easy", "reasoning_content": " "})[0] == {"content": "4", "reasoning_content": "easy"}
    assert reason({"messages": [USER, {"role": "assistant", "reasoning": "easy", "reasoning_content": "hard"}]}) == "two_thoughts"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [({"train": False}, False), ({"weight": 0}, False), ({"train": True}, True), ({"weight": 1.0}, True), ({"train": None}, None), ({"train": False, "weight": 0}, False)],
)
def test_train_flags(flags, expected):
    assert one({"content": "4"} | flags) == ({"content": "4"} | ({} if expected is None else {"train": expected}), ())
    assert parse(USER | flags, ANSWER).repairs == (("train_flag_ignored",) if expected else ())
    assert parse(USER | flags, ANSWER | flags).id == parse(USER, ANSWER).id


@pytest.mark.parametrize("flags", [{"train": 1}, {"train": "false"}, {"weight": True}, {"weight": 0.5}, {"weight": "0"}, {"weight": [0]}, {"train": True, "weight": 0}])
def test_bad_train_flags(flags):
    assert reason({"messages": [USER, ANSWER | flags]}) == "bad_train_flag"


def test_reasoning_budget():
    assert parse(USER, ANSWER).reasoning_budget is parse(USER, ANSWER, reasoning_budget=None).reasoning_budget is None
    assert [parse(USER, ANSWER, reasoning_budget=b).reasoning_budget for b in (0, 512, 512.0)] == [0, 512, 512]
    assert parse(USER, ANSWER, reasoning_budget=0).id == parse(USER, ANSWER).id
    for bad in (-1, 0.5, "512", True, float("nan"), float("inf"), [1]):
        assert reason({"messages": [USER, ANSWER], "reasoning_budget": bad}) == "bad_reasoning_budget"


def test_roles_of_other_times():
    developer = {"role": "developer", "content": "Be brief."}
    chat = parse(developer, {"role": "function", "name": "f", "content": "3"}, ANSWER)
    assert [m["role"] for m in chat.messages] == ["system", "tool", "assistant"] and chat.repairs == ("developer_role", "function_role")
    assert reason({"messages": [USER, developer, ANSWER]}) == "unknown_role"
    assert parse(USER, {"role": "system", "content": "s"}, ANSWER).messages[1] == {"role": "system", "content": "s"}


def test_unusual_orders_are_kept_and_counted():
    system = {"role": "system", "content": "s"}
    assert parse(system, ANSWER, USER).repairs == ("assistant_first",)
    assert parse(USER, ANSWER, ANSWER, ANSWER).repairs == ("consecutive_assistant",)
    assert parse(USER, ANSWER, system, ANSWER).repairs == ()


def test_a_key_that_is_left_out_is_named_and_an_empty_one_is_not():
    assert one({"content": "4", "mood": "no", "audio": None, "annotations": [], "name": "bot", "id": "m1"})[1] == ("ignored_key:message.mood",)
    assert parse(USER | {"reasoning_content": "hm"}, ANSWER).repairs == ("ignored_key:message.reasoning_content",)
    assert one({"content": "4", "k" * 1000: 1})[1] == ("ignored_key:message." + "k" * 40,)


def test_nulls_and_parts_are_counted():
    assert one({"content": None, "reasoning_content": "hm"}) == ({"content": "", "reasoning_content": "hm"}, ("null_content",))
    assert one({"content": None, "tool_calls": [{"name": "f", "arguments": None}]})[1] == ("no_arguments",)
    assert parse(USER, {"role": "tool", "content": [{"type": "text", "text": "3"}]}, ANSWER).repairs == ("joined_parts",)
    assert one({"content": "", "tool_calls": '[{"name": "f", "arguments": {"x": null}}]'}) == ({"content": "", "tool_calls": [{"name": "f", "arguments": {"x": None}}]}, ("json_text", "null_argument"))


def test_nulls_in_declarations_are_removed_unless_they_are_values():
    schema = {"type": "object", "properties": {"a": {"type": "string", "default": None, "enum": [None, "x"], "description": None}, "b": None}, "required": None}
    tool = {"type": "function", "function": {"name": "f", "description": None, "strict": False, "parameters": schema}}
    chat = parse(USER, ANSWER, tools=[tool])
    assert chat.repairs == ("null_in_tool",)
    assert chat.tools == ({"name": "f", "strict": False, "parameters": {"type": "object", "properties": {"a": {"type": "string", "default": None, "enum": [None, "x"]}}}},)
    assert parse(USER, ANSWER, tools=[{"name": "f", "description": "returns null"}]).repairs == ()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), datetime.date(2024, 5, 15), b"text", {1}])
def test_a_value_that_json_cannot_say_is_refused(value):
    assert reason({"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": value}}]}]}) == "not_json_value"
    assert reason({"messages": [USER, ANSWER], "tools": [{"name": "f", "strict": value}]}) == "not_json_value"


@pytest.mark.parametrize("text", ['{"x": NaN}', '{"x": 1, "x": 2}', '{"x": "\\ud83d"}'])
def test_json_text_inside_a_row_is_read_as_strictly(text):
    assert reason({"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": text}]}]}) == "bad_arguments"
    assert reason({"messages": [USER, ANSWER], "tools": f'[{{"name": "f", "parameters": {text}}}]'}) == "bad_json_text"


@pytest.mark.parametrize(("tools", "expected"), [([{"function": {"name": "f", "function": {"name": "g"}}}], "bad_tool"), ({"name": "f"}, "bad_tool"), ("{", "bad_json_text"), (["f"], "bad_tool")])
def test_bad_tools(tools, expected):
    assert reason({"messages": [USER, ANSWER], "tools": tools}) == expected


# ---- what holds for every chat


json_value = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4), lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3), max_leaves=6)
content = st.none() | st.sampled_from(["", "yes", " \n x", "<think>r</think>a", "<think>\n\n r\n</think>\n\nb", "<think></think>", "</think>", GOOD_CALL, "<tool_call>", "é\ud800", "\x7f\u2028\x00"]) | st.lists(st.just({"type": "text", "text": "p"}), max_size=2)
arguments = st.dictionaries(st.text(max_size=3), json_value, max_size=3)
function = st.fixed_dictionaries({"name": st.sampled_from(["f", "g"])}, optional={"arguments": st.none() | st.just("") | arguments | arguments.map(json.dumps)})
calls = st.none() | st.lists(function | function.map(lambda f: {"id": "1", "type": "function", "function": f}), max_size=2)
keys = {"content": content, "reasoning_content": content, "reasoning": st.none() | st.just("r"), "tool_calls": calls, "function_call": st.none() | function, "train": st.booleans() | st.none(), "weight": st.sampled_from([0, 1, None]), "x": json_value}
message = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool", "system", "developer", "function"])}, optional=keys) | st.fixed_dictionaries({"role": st.just("assistant"), "content": st.just("ok")})
tool = st.fixed_dictionaries({"name": st.just("f")}, optional={"description": st.none() | st.text(max_size=3), "parameters": json_value})
record = st.fixed_dictionaries({"messages": st.lists(message, min_size=1, max_size=4)}, optional={"tools": st.none() | st.lists(tool | tool.map(lambda t: {"type": "function", "function": t}), max_size=2), "reasoning_budget": st.none() | st.integers(0, 9)})


@settings(max_examples=500, deadline=None)
@given(record)
def test_the_normal_form_is_its_own_normal_form(raw):
    """What is in normal form is not changed again, is named by the digest of what it says, and holds no null that nobody wrote."""
    chat = parse_row(raw, "f", 1, allow_empty_turns=True)
    if isinstance(chat, Reject):
        assert chat.reason in REJECTS and chat.detail
        return
    again = parse_conversation({"messages": list(chat.messages), "tools": list(chat.tools), "reasoning_budget": chat.reasoning_budget}, allow_empty_turns=True)
    assert (again.messages, again.tools, again.id, again.reasoning_budget) == (chat.messages, chat.tools, chat.id, chat.reasoning_budget)
    assert set(again.repairs) <= {"assistant_first", "consecutive_assistant", "null_argument", "markup_in_argument", "undeclared_call"} and {r.partition(":")[0] for r in chat.repairs} <= set(REPAIRS)
    said = [{k: v for k, v in m.items() if k != "train"} for m in chat.messages]
    assert chat.id == digest({"messages": said, "tools": chat.tools})
    for m in chat.messages:
        assert isinstance(m["content"], str) and m.get("reasoning_content", "r").strip() and m.get("tool_calls", True)
        assert m["role"] in records.ROLES and m.keys() <= {"role", "content", "reasoning_content", "tool_calls", "train"}


@settings(max_examples=100, deadline=None)
@given(record)
def test_the_name_does_not_depend_on_the_packages_installed(raw):
    fast = parse_row(raw, "f", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "orjson", None)
        records._fast_writer.cache_clear()
        try:
            assert records._fast_writer() is None and parse_row(raw, "f", 1) == fast
        finally:
            records._fast_writer.cache_clear()


def test_the_names_of_the_sample_chats():
    """Splits, caches and published numbers hang on these names."""
    chats = list(read_chats(sample_path()))
    assert chats[0].id == digest({"messages": chats[0].messages, "tools": chats[0].tools})
    assert parse(USER, ANSWER).id == "95377ec3de10208d"


def naive_read(path):
    """The plain way: a file with lines, one after another."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            yield parse_line(line, str(path), number)


def mapping(arguments):
    """Arguments as an object, whichever way they are written."""
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def test_a_chat_is_the_same_in_every_format(tmp_path):
    """Arguments with different keys, no reasoning in most turns, tools with different parameters: all that makes a table fill in nulls."""
    rows = [json.loads(line) for line in sample_path().read_bytes().splitlines()[:60]]
    lines = "".join(json.dumps(r) + "\n" for r in rows).encode()
    texts = {k: [json.dumps(r[k]) if k in r else None for r in rows] for k in ("messages", "tools")}
    (tmp_path / "rows.jsonl").write_bytes(lines)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines))
    plain = [[m | {"tool_calls": [c["function"] | {"arguments": mapping(c["function"]["arguments"])} for c in m.get("tool_calls", ())]} for m in r["messages"]] for r in rows]
    pq.write_table(pa.table({"messages": pa.array(plain), "tools": pa.array([r.get("tools") for r in rows])}), tmp_path / "struct.parquet", row_group_size=7)
    assert "None" in str(pq.read_table(tmp_path / "struct.parquet").to_pylist())
    pq.write_table(pa.table(texts), tmp_path / "text.parquet")
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "rows.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    expected = list(naive_read(tmp_path / "rows.jsonl"))
    assert len(expected) == 60 and all(isinstance(c, Conversation) for c in expected) and any(c.tools for c in expected)
    for path in tmp_path.iterdir():
        chats = list(read_chats(path))
        assert [(c.id, c.messages, c.tools, c.line, c.source) for c in chats] == [(c.id, c.messages, c.tools, c.line, str(path)) for c in expected], path
        assert {c.repairs for c in chats} == {("json_text",)} if path.name == "text.parquet" else {c.repairs for c in expected}


def test_every_word_is_in_its_table_and_used():
    """No reason or repair outside the tables, none in them that nothing gives."""
    given_ = {"BadRecord": set(), "BadJson": set(), "_reject": set(), "note": set()}
    for module in (files, levels, records, sources):
        for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
            name = getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
            if name in given_:
                given_[name] |= {a.value for arg in node.args for a in ast.walk(arg) if isinstance(a, ast.Constant) and a.value in {**REJECTS, **REPAIRS}}
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("other_form:"):
                given_["note"].add("other_form")
    reasons = given_["BadRecord"] | given_["BadJson"] | given_["_reject"] | {"not_utf8", "bad_value"}
    assert reasons == set(REJECTS) and given_["note"] == set(REPAIRS)
    with pytest.raises(KeyError):
        BadRecord("because", "it looks wrong")
