"""Which functions do the processes of a command call, and which files do they hash? A folder for PYTHONPATH that writes it down."""

import json
import os
from collections import Counter
from pathlib import Path

WATCHED = {"nemotron_nb.data.prep": ["make_plan"], "nemotron_nb.data.jinja_template": ["chat_template"], "nemotron_nb.ops.config": ["sft_config"]}

SITE = '''
import hashlib, importlib.abc, importlib.util, json, os, sys

WATCHED, OUT = {watched!r}, {out!r}


def note(what):
    with open(OUT, "a") as file:
        file.write(json.dumps(what) + "\\n")


def importing():
    frame = sys._getframe(2)
    while frame and not (frame.f_code.co_name == "<module>" and frame.f_globals["__name__"].startswith("nemotron_nb.")):
        frame = frame.f_back
    return frame is not None


def counted(function):
    def call(*given, **named):
        note(["import" if importing() else "call", function.__name__])
        return function(*given, **named)
    return call


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name not in WATCHED:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            for function in WATCHED[name]:
                setattr(module, function, counted(getattr(module, function)))

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Finder())
hash_of = hashlib.file_digest


def file_digest(file, kind):
    note(["hash", os.path.abspath(str(getattr(file, "name", "")))])
    return hash_of(file, kind)


hashlib.file_digest = file_digest
'''


def watch(folder: Path) -> dict[str, str]:
    """An environment in which every process of Python writes down what it calls and hashes."""
    (folder / "sitecustomize.py").write_text(SITE.format(watched=WATCHED, out=str(folder / "counted.jsonl")))
    before = os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": str(folder) + (os.pathsep + before if before else "")}


def counts(folder: Path) -> tuple[Counter, Counter, Counter]:
    """(calls by name, those made while a module was imported, hashes by file) of all processes together."""
    lines = [json.loads(line) for line in (folder / "counted.jsonl").read_text().splitlines()]
    return tuple(Counter(what for kind, what in lines if kind == wanted) for wanted in ("call", "import", "hash"))
