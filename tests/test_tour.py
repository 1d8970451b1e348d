"""The tour: short, complete, light, and it runs."""

import json
import re
from pathlib import Path

from test_viz import LIMIT, Inert, balanced

ROOT = Path(__file__).parents[1]
TOUR = ROOT / "nbs" / "tour.ipynb"
CELLS = json.loads(TOUR.read_text())["cells"]
CODE = ["".join(c["source"]) for c in CELLS if c["cell_type"] == "code"]
TEXT = ["".join(c["source"]) for c in CELLS if c["cell_type"] == "markdown"]


def shown():
    """Every output of every cell, as it is committed."""
    return [o for c in CELLS for o in c.get("outputs", [])]


def test_it_is_short_and_light():
    assert len(CELLS) <= 25 and TOUR.stat().st_size < 400_000
    assert all(len(line) <= 120 for source in CODE for line in source.splitlines()), "nobody scrolls sideways on a tour"


def test_it_has_every_stop():
    calls = "\n".join(CODE)
    for stop in ("found.x_ray(", "found.strip(", "found.diff(", "parity_panel(", "pack_bars(", "isolation_picture(", "leak_picture(", "share_bars(", "mean_of_means(", "train_step(", "token_losses("):
        assert stop in calls, stop


def test_each_picture_has_a_sentence_that_says_what_to_see():
    for place, cell in enumerate(CELLS):
        outputs = cell.get("outputs", [])
        if place > 2 and outputs:
            before = [c for c in CELLS[:place] if c["cell_type"] == "markdown"][-1]
            assert re.search(r"\*What to see( first| then)?:\*", "".join(before["source"])), "".join(cell["source"])[:80]


def test_its_outputs_are_committed_and_harmless():
    assert len(shown()) >= 12 and not [o for o in shown() if o["output_type"] in ("error", "stream")]
    for output in shown():
        page = "".join(output["data"].get("text/html", ""))
        Inert().feed(page)
        balanced(page)
        assert len(page) < LIMIT and output["data"]["text/plain"], "each picture has a text form"
        assert not re.search(r"/tmp|/work|/home|\d\d:\d\d:\d\d", page + "".join(output["data"]["text/plain"]))


def test_its_links_lead_somewhere():
    links = [link for source in TEXT for link in re.findall(r"\]\(([^)]+)\)", source)]
    assert len(links) > 10 and all((TOUR.parent / link).exists() for link in links)


def run_all(steps, monkeypatch):
    """Every code cell, in order, in one namespace, with so many steps of training. Gives the namespace and what the cells showed."""
    import ast
    import socket

    def refused(*arguments):
        raise AssertionError("the tour needs no network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    names, results = {"__name__": "tour"}, []
    for source in CODE:
        tree = ast.parse(re.sub(r"^STEPS = \d+", f"STEPS = {steps}", source, flags=re.MULTILINE))
        *body, last = tree.body
        exec(compile(ast.Module(body, []), "tour", "exec"), names)
        if isinstance(last, ast.Expr):
            results.append(eval(compile(ast.Expression(last.value), "tour", "eval"), names))
        else:
            exec(compile(ast.Module([last], []), "tour", "exec"), names)
    return names, results


def test_it_runs(monkeypatch):
    """With few steps of training: nbdev-test and the browser run it as it stands."""
    steps = 6
    names, results = run_all(steps, monkeypatch)
    assert len(names["metrics"]) == steps and len(results) == len(shown())
    fresh, committed = ([repr(r) for r in results], ["".join(o["data"]["text/plain"]) for o in shown()])
    same = [a == b for a, b in zip(fresh, committed)]
    assert all(same[:6]), "what is committed is what the cells show, as far as no model is in it"
