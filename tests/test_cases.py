"""Rows as other programs write them: what is trained of each, what is noted, and that the command that shows a row and the one that prepares it read the same."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemotron_nb.core import UserError
from nemotron_nb.data.blend import Dataset
from nemotron_nb.data.files import Reject, read_unit, units
from nemotron_nb.data.inspect import inspect_file, inspect_row
from nemotron_nb.data.prep import PrepConfig, prepare
from nemotron_nb.data.sample import sample_path
from nemotron_nb.data.shards import read_packs
from nemotron_nb.data.tokenized import RowSettings, Spooled, Task, tokenize_unit
from nemotron_nb.data.tokenizer import load_tokenizer

CASES = Path(__file__).parent / "cases"
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CITY = [{"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]


def case(number):
    return next(CASES.glob(f"{number:02d}-*.jsonl"))


def write(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def prepared(path, folder, **options):
    """line -> [(ids, mask)] or the reason, as data preparation tokenizes the rows of a file; and what it noted."""
    how, found, notes = RowSettings(Dataset("rows", str(path)), "tiny", **options), {}, Counter()
    for number, unit in enumerate(units(path)):
        tokenize_unit(Task(unit, how, str(folder / f"unit{number}")))
        spool = Spooled(folder / f"unit{number}")
        ends = np.cumsum(spool.lengths)
        for k, chat in enumerate(spool.conversation):
            place = slice(int(ends[k] - spool.lengths[k]), int(ends[k]))
            found.setdefault(int(spool.lines[chat]), []).append((spool.tokens[place].tolist(), spool.mask[place].tolist()))
        found |= {r["line"]: r["reason"] for r in [*spool.record["rejects"], *spool.record["left_out"]]}
        notes.update(spool.record["repairs"])
    return found, notes


def shown(path, line, **options):
    """The same of one row, as `nemotron inspect` shows it."""
    found = inspect_row(path, line, RowSettings(Dataset("rows", str(path)), "tiny", **options))
    if isinstance(found, Reject):
        return found.reason
    return [(s.input_ids.tolist(), s.loss_mask.tolist()) for s in found.sequences] or "nothing_trained"


def read(path, line=1, **options):
    """(trained text of each sequence, whole text of each, notes) of a row, or the reason why there is none."""
    found = inspect_row(path, line, RowSettings(Dataset("rows", str(path)), "tiny", **options))
    if isinstance(found, Reject):
        return found.reason
    assert all(p.same for p in found.parity)
    decode = found.tokenizer.decode
    return [decode(s.input_ids[s.loss_mask == 1].tolist()) for s in found.sequences], [decode(s.input_ids.tolist()) for s in found.sequences], found.conversation.repairs


def row(tmp_path, value, **options):
    return read(write(tmp_path / "row.jsonl", [value]), 1, **options)


CALLED = "\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>\n<|im_end|>\nIt is 18 C.<|im_end|>\n"

# number of the case -> for each row: the trained text of its sequences and the notes, or the reason why it is refused
EXPECTED = {
    1: [(["r\n</think>\nIt is mild.<|im_end|>\n"], ())] * 12,
    2: [([CALLED], ("null_in_tool", "null_argument_removed"))],
    3: [([CALLED], ("json_text",))],
    5: [([CALLED], ("other_name:call.parameters",))],
    6: [([CALLED], ("other_name:call.args",))],
    9: [(["Mild.<|im_end|>\n"], ("other_name:message.text",))] * 12,
    11: ["empty_turn"],
    12: [(["good<|im_end|>\n"], ("other_form:sharegpt",))] * 12,
    14: [(["R\n</think>\na<|im_end|>\n"], ("other_form:sharegpt",))],
    15: [([CALLED], ("other_name:row.functions", "function_role"))],
    16: [(["Paris, spring\n</think>\nMild.<|im_end|>\n"], ("other_name:message.thinking",))] * 12,
    17: [(["good<|im_end|>\n"], ())] * 5,
    18: ["bad_train_flag"] * 3,
    19: [(["Mild.<|im_end|>\n"], ("empty_thought",))],
    22: [(["It is 18 C.<|im_end|>\n"], ("joined_parts",))],
    23: [(["r\n</think>\nIt is mild.<|im_end|>\n", "r2\n</think>\nIt is mild.<|im_end|>\n"], ())],
    24: [(["It is 18 C.<|im_end|>\n"], ())],
    28: [(["r\n</think>\nIt is mild.<|im_end|>\n", "r2\n</think>\nIt is mild.<|im_end|>\n"], ())],
    29: [([CALLED.replace("</function>", "<parameter=unit>\nNone\n</parameter>\n</function>")], ("null_argument",))],
    31: [([CALLED], ())] * 2 + [([CALLED.replace("<parameter=city>\nParis\n</parameter>\n", "")], ("no_arguments",))] * 3 + [([CALLED.replace("<parameter=city>\nParis\n</parameter>\n", "")], ())] + [([CALLED.replace("<parameter=city>\nParis\n</parameter>\n", "")], ("no_arguments",))],
    32: ["bad_arguments"] * 10,
    33: [(["It is 18 C.<|im_end|>\n"], ("developer_role",)), "unknown_role", "unknown_role", "unknown_role", (["It is 18 C.<|im_end|>\n"], ()), (["It is 18 C.<|im_end|>\nIt is 18 C.<|im_end|>\n"], ())],
    35: [([CALLED.replace("<|im_end|>\nIt", "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>\n<|im_end|>\nIt")], ())],
}


def test_every_case_has_its_expectation():
    assert {int(p.name[:2]) for p in CASES.glob("*.jsonl")} == set(EXPECTED)


@pytest.mark.parametrize("number", EXPECTED)
def test_what_is_trained_of_a_case(number):
    got = [read(case(number), line) for line, _ in enumerate(EXPECTED[number], 1)]
    assert [g if isinstance(g, str) else (g[0], g[2]) for g in got] == EXPECTED[number]
    assert len(case(number).read_text().splitlines()) == len(EXPECTED[number])


@pytest.mark.parametrize("number", EXPECTED)
def test_inspect_and_preparation_read_a_case_alike(number, tmp_path):
    found, _ = prepared(case(number), tmp_path)
    assert found == {line: shown(case(number), line) for line in range(1, len(EXPECTED[number]) + 1)}


def test_what_stands_around_the_trained_text_of_some_cases():
    whole = {n: read(case(n))[1] for n in (1, 3, 12, 15, 22, 23, 28, 35)}
    assert whole[1][0].count("Weather in Paris0?\n\n{thinking token budget: 128}<|im_end|>") == 1
    for n in (3, 15):
        assert "<parameters>\n<parameter>\n<name>city</name>\n<type>string</type>\n</parameter>\n<required>[\"city\"]</required>\n</parameters>" in whole[n][0]
    assert "<think></think>BAD<|im_end|>" in whole[12][0] and "first\nsecond<|im_end|>" in whole[22][0]
    asked = "\n\n{reasoning effort: low}<|im_end|>"
    assert [w.count(asked) for w in whole[23]] == [1, 1] and "and Rome?" + asked in whole[23][1] and "Weather in Paris?<|im_end|>" in whole[23][1]
    assert "<think>\nr\n</think>\nIt is mild.<|im_end|>\n<|im_start|>user\nand Rome?" in whole[28][1]
    assert "<tool_response>\n18\n</tool_response>\n<tool_response>\n25\n</tool_response>\n<|im_end|>" in whole[35][0]


def test_the_sample_chats_are_read_alike_by_both(tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(line + "\n" for line in sample_path().read_text(encoding="utf-8").splitlines()[::9]), encoding="utf-8")
    for mode in ("all", "last_turn"):
        found, notes = prepared(few, tmp_path / mode, loss_mode=mode)
        assert not notes and len(found) == 45 and found == {line: shown(few, line, loss_mode=mode) for line in found}


# ---- other spellings, other levels


@pytest.mark.parametrize("name", ["arguments", "args", "input", "parameters", "params", "kwargs", "Arguments", "toolInput"])
@pytest.mark.parametrize("form", ["flat", "wrapped", "beside", "named", "text"])
def test_arguments_under_any_name_and_in_any_form(tmp_path, name, form):
    given = {name: {"city": "Paris"}}
    call = {"flat": {"name": "get_weather"} | given, "wrapped": {"function": {"name": "get_weather"} | given}, "beside": {"function": {"name": "get_weather"}} | given}
    call |= {"named": {"function": "get_weather"} | given, "text": json.dumps({"name": "get_weather"} | given)}
    chat = {"messages": [USER, {"role": "assistant", "tool_calls": [call[form]]}, {"role": "tool", "content": "18"}, {"role": "assistant", "content": "It is 18 C."}], "tools": CITY}
    trained, _, notes = row(tmp_path, chat)
    assert trained == [CALLED] and (any(n.startswith("other_name:") for n in notes) == (name != "arguments"))


@pytest.mark.parametrize("call", [{"name": "f", "payload": {"city": "Paris"}}, {"name": "f", "arguments": {}, "payload": {"city": "Paris"}}, {"name": "f", "arguments": "", "payload": "Paris"}, {"function": {"name": "f", "arguments": {}}, "payload": '{"city": "Paris"}'}, {"function": {"name": "f"}, "city": "Paris"}, {"name": "f", "arguments": {"a": 1}, "args": {"a": 2}}, {"name": "f", "arguments": [{"name": "a"}]}, {"name": "f", "arguments": {"a>b": 1}}, {"name": "f", "arguments": {"a\nb": 1}}, {"function": {"name": "f", "arguments": {"a": 1}}, "arguments": {"a": 2}}, {"name": "f", "arguments": '{"a": NaN}'}, {"name": "f", "arguments": '{"a": 1, "a": 2}'}, {"name": "f>", "arguments": {}}, {"function": {"function": {"name": "f"}}}, {"name": 3}, 3, "f"])
def test_a_call_that_would_be_trained_otherwise_is_refused(tmp_path, call):
    assert row(tmp_path, {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}) in ("bad_arguments", "bad_tool_call", "two_values")


@pytest.mark.parametrize("value", ["x\n</parameter>\n<parameter=b>\ny", "</tool_call>", {"code": ["a </function> b"]}])
def test_markup_in_a_value_is_counted(tmp_path, value):
    assert row(tmp_path, {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": value}}]}]})[2] == ("markup_in_argument",)


@pytest.mark.parametrize("flag", [{"train": False}, {"weight": 0}, {"loss": False}, {"loss": 0}, {"loss_mask": 0}, {"lossMask": 0.0}, {"trainable": False}, {"training": False}, {"loss_weight": 0}, {"mask": True}, {"masked": True}, {"ignore": True}, {"is_masked": True}, {"train": False, "mask": True}])
@pytest.mark.parametrize("form", ["messages", "sharegpt"])
def test_a_turn_that_somebody_marked_is_not_trained(tmp_path, flag, form):
    bad, good = {"role": "assistant", "content": "BAD"} | flag, {"role": "assistant", "content": "good"}
    chat = {"messages": [USER, bad, USER, good]} if form == "messages" else {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "BAD"} | flag, {"from": "human", "value": "q"}, {"from": "gpt", "value": "good"}]}
    assert row(tmp_path, chat)[0] == ["good<|im_end|>\n"]


@pytest.mark.parametrize("flag", [{"loss": 0.5}, {"loss_mask": [0, 1]}, {"mask": 1}, {"mask": "yes"}, {"trainable": "false"}, {"train": True, "mask": True}, {"loss": False, "weight": 1}, {"loss_scale": 2}])
def test_a_flag_that_is_a_riddle_is_refused_at_every_level(tmp_path, flag):
    assert row(tmp_path, {"messages": [USER, ANSWER | flag]}) == "bad_train_flag"
    assert row(tmp_path, {"messages": [USER, ANSWER]} | flag) == "bad_train_flag"
    assert row(tmp_path, {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"} | flag]}) == "bad_train_flag"
    assert row(tmp_path, {"instruction": "q", "output": "a"} | flag) == "bad_train_flag"


def test_a_flag_of_the_row_holds_for_turns_without_one(tmp_path):
    chat = {"messages": [USER, ANSWER | {"train": True}, USER, {"role": "assistant", "content": "BAD"}], "loss": False}
    assert row(tmp_path, chat)[::2] == (["a<|im_end|>\n"], ("train_flag_of_row",))
    assert row(tmp_path, {"messages": [USER, ANSWER], "mask": "User"})[0] == ["a<|im_end|>\n"]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking", "thought", "reasoning_text", "reasoningContent", "Thinking", "chain_of_thought"])
@pytest.mark.parametrize("form", ["messages", "sharegpt", "alpaca"])
def test_a_thought_under_any_name(tmp_path, name, form):
    given = {name: "R"}
    chat = {"messages": {"messages": [USER, ANSWER | given]}, "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"} | given]}, "alpaca": {"instruction": "q", "output": "a"} | given}[form]
    assert row(tmp_path, chat)[0] == ["R\n</think>\na<|im_end|>\n"]


@pytest.mark.parametrize(("more", "expected"), [({"thinking": "x", "reasoning": "y"}, "two_thoughts"), ({"my_thoughts": "x"}, "unread_key"), ({"reasoning_details": [{"text": "x"}]}, "unread_key"), ({"pre_loss_mask": False}, "unread_key"), ({"text": "b"}, "two_values"), ({"refusal": "no"}, "two_values"), ({"reasoning": 3}, "content_not_text")])
def test_what_could_matter_and_is_not_plain_is_refused(tmp_path, more, expected):
    assert row(tmp_path, {"messages": [USER, ANSWER | more]}) == expected


def test_thoughts_inside_the_content(tmp_path):
    def says(content, **more):
        return row(tmp_path, {"messages": [USER, {"role": "assistant", "content": content} | more]})

    one = ["R\n</think>\na<|im_end|>\n"]
    assert says("R</think>a")[::2] == (one, ("open_thought",)) and says("R\n</think>\na")[::2] == (one, ("open_thought",))
    assert says("<think>\nR\n</think>\na", reasoning_content="R")[::2] == (one, ("inline_thinking",))
    assert says("<think>\nR\n</think>\na", thinking="S") == "two_thoughts"
    assert says([{"type": "thinking", "thinking": "R"}, {"type": "text", "text": "a"}])[::2] == (one, ("thought_part",))
    for empty in ("<think>\n\n</think>\n\na", "<think></think>\n\na", "\n<think> </think>\na"):
        assert says(empty)[::2] == (["a<|im_end|>\n"], ("empty_thought",))
    assert says("<think></think>a")[2] == () and says("R</think>a</think>") == "stray_think_tag"


@pytest.mark.parametrize("message", [{"content": ""}, {"content": " \n"}, {"content": None}, {}, {"text": ""}, {"content": "", "tool_calls": []}, {"content": "<think></think>"}, {"audio": {"id": "x"}}])
def test_a_turn_that_says_nothing_is_refused_unless_it_is_asked_for(tmp_path, message):
    chat = {"messages": [USER, {"role": "assistant"} | message]}
    assert row(tmp_path, chat) == "empty_turn" and row(tmp_path, chat, allow_empty_turns=True)[0] == ["<|im_end|>\n"]
    assert row(tmp_path, {"messages": [USER, {"role": "assistant", "train": False} | message, USER, ANSWER]})[0] == ["a<|im_end|>\n"]


def test_a_refusal_is_an_answer(tmp_path):
    assert row(tmp_path, {"messages": [USER, {"role": "assistant", "content": None, "refusal": "No."}]})[::2] == (["No.<|im_end|>\n"], ("other_name:message.refusal",))
    assert row(tmp_path, {"messages": [USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}]})[0] == ["No.<|im_end|>\n"]


@pytest.mark.parametrize("message", [{"role": "tool", "output": "18"}, {"role": "tool", "content": None, "result": {"t": 18}}, {"role": "user", "parts": [{"text": "q"}]}, {"role": "system", "prompt": "Be brief."}, {"role": "assistant", "reasoning": "R", "answer": "a"}, {"role": "assistant", "answer": "a", "train": False}])
def test_what_is_said_under_an_unknown_name_is_never_lost(tmp_path, message):
    """Elsewhere it would be a count; without content it is the message."""
    assert row(tmp_path, {"messages": [message, USER, ANSWER]}) == "unread_key"
    assert not isinstance(row(tmp_path, {"messages": [message | {"content": "c"}, USER, ANSWER]}), str)


@pytest.mark.parametrize(("calls", "results", "noted"), [("ab", "ab", False), ("ab", "ba", True), ("a", "b", True), ("", "a", True), ("a", "aa", True), ("  ", "ab", False), ("ab", "  ", False), ("", " ", False)])
def test_results_that_name_other_calls_are_counted(tmp_path, calls, results, noted):
    ids = lambda key, letter: {key: letter} if letter.strip() else {}
    made = [{"name": "get_weather", "arguments": {"city": "Paris"}} | ids("id", c) for c in calls]
    chat = {"messages": [USER, ANSWER | {"tool_calls": made}, *({"role": "tool", "content": "18"} | ids("tool_call_id", r) for r in results), ANSWER], "tools": CITY}
    assert ("unmatched_result" in row(tmp_path, chat)[2]) == noted


def test_a_call_of_a_tool_that_is_not_declared_is_counted(tmp_path):
    chat = {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "other", "arguments": {}}]}], "tools": CITY}
    assert row(tmp_path, chat)[2] == ("undeclared_call",)
    assert row(tmp_path, chat | {"tools": [{"name": "other"}]})[2] == ()


def test_what_nobody_reads_is_counted_by_level_and_key(tmp_path):
    call = {"id": "1", "mood": "call", "function": {"name": "get_weather", "arguments": {"city": "Paris"}, "mood": "function"}}
    chat = {"messages": [USER | {"mood": "x"}, {"role": "assistant", "tool_calls": [call]}], "tools": [{"type": "function", "function": CITY[0], "mood": "tool"}], "mood": "row", "uuid": "7"}
    assert set(row(tmp_path, chat)[2]) == {f"ignored_key:{level}.mood" for level in ("row", "message", "call", "function", "tool")}
    assert "ignored_key:Alpaca row.mood" in row(tmp_path, {"instruction": "q", "output": "a", "mood": "x"})[2]
    assert "ignored_key:turn.mood" in row(tmp_path, {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "mood": "x"}]})[2]


@pytest.mark.parametrize("parameters", [["city"], 3, "city", {"properties": ["city"]}, {"properties": {"city": 3}}, {"properties": {"city": ["string"]}}, {"properties": "{"}])
def test_parameters_that_would_not_be_declared_are_refused(tmp_path, parameters):
    assert row(tmp_path, {"messages": [USER, ANSWER], "tools": [{"name": "f", "parameters": parameters}]}) in ("bad_tool", "bad_json_text")


@pytest.mark.parametrize("level", ["tools", "tool", "function", "parameters", "properties", "city", "messages", "message", "tool_calls", "call", "arguments"])
def test_json_text_at_any_level_is_parsed(tmp_path, level):
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    text = lambda value, here: json.dumps(value) if level == here else value
    schema["properties"] = text({"city": text(schema["properties"]["city"], "city")}, "properties")
    tool = text({"type": "function", "function": text({"name": "get_weather", "parameters": text(schema, "parameters")}, "function")}, "tool")
    call = text({"function": {"name": "get_weather", "arguments": text({"city": "Paris"}, "arguments")}}, "call")
    answer = text({"role": "assistant", "tool_calls": text([call], "tool_calls")}, "message")
    chat = {"messages": text([USER, answer, {"role": "tool", "content": "18"}, {"role": "assistant", "content": "It is 18 C."}], "messages"), "tools": text([tool], "tools")}
    trained, whole, notes = row(tmp_path, chat)
    assert trained == [CALLED] and notes == (() if level == "arguments" else ("json_text",)) and "<name>city</name>\n<type>string</type>" in whole[0]


def test_nulls_that_a_table_fills_in(tmp_path):
    def arguments(value, tools=CITY):
        trained, _, notes = row(tmp_path, {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "get_weather", "arguments": value}]}], "tools": tools})
        return [part.partition(">")[0] for part in trained[0].split("<parameter=")[1:]], notes

    nested = [{"name": "get_weather", "parameters": {"properties": {"city": {}, "where": {"type": "object", "properties": {"x": {}}}, "list": {"items": {"properties": {"y": {}}}}}}}]
    assert arguments({"city": "Paris", "query": None}) == (["city"], ("null_argument_removed",))
    assert arguments({"city": None}) == (["city"], ("null_argument",))
    assert arguments('{"city": "Paris", "query": null}') == (["city", "query"], ("null_argument",))
    assert arguments({"city": "Paris", "query": None}, []) == (["city", "query"], ("null_argument",))
    assert arguments({"where": {"x": 1, "z": None}, "list": [{"y": 1, "z": None}]}, nested) == (["where", "list"], ("null_argument_removed",))


# ---- what the row says about itself


def test_switches_of_a_row(tmp_path):
    chat = {"messages": [USER, ANSWER | {"reasoning_content": "r"}]}
    for spelled in ({"reasoning_budget": 9}, {"chat_template_kwargs": {"reasoning_budget": 9}}, {"thinking_budget": 9, "chat_template_kwargs": '{"reasoning_budget": 9}'}):
        assert "q\n\n{thinking token budget: 9}<|im_end|>" in row(tmp_path, chat | spelled)[1][0]
    for spelled in ({"low_effort": True}, {"chat_template_kwargs": {"low_effort": True}}, {"low_effort": None, "chat_template_kwargs": {"low_effort": True}}):
        assert "q\n\n{reasoning effort: low}<|im_end|>" in row(tmp_path, chat | spelled)[1][0]
    both = row(tmp_path, chat | {"low_effort": True, "reasoning_budget": 9})[1][0]
    assert "q\n\n{reasoning effort: low}\n\n{thinking token budget: 9}<|im_end|>" in both
    for wrong, reason in (({"reasoning_budget": "9"}, "bad_reasoning_budget"), ({"low_effort": "yes"}, "bad_low_effort_flag"), ({"chat_template_kwargs": [1]}, "bad_template_kwargs"), ({"chat_template_kwargs": {"enable_thinking": False}}, "bad_template_kwargs"), ({"reasoning_budget": 1, "chat_template_kwargs": {"reasoning_budget": 2}}, "two_values")):
        assert row(tmp_path, chat | wrong) == reason
    assert row(tmp_path, chat | {"chat_template_kwargs": {"tone": "glad"}})[2] == ("ignored_key:chat_template_kwargs.tone",)


@pytest.mark.parametrize("template", ["nano3", "jinja"])
def test_switches_of_a_row_hold_in_every_template(tmp_path, template):
    """Low effort and kept thoughts, in the format's own Jinja text as in the fast renderer."""
    from nemotron_nb.data.template import template_path

    spec = {"nano3": "nano3", "jinja": str(write(tmp_path / "copy.jinja", [template_path("nano3").read_text()]))}[template]
    chat = {"messages": [USER, ANSWER | {"reasoning_content": "r"}, USER, ANSWER | {"reasoning_content": "s"}], "low_effort": True, "chat_template_kwargs": {"truncate_history_thinking": False}}
    _, whole, _ = row(tmp_path, chat, chat_template=spec)
    assert [w.count("{reasoning effort: low}") for w in whole] == [1, 1] and [w.count("<think>\nr\n</think>") for w in whole] == [1, 1]


def test_a_system_text_beside_the_messages(tmp_path):
    assert row(tmp_path, {"messages": [USER, ANSWER], "system": "Be brief."})[1][0].startswith("<|im_start|>system\nBe brief.<|im_end|>")
    assert row(tmp_path, {"messages": [{"role": "system", "content": "s"}, USER, ANSWER], "system_prompt": "other"}) == "two_values"


def test_alpaca_and_sharegpt_rows_keep_what_they_hold(tmp_path):
    alpaca = {"instruction": "q", "input": "", "output": "a", "history": [["before", "answer"]]}
    assert row(tmp_path, alpaca)[0] == ["answer<|im_end|>\na<|im_end|>\n"]
    assert row(tmp_path, alpaca | {"history": ["before"]}) == row(tmp_path, alpaca | {"input": 3}) == "content_not_text"
    call = {"from": "gpt", "value": None, "tool_calls": [{"name": "get_weather", "arguments": {"city": "Paris"}}]}
    for turn in (call, {"from": "function_call", "value": json.dumps(call["tool_calls"][0])}):
        chat = {"conversations": [{"from": "human", "value": "q"}, turn, {"from": "observation", "value": "18"}, {"from": "gpt", "value": "It is 18 C."}], "tools": json.dumps(CITY)}
        assert row(tmp_path, chat)[0] == [CALLED]


def test_a_form_that_cannot_be_told_is_named_with_the_way_to_it(tmp_path, capsys):
    path = write(tmp_path / "pairs.jsonl", [{"prompt": "q", "completion": "a"}])
    assert inspect_file(path, 1) == 1
    said = capsys.readouterr().err
    assert '"format": "ResponseDataset"' in said and '"input_key": "prompt"' in said


def test_json_for_programs_and_nothing_folded(tmp_path, capsys):
    long = [USER, ANSWER | {"content": "word " * 5000}, USER, ANSWER]
    path = write(tmp_path / "chats.jsonl", [{"messages": long}, {"messages": [USER]}])
    assert inspect_file(path, 1, as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    (sequence,) = told["sequences"]
    assert sequence["user_turns"] == [1, 2] and sequence["trained"] == sum(sequence["loss_mask"]) and len(sequence["input_ids"]) == sequence["tokens"]
    assert inspect_file(path, 2, as_json=True) == 1 and json.loads(capsys.readouterr().out)["reason"] == "no_assistant_turn"
    assert inspect_file(path, 1, full=True) == 0
    full = capsys.readouterr().out
    assert full.count("word") == 5000 and "user turns 1 to 2" in full
    assert inspect_file(path, 1) == 0 and capsys.readouterr().out.count("word") < 5000


# ---- tables


def test_a_file_without_rows_is_told_in_words(tmp_path):
    pq.write_table(pa.table({"messages": pa.array([], pa.string())}), tmp_path / "none.parquet")
    with pytest.raises(UserError, match="holds no rows"):
        inspect_file(tmp_path / "none.parquet")


def test_rows_kept_as_json_by_datasets(tmp_path):
    """Lists of JSON text, as `datasets` writes columns of mixed types to Parquet."""
    calls = [{"id": "1", "type": "function", "function": {"name": n, "arguments": a}} for n, a in (("w", {"city": "Paris"}), ("s", {"limit": 3}), ("s", {"limit": "x"}))]
    rows = [[json.dumps(m) for m in (USER, {"role": "assistant", "content": None, "tool_calls": [c]}, {"role": "tool", "content": "r"}, {"role": "assistant", "content": "done"})] for c in calls]
    pq.write_table(pa.table({"messages": rows, "tools": [json.dumps(CITY)] * 3}), tmp_path / "rows.parquet")
    found, notes = prepared(tmp_path / "rows.parquet", tmp_path)
    assert len(found) == 3 and all(isinstance(f, list) for f in found.values()) and notes == {"json_text": 3, "undeclared_call": 3}
    datasets = pytest.importorskip("datasets")
    plain = [{"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [c]}, {"role": "tool", "content": "r", "tool_call_id": "1"}, {"role": "assistant", "content": "done"}]} for c in calls * 4]
    datasets.Dataset.from_list(plain, on_mixed_types="use_json").to_parquet(str(tmp_path / "hf.parquet"))
    found, _ = prepared(tmp_path / "hf.parquet", tmp_path / "hf")
    assert len(found) == 12 and all(isinstance(f, list) for f in found.values())


def test_a_folder_of_save_to_disk_is_read_without_its_state_and_its_caches(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list([{"messages": [USER | {"content": f"q{i}"}, ANSWER]} for i in range(12)])
    made.save_to_disk(tmp_path / "set")
    (tmp_path / "set" / "cache-0123.arrow").write_bytes((tmp_path / "set" / "data-00000-of-00001.arrow").read_bytes())
    datasets.DatasetDict({"train": made, "test": made.select(range(2))}).save_to_disk(tmp_path / "sets")
    for path, rows in (("set", 12), ("sets", 14)):
        blend = write(tmp_path / f"{path}.json", [{"datasets": [{"name": "a", "path": str(tmp_path / path)}]}])
        made_of = prepare(PrepConfig(blend_path=str(blend), output_dir=str(tmp_path / f"out-{path}"), workers=1))
        assert (made_of["rows"], made_of["accepted"]) == (rows, rows)


# ---- preparation as a whole


@pytest.mark.parametrize("number", [24, 1])
def test_few_chats_are_trained_on_though_their_split_is_another(number, tmp_path):
    """With every seed: a hash says where a chat belongs, and a single one may fall to the held-out part."""
    for seed in range(8):
        ratios = {"train_ratio": 0.2, "valid_ratio": 0.4, "test_ratio": 0.4}
        made = prepare(PrepConfig(path=str(case(number)), output_dir=str(tmp_path / f"out{seed}"), workers=1, seed=seed, pack_size=0, **ratios))
        assert made["splits"]["train"]["packs"] >= 1


@pytest.mark.parametrize("number", [24, 1])
def test_one_chat_is_prepared(number, tmp_path):
    made = prepare(PrepConfig(path=str(case(number)), output_dir=str(tmp_path / "out"), workers=1, valid_ratio=0.0 if number == 1 else 0.01, test_ratio=0.02 if number == 1 else 0.01))
    assert made["splits"]["train"]["packs"] >= 1


@pytest.mark.parametrize(("number", "form", "trained"), [(11, "alpaca", {}), (12, "sharegpt", {"good": 12}), (14, "sharegpt", {"R": 1})])
def test_a_case_whose_form_is_given_in_a_blend(number, form, trained, tmp_path):
    blend = write(tmp_path / "blend.json", [{"datasets": [{"name": "sg", "path": str(case(number)), "format": form}]}])
    options = {"blend_path": str(blend), "output_dir": str(tmp_path / "out"), "workers": 1, "valid_ratio": 0.0, "test_ratio": 0.0, "train_ratio": 1.0}
    if not trained:
        with pytest.raises(UserError, match="empty_turn"):
            prepare(PrepConfig(**options))
        return
    made = prepare(PrepConfig(**options))
    tokenizer, packs = load_tokenizer(made.folder / "tokenizer"), read_packs(made.folder / "splits" / "train")
    said = [tokenizer.decode(p.input_ids[a + 1 : b][p.loss_mask[a : b - 1] == 1].tolist()) for p in packs for a, b in p.spans]
    ((word, count),) = trained.items()
    assert len(said) == made["accepted"] == count and all(word in text and "BAD" not in text for text in said)


def test_lost_chats_count_as_bad_and_marked_ones_do_not(tmp_path):
    thought = {"role": "assistant", "content": "a", "reasoning_content": "r"}
    lost, marked = {"messages": [thought, USER]}, {"messages": [USER, ANSWER | {"train": False}]}
    found, _ = prepared(write(tmp_path / "rows.jsonl", [lost, marked, {"messages": [USER, ANSWER, USER]}]), tmp_path, loss_mode="all")
    assert found[1] == found[2] == "nothing_trained" and isinstance(found[3], list)
    with pytest.raises(UserError, match="1 of 2 rows cannot be used"):
        prepare(PrepConfig(path=str(write(tmp_path / "lost.jsonl", [lost, {"messages": [USER, ANSWER]}])), output_dir=str(tmp_path / "out"), workers=1))
    with pytest.raises(UserError, match="set train: true"):
        prepare(PrepConfig(path=str(write(tmp_path / "marked.jsonl", [marked])), output_dir=str(tmp_path / "out2"), workers=1))


# ---- random rows: both read the same, and no row ends in anything but a chat or a word


value = st.recursive(st.none() | st.booleans() | st.integers(-1, 2) | st.sampled_from(["", "a", "</parameter>", '{"a": 1}', "[", "R</think>a", "<think>\n\n</think>\n\nb"]), lambda v: st.lists(v, max_size=2) | st.dictionaries(st.sampled_from(["city", "name", "arguments", "function", "type", "text", "a>b"]), v, max_size=2), max_leaves=4)
names = ["content", "text", "refusal", "thinking", "reasoning", "loss", "mask", "weight", "tool_calls", "function_call", "mood", "audio"]
message = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "assistant", "tool"]), "content": st.sampled_from(["a", "b", ""])}, optional={n: value for n in names[1:]} | {"tool_calls": st.lists(st.fixed_dictionaries({"name": st.just("get_weather")}, optional={n: value for n in ("arguments", "args", "input", "x")}), max_size=2)})
turn = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]), "value": st.sampled_from(["a", "", None])}, optional={n: value for n in names})
switches = {"reasoning_budget": value, "low_effort": st.booleans() | st.none(), "chat_template_kwargs": st.none() | st.fixed_dictionaries({}, optional={"truncate_history_thinking": st.booleans(), "low_effort": st.booleans(), "reasoning_budget": st.integers(0, 3)}), "functions": value, "system": value, "train": value, "mood": value}
rows = st.fixed_dictionaries({"messages": st.lists(message, min_size=1, max_size=5)}, optional=switches | {"tools": st.just(CITY) | value}) | st.fixed_dictionaries({"conversations": st.lists(turn, min_size=1, max_size=4)}, optional=switches) | st.fixed_dictionaries({"instruction": value, "output": value}, optional=switches | {"input": value, "history": value})


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(rows, min_size=1, max_size=8))
def test_random_rows_are_read_alike_by_both(tmp_path_factory, made):
    folder = tmp_path_factory.mktemp("rows")
    path = write(folder / "rows.jsonl", made)
    found, _ = prepared(path, folder)
    assert found == {line: shown(path, line) for line, _ in read_unit(units(path)[0])}
