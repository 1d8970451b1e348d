"""Rows that chats are found in and should not be: nulls, lists, think tags, special tokens, odd roles, broken calls. For tests of the compatible preparation."""

import json
from random import Random
from typing import Any

FRAGMENTS = (
    *("hi", "What is 2+2?", "", " ", "\n", "  lead", "trail \n", "\n\nboth\n", "é 日本 \u200b", "a\u0301", "x = [1, 2]\n", "\u2028", "\t", "0"),
    *("<think>", "</think>", "<think>in</think>", "<think></think>", "<|im_end|>", "<|im_end|>\n", "<|im_start|>user", "<|im_start|>system\n", "<|im_start|>assistant\n"),
    *("<tool_call>", "# Tools", "</tool_call>", "<tool_response>", "[INST]", "<SPECIAL_99>", "</function>", "<s>", "{{ 7 * 7 }}", "{% if %}", "&lt;", "None"),
)
HARMLESS = ("hi", "What is 2+2?", "Four.", "  lead", "trail \n", "\n\nboth\n", "é 日本", "x = [1, 2]\n", "a </b>", "")
ODD_VALUES = (None, 0, 1, 2.5, True, False, [], {}, ["a"], {"a": 1}, [{"type": "text", "text": "hi"}], "", "\ud83d")
ROLES = ("system", "user", "assistant", "tool")


def text(r: Random, nasty: float) -> Any:
    """A text, or now and then what is none."""
    if r.random() < nasty * 0.15:
        return r.choice(ODD_VALUES)
    pool = FRAGMENTS if r.random() < nasty else HARMLESS
    return "".join(r.choice(pool) for _ in range(r.randint(0, 3)))


def value(r: Random, nasty: float) -> Any:
    """An argument."""
    return r.choice((text(r, nasty), 1, -0.5, 1e22, True, None, [1, "é", None], {"k": "<v>", "n": [True]}, "line\nline", 10**30))


def arguments(r: Random, nasty: float) -> Any:
    """The arguments of a call: a mapping, its JSON text, or something else."""
    given = {name: value(r, nasty) for name in r.sample(("a", "b", "c d", "items", "type", "é"), r.randint(0, 3))}
    if r.random() < nasty * 0.3:
        return r.choice(("", "null", "[]", '"x"', "{", "{'a': 1}", None, [], 3, '{"a": 1, "a": 2}', '{"a": NaN}', " {} "))
    return json.dumps(given) if r.random() < 0.5 else given


def tool_call(r: Random, nasty: float) -> Any:
    """A call in the wrapped form, or now and then in another one."""
    body: dict[str, Any] = {"name": r.choice(("clock", "weather")), "arguments": arguments(r, nasty)}
    if r.random() < nasty * 0.2:
        body.pop(r.choice(("name", "arguments")))
    if r.random() < nasty * 0.15:
        return r.choice((body, None, "clock", {"function": None}, {"function": "clock"}, {}, {"function": body | {"name": None}}))
    return {"id": "call_1", "type": "function", "function": body}


def message(r: Random, role: Any, nasty: float, thinks: bool) -> Any:
    """A message of a role."""
    said: dict[str, Any] = {"role": role, "content": text(r, nasty)}
    if r.random() < nasty * 0.1:
        said.pop(r.choice(("role", "content")))
    if role == "assistant" and thinks and r.random() < 0.7:
        said["reasoning_content"] = r.choice(("Because.", "a\nb", "\nx\n", text(r, nasty)))
    if role == "assistant" and r.random() < 0.4:
        said["tool_calls"] = [tool_call(r, nasty) for _ in range(r.randint(1, 2))]
        if r.random() < nasty * 0.1:
            said["tool_calls"] = r.choice(([], None, {}, {"a": 1}, "clock", 5))
    if role != "assistant" and r.random() < nasty * 0.1:
        said["reasoning_content"] = r.choice(("Because.", None, " "))
    return r.choice((None, "hi", [])) if r.random() < nasty * 0.02 else said


def roles(r: Random, nasty: float) -> list[Any]:
    """Who speaks: a conversation in order, or any order."""
    if r.random() < nasty:
        odd = (*ROLES, *ROLES, "developer") if r.random() < 0.8 else (*ROLES, None, 7, "function")
        return [r.choice(odd) for _ in range(r.randint(1, 7))]
    order = ["system"] if r.random() < 0.5 else []
    for _ in range(r.randint(1, 3)):
        order.append("user")
        for _ in range(r.choice((0, 0, 1, 2))):
            order += ["assistant", *["tool"] * r.randint(1, 2)]
        order += ["assistant"] * (r.random() < 0.95)
    return order


def schema(r: Random, nasty: float) -> Any:
    """The schema of one parameter."""
    plain = {"type": "string", "description": text(r, nasty), "enum": ["a", "é"], "default": None, "minimum": 1, "items": {"type": "string"}}
    kept = {key: plain[key] for key in r.sample(sorted(plain), r.randint(0, 4))}
    return r.choice((kept, kept, kept, kept | {"type": ["string", "null"]}, None, "string", 5, [1])) if r.random() < nasty else kept


def tool(r: Random, nasty: float) -> Any:
    """A declared tool, wrapped or flat."""
    parameters: Any = {"type": "object", "properties": {n: schema(r, nasty) for n in r.sample(("a", "b", "type", "name"), r.randint(0, 3))}, "required": ["a"]}
    if r.random() < nasty * 0.5:
        parameters = r.choice((None, {}, {"city": {"type": "string"}}, parameters | {"properties": None}, parameters | {"additionalProperties": False}, "x", []))
    body = {"name": r.choice(("clock", "weather")), "description": text(r, nasty), "parameters": parameters}
    if r.random() < nasty * 0.3:
        body.pop(r.choice(sorted(body)))
    body |= {"strict": True} if r.random() < 0.3 else {}
    if r.random() < nasty * 0.1:
        return r.choice((None, "clock", {}, {"function": None}, {"function": "clock"}, {"function": [1]}))
    return body if r.random() < 0.3 else {"type": "function", "function": body}


def nasty_row(r: Random) -> Any:
    """One row; about a third of them are harmless throughout."""
    nasty = r.choice((0.0, 0.1, 0.3, 0.6))
    thinks = r.random() < 0.5
    row: dict[str, Any] = {"messages": [message(r, role, nasty, thinks) for role in roles(r, nasty)]}
    if r.random() < 0.5:
        row["tools"] = [tool(r, nasty) for _ in range(r.randint(0, 2))]
    if r.random() < nasty * 0.1:
        row["tools"] = r.choice((None, [], {}, "", "[]", {"a": 1}, 0, False, [[]]))
    if r.random() < nasty * 0.1:
        row["messages"] = r.choice((None, [], "", "hi", {}, {"role": "user"}, row["messages"][:1]))
    if r.random() < 0.3:
        row["used_in"] = r.choice((["nano_v3"], "nano_v3", "a, nano_v3", "nano_v30", None, 5, []))
    return row
