"""Synthetic chats for the benchmarks, the same for the same Python installation. Their text is the source of the standard library, so none is shipped.

    python benchmarks/chats.py chats.jsonl --rows 5000

40 % are a question and an answer, 30 % are chats of 2 to 20 turns, 30 % are agents with 1 to 7 tools, a quarter of whose steps
call two tools at once. Half of all chats have reasoning. Lengths are lognormal.
"""

import argparse
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Message = dict[str, Any]


def library_text() -> str:
    """The modules of the standard library, end to end, in the order of their names."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return "\n".join(p.read_text(encoding="utf-8", errors="ignore") for p in paths)


class Speaker:
    """Says random stretches of a text."""

    def __init__(self, text: str, seed: int):
        self.text, self.random = text, random.Random(seed)

    def say(self, mean: int) -> str:
        """About `mean` characters: lognormal with sigma 1, at most 60 000."""
        length = min(60_000, 1 + int(mean * self.random.lognormvariate(-0.5, 1)))
        start = self.random.randrange(len(self.text) - 60_000)
        return self.text[start : start + length].strip() or "yes"

    def chance(self, share: float) -> bool:
        """True in this share of the cases."""
        return self.random.random() < share


def answer(s: Speaker, mean: int, thinks: bool, thought: int) -> Message:
    """An assistant message, with a thought if the chat has reasoning."""
    return {"role": "assistant", "content": s.say(mean)} | ({"reasoning_content": s.say(thought)} if thinks else {})


def single_turn(s: Speaker, thinks: bool) -> list[Message]:
    """One question, one answer."""
    return [{"role": "user", "content": s.say(2000)}, answer(s, 4500, thinks, 1800)]


def long_chat(s: Speaker, thinks: bool) -> list[Message]:
    """2 to 20 questions and answers; few chats are long."""
    turns = 2 + int(19 * s.random.random() ** 3)
    return [m for _ in range(turns) for m in ({"role": "user", "content": s.say(300)}, answer(s, 600, thinks, 450))]


def declared_tool(s: Speaker, number: int) -> dict[str, Any]:
    """A tool with 1 to 4 parameters."""
    properties = {f"parameter_{i}": {"type": "string", "description": s.say(60)} for i in range(s.random.randint(1, 4))}
    parameters = {"type": "object", "properties": properties, "required": ["parameter_0"]}
    return {"type": "function", "function": {"name": f"tool_{number}", "description": s.say(120), "parameters": parameters}}


def step(s: Speaker, names: list[str], thinks: bool) -> Iterator[Message]:
    """An assistant calls one tool, or two at once, and reads the results."""
    calls = [
        {"id": f"call_{i}", "type": "function", "function": {"name": s.random.choice(names), "arguments": json.dumps({"parameter_0": s.say(60), "limit": s.random.randrange(99), "tags": [1, "é"]})}}
        for i in range(2 if s.chance(0.25) else 1)
    ]
    yield {"role": "assistant", "content": "", "tool_calls": calls} | ({"reasoning_content": s.say(450)} if thinks else {})
    yield from ({"role": "tool", "tool_call_id": call["id"], "content": s.say(600)} for call in calls)


def agent(s: Speaker, thinks: bool, names: list[str]) -> list[Message]:
    """One or two questions, each answered in one or two steps with tools."""
    messages: list[Message] = []
    for _ in range(s.random.choice((1, 1, 2))):
        messages.append({"role": "user", "content": s.say(300)})
        for _ in range(s.random.choice((1, 1, 2))):
            messages += step(s, names, thinks)
        messages.append(answer(s, 450, thinks, 300))
    return messages


def chat(s: Speaker) -> dict[str, Any]:
    """One row."""
    kind, thinks = s.random.random(), s.chance(0.5)
    messages: list[Message] = [{"role": "system", "content": s.say(220)}] if s.chance(0.6) else []
    if kind < 0.4:
        return {"messages": messages + single_turn(s, thinks)}
    if kind < 0.7:
        return {"messages": messages + long_chat(s, thinks)}
    tools = [declared_tool(s, i) for i in range(s.random.randint(1, 7))]
    return {"messages": messages + agent(s, thinks, [t["function"]["name"] for t in tools]), "tools": tools}


def write_chats(path: str | Path, rows: int, seed: int = 0) -> int:
    """Write a JSONL file of chats; gives its size in bytes."""
    speaker = Speaker(library_text(), seed)
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        for _ in range(rows):
            f.write(json.dumps(chat(speaker), ensure_ascii=False) + "\n")
    return Path(path).stat().st_size


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path")
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"{write_chats(options.path, options.rows, options.seed) / 1e6:.1f} MB, {options.rows} rows")
