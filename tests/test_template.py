"""The golden vectors of the nano3 format, character for character, and random chats against the Jinja file."""

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nemotron_nb.core import UserError
from nemotron_nb.data.template import TOOLS_INSTRUCTION, chunks, first_turn, render, template_path, turns, x_ray_beside
from nemotron_nb.viz import visible

SYSTEM = "<|im_start|>system\n<|im_end|>\n"


def user(text):
    return {"role": "user", "content": text}


def assistant(text="", reasoning=None, **more):
    return {"role": "assistant", "content": text} | ({"reasoning_content": reasoning} if reasoning is not None else {}) | more


def turn(role, text):
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def call(**arguments):
    return {"tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


G1 = SYSTEM + turn("user", "hi")
CALL = assistant("", "R1", **call(a="s", n=3, b=True, x=None, l=[1, "é"], d={"k": "<v>"}))
CALL_TEXT = (
    "<tool_call>\n<function=f>\n<parameter=a>\ns\n</parameter>\n<parameter=n>\n3\n</parameter>\n<parameter=b>\nTrue\n</parameter>\n"
    '<parameter=x>\nNone\n</parameter>\n<parameter=l>\n[1, "é"]\n</parameter>\n<parameter=d>\n{"k": "<v>"}\n</parameter>\n</function>\n</tool_call>\n'
)
RESULTS = [{"role": "tool", "content": "T1"}, {"role": "tool", "content": "T2"}]
RESULTS_TEXT = "<tool_response>\nT1\n</tool_response>\n<tool_response>\nT2\n</tool_response>\n"

GOLDEN = {
    "G1": (render([user("hi")]), G1),
    "G2": (render([user("hi")], add_generation_prompt=True), G1 + "<|im_start|>assistant\n<think>\n"),
    "G3": (render([user("hi")], add_generation_prompt=True, enable_thinking=False), G1 + "<|im_start|>assistant\n<think></think>"),
    "G4": (
        render([{"role": "system", "content": "  Sys \n"}, user(" hi \n"), assistant("  yo \n")]),
        turn("system", "  Sys \n") + turn("user", " hi \n") + turn("assistant", "<think></think>  yo"),
    ),
    "G5": (render([user("hi"), assistant("yo", "R")]), G1 + turn("assistant", "<think>\nR\n</think>\nyo")),
    "G6": (render([user("hi"), assistant("yo", "\n \n")]), G1 + turn("assistant", "<think></think>yo")),
    "G7": (render([user("hi"), assistant("\n\nyo\n", "\nR\n")]), G1 + turn("assistant", "<think>\n\nR\n\n</think>\n\n\nyo")),
    "G8": (
        render([user("q1"), assistant("a1", "R1"), user("q2"), assistant("a2", "R2")]),
        SYSTEM + turn("user", "q1") + turn("assistant", "<think></think>\na1") + turn("user", "q2") + turn("assistant", "<think>\nR2\n</think>\na2"),
    ),
    "G9": (
        render([user("q1"), assistant("a1"), user("q2"), assistant("a2")]),
        SYSTEM + turn("user", "q1") + turn("assistant", "<think></think>a1") + turn("user", "q2") + turn("assistant", "<think></think>a2"),
    ),
    "G10": (render([user("hi"), CALL]), G1 + turn("assistant", "<think>\nR1\n</think>\n" + CALL_TEXT)),
    "G11": (render([user("hi"), CALL, *RESULTS]), G1 + turn("assistant", "<think>\nR1\n</think>\n" + CALL_TEXT) + turn("user", RESULTS_TEXT)),
    "G12": (
        render([user("hi"), CALL, *RESULTS, assistant("done", "R2"), user("q2")]),
        G1 + turn("assistant", "<think></think>\n" + CALL_TEXT) + turn("user", RESULTS_TEXT) + turn("assistant", "<think></think>\ndone") + turn("user", "q2"),
    ),
    "G13": (
        render([user("hi"), assistant("lead", "R1", **call(a="s")), user("q2")]),
        G1 + turn("assistant", "<think></think>lead\n<tool_call>\n<function=f>\n<parameter=a>\ns\n</parameter>\n</function>\n</tool_call>\n") + turn("user", "q2"),
    ),
    "G14": (render([user("q0"), user("q1")], reasoning_budget=512), SYSTEM + turn("user", "q0") + turn("user", "q1\n\n{thinking token budget: 512}")),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_vector(name):
    got, expected = GOLDEN[name]
    assert got == expected


def test_golden_vector_g15_schema_keys_the_format_has_no_word_for():
    parameters = {"type": "object", "properties": {"opts": {"type": "object", "properties": {"a": {"type": "integer"}}}}, "required": ["opts"], "additionalProperties": False}
    text = render([user("hi")], [{"type": "function", "function": {"name": "f", "parameters": parameters, "strict": True}}])
    assert '<name>opts</name>\n<type>object</type>\n<properties>{"a": {"type": "integer"}}</properties>\n</parameter>' in text
    assert '\n<additionalProperties>False</additionalProperties>\n<required>["opts"]</required>\n</parameters>\n<strict>True</strict>\n</function>' in text
    assert text.startswith("<|im_start|>system\n# Tools\n\nYou have access") and TOOLS_INSTRUCTION + "<|im_end|>\n" in text


def test_golden_vector_g16_flat_tools_with_properties_directly_under_parameters():
    tool = {"name": "weather", "description": "Get weather", "parameters": {"city": {"type": "string", "description": "City name"}, "unit": {"type": "string"}}}
    messages = [
        {"role": "system", "content": "Sys"},
        user("Paris?"),
        assistant("", tool_calls=[{"name": "weather", "arguments": {"city": "Paris", "unit": "celsius"}}]),
        {"role": "tool", "content": "22", "tool_call_id": "1"},
        assistant("22 degrees."),
    ]
    text = render(messages, [tool])
    assert '<parameters>\n<city>{"type": "string", "description": "City name"}</city>\n<unit>{"type": "string"}</unit>\n</parameters>' in text
    assert "<|im_start|>system\nSys\n\n# Tools" in text
    assert text.endswith(
        turn("assistant", "<think></think>\n<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=unit>\ncelsius\n</parameter>\n</function>\n</tool_call>\n")
        + turn("user", "<tool_response>\n22\n</tool_response>\n")
        + turn("assistant", "<think></think>22 degrees.")
    )


def jinja_template():
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    return environment.from_string(template_path("nano3").read_text())


JINJA = jinja_template()
text = st.text(st.sampled_from("ab \n\té日{}<>|") | st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(["<think>", "</think>", "<think>x</think> y", "<|im_end|>", "  lead", "\n"])
value = st.recursive(st.none() | st.booleans() | st.integers(-99, 99) | st.floats(allow_nan=False, allow_infinity=False) | text, lambda v: st.lists(v, max_size=3) | st.dictionaries(text, v, max_size=3), max_leaves=5)
argument_names = st.sampled_from(["a", "b", "long name", "é"])
calls = st.lists(st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": st.sampled_from(["f", "g"]), "arguments": st.dictionaries(argument_names, value, max_size=3)})}), max_size=3)
message = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "tool", "system"]), "content": text}),
    st.fixed_dictionaries({"role": st.just("assistant"), "content": text | st.none()}, optional={"reasoning_content": text | st.none(), "tool_calls": calls}),
)
schema = st.fixed_dictionaries({}, optional={"type": st.just("object"), "properties": st.dictionaries(argument_names, st.dictionaries(st.sampled_from(["type", "description", "enum", "x-more"]), value, max_size=4), max_size=3), "required": st.lists(argument_names), "additionalProperties": st.booleans()})
tool = st.fixed_dictionaries({"name": st.sampled_from(["f", "g"])}, optional={"description": text, "parameters": schema, "strict": st.booleans()})
tools = st.lists(tool | tool.map(lambda t: {"type": "function", "function": t}), max_size=2)
switches = st.fixed_dictionaries({"add_generation_prompt": st.booleans(), "enable_thinking": st.booleans(), "reasoning_budget": st.none() | st.integers(0, 9), "truncate_history_thinking": st.booleans()})


@settings(max_examples=400, deadline=None)
@given(st.lists(message, min_size=1, max_size=8), tools, switches)
def test_native_renderer_equals_the_jinja_file(messages, tools, switches):
    assert render(messages, tools, **switches) == JINJA.render(messages=messages, tools=tools, **switches)


@settings(max_examples=100, deadline=None)
@given(st.lists(message, min_size=1, max_size=6), switches)
def test_switches_inside_chat_template_kwargs_win(messages, switches):
    nested = {k: v for k, v in switches.items() if k != "add_generation_prompt"}
    wrong = {"enable_thinking": not switches["enable_thinking"]}
    assert JINJA.render(messages=messages, add_generation_prompt=switches["add_generation_prompt"], chat_template_kwargs=nested, **wrong) == render(messages, **switches)


@settings(max_examples=150, deadline=None)
@given(st.lists(message, min_size=1, max_size=8), tools, switches)
def test_talk_is_never_marked_as_format(messages, tools, switches):
    """Control tokens may come from the format only: no untrusted piece is needed to close a turn."""
    parts = chunks(messages, tools, **switches)
    assert "".join(c.text for c in parts) == render(messages, tools, **switches)
    trusted = "".join(t for c in parts for t, by_format in c.pieces if by_format)
    assert trusted.count("<|im_start|>") == trusted.count("<|im_end|>") + switches["add_generation_prompt"]


@settings(max_examples=300, deadline=None)
@given(st.lists(message, min_size=1, max_size=8), tools)
def test_every_prefix_is_a_slice_of_the_two_forms(messages, tools):
    """Each message in its live and its remembered form, once, gives every prefix that the slow way renders anew."""
    live, history, starts = turns(messages)
    assert len(live) == len(history) and len(starts) == len(messages) + 1
    ends = [i for i, m in enumerate(messages) if m["role"] == "user"] + [len(messages)]
    for last_user, end in zip(ends, ends[1:]):
        cut = starts[last_user]
        assert [first_turn(messages, tools), *history[:cut], *live[cut : starts[end]]] == chunks(messages[:end], tools)


def test_a_call_behind_white_space_is_remembered_without_it():
    messages = [user("q"), assistant("  lead", **call(a="s")), user("q2")]
    live, history, _ = turns(messages)
    assert live[2].text.startswith("  lead\n<tool_call>") and history[2].text.startswith("lead\n<tool_call>")


@settings(max_examples=50, deadline=None)
@given(st.lists(message, min_size=1, max_size=5), tools, switches)
@example([{"role": "tool", "content": "a\r"}, {"role": "user", "content": "\x80\u202e"}], [], {})
def test_x_ray_shows_every_character_once_and_is_safe(messages, tools, switches):
    picture = x_ray_beside(messages, tools, title="<script>", width=30, **switches)
    assert "<script" not in picture.html and "<style" not in picture.html and "<|im_" not in picture.html
    right = "\n".join(line[33:] for line in picture.text.split("\n")[1:] if not line.startswith("-" * 30 + "-+-"))
    shown, whole = ("".join(text.replace("\u00ab", "").replace("\u00bb", "").split()) for text in (right, visible(render(messages, tools, **switches))))
    assert shown == whole


def test_unknown_template_is_an_error_with_the_nearest_name():
    with pytest.raises(UserError, match="did you mean 'nano3'"):
        template_path("nano")
    with pytest.raises(UserError):
        template_path("../nano3")
