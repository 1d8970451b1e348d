"""Pipelines that ask a model, with a script of the test in its place."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from nemotron_nb.data.filters import check as filter_chat
from nemotron_nb.data.records import parse_conversation
from nemotron_nb.synth.ask import REHEARSAL, ModelSection
from nemotron_nb.synth.pipelines import PIPELINES
from nemotron_nb.synth.produce import Pipeline, produce


@dataclass(frozen=True)
class Scripted(Pipeline):
    """A pipeline whose rehearsed model is a function of the test."""

    script: Callable[..., Any] | None = None

    def part(self, name):
        return self.script if name == "teacher" and self.script else super().part(name)


def made_by(name, script, folder, **settings):
    """(rows, drops) of a pipeline whose model is a script; None: the rehearsed one."""
    known = PIPELINES[name]
    pipeline = Scripted(**{f: getattr(known, f) for f in known.__dataclass_fields__}, script=script)
    teacher = ModelSection(REHEARSAL, retries=1, concurrency=4)
    asked = pipeline.part("settings")(**{"teacher": teacher, "max_drop_share": 1.0, **settings})
    produce(pipeline, asked, folder)
    rows, drops = ([json.loads(line) for line in open(folder / f"{what}.jsonl", encoding="utf-8")] for what in ("rows", "drops"))
    return rows, drops


def honest(script):
    """A rehearsed model that tells no lies."""
    return lambda body, before: script(body, before, honest=True)


def reworded(script, change):
    """A rehearsed model some of whose replies are changed: change(question, reply) is the reply, or None for the same."""

    def changed(body, before):
        reply = script(body, before, honest=True)
        first = next(m["content"] for m in body["messages"] if m["role"] == "user")
        return change(first, reply) or reply

    return changed


def with_text(reply, text):
    """The reply with another text."""
    return replace(reply, content=text)


def assert_prepared(rows):
    """Data preparation and the filters take every row as it is."""
    for row in rows:
        chat = parse_conversation(row)
        assert not chat.repairs and filter_chat(chat) is None, (row["id"], chat.repairs, filter_chat(chat))


def reasons(drops):
    """step: reason of each row that fell."""
    return {f"{drop['step']}: {drop['reason']}" for drop in drops}
