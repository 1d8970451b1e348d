"""The tours: short, complete, light, and they run."""

import json
import re
from functools import cache
from pathlib import Path

import pytest
from test_viz import LIMIT, Inert, balanced

ROOT = Path(__file__).parents[1]
CHAT = ("found.x_ray(", "found.strip(", "found.diff(", "parity_panel(", "pack_bars(", "isolation_picture(", "leak_picture(", "share_bars(", "mean_of_means(", "train_step(", "token_losses(")
TEXT = ("prepare_documents(", "token_strip(", "index_table(", "order_picture(", "curriculum_picture(", "shares_table(", "leak_picture(", "lr_picture(", "train(config", "bits_table(", "positions_picture(", "continuations_table(")
TOURS = {"tour": (25, CHAT, 12), "tour_pretrain": (20, TEXT, 8)}  # most cells, the stops, least outputs
each = pytest.mark.parametrize("name", TOURS)


def path_of(name):
    return ROOT / "nbs" / f"{name}.ipynb"


@cache
def cells_of(name):
    return json.loads(path_of(name).read_text())["cells"]


def sources(name, kind):
    return ["".join(c["source"]) for c in cells_of(name) if c["cell_type"] == kind]


def shown(name):
    """Every output of every cell, as it is committed."""
    return [o for c in cells_of(name) for o in c.get("outputs", [])]


@each
def test_it_is_short_and_light(name):
    assert len(cells_of(name)) <= TOURS[name][0] and path_of(name).stat().st_size < 400_000
    assert all(len(line) <= 120 for source in sources(name, "code") for line in source.splitlines()), "nobody scrolls sideways on a tour"


@each
def test_it_has_every_stop(name):
    calls = "\n".join(sources(name, "code"))
    for stop in TOURS[name][1]:
        assert stop in calls, stop


@each
def test_each_picture_has_a_sentence_that_says_what_to_see(name):
    cells = cells_of(name)
    for place, cell in enumerate(cells):
        outputs = cell.get("outputs", [])
        if place > 2 and outputs:
            before = [c for c in cells[:place] if c["cell_type"] == "markdown"][-1]
            assert re.search(r"\*What to see( first| then)?:\*", "".join(before["source"])), "".join(cell["source"])[:80]


@each
def test_its_outputs_are_committed_and_harmless(name):
    assert len(shown(name)) >= TOURS[name][2] and not [o for o in shown(name) if o["output_type"] in ("error", "stream")]
    for output in shown(name):
        page = "".join(output["data"].get("text/html", ""))
        Inert().feed(page)
        balanced(page)
        assert len(page) < LIMIT and output["data"]["text/plain"], "each picture has a text form"
        assert not re.search(r"/tmp|/work|/home|\d\d:\d\d:\d\d", page + "".join(output["data"]["text/plain"]))


@each
def test_its_links_lead_somewhere(name):
    links = [link for source in sources(name, "markdown") for link in re.findall(r"\]\(([^)]+)\)", source)]
    assert len(links) > 10 and all((path_of(name).parent / link).exists() for link in links)


def run_all(name, steps, monkeypatch):
    """Every code cell, in order, in one namespace, with so many steps of training. Gives the namespace and what the cells showed."""
    import ast
    import socket

    def refused(*arguments):
        raise AssertionError("the tour needs no network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    names, results = {"__name__": "tour"}, []
    for source in sources(name, "code"):
        tree = ast.parse(re.sub(r"^STEPS = \d+", f"STEPS = {steps}", source, flags=re.MULTILINE))
        *body, last = tree.body
        exec(compile(ast.Module(body, []), "tour", "exec"), names)
        if isinstance(last, ast.Expr):
            results.append(eval(compile(ast.Expression(last.value), "tour", "eval"), names))
        else:
            exec(compile(ast.Module([last], []), "tour", "exec"), names)
    return names, results


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.long] if name == "tour" else []) for name in TOURS])
def test_it_runs(name, monkeypatch):
    """With few steps of training: nbdev-test runs both as they stand, and the browser runs the first."""
    steps = 6
    names, results = run_all(name, steps, monkeypatch)
    assert len([m for m in names["metrics"] if m["kind"] == "train"]) == steps and len(results) == len(shown(name))
    fresh, committed = ([repr(r) for r in results], ["".join(o["data"]["text/plain"]) for o in shown(name)])
    same = [a == b for a, b in zip(fresh, committed)]
    assert all(same[: 6 if name == "tour" else 3]), "what is committed is what the cells show, as far as no model is in it"
