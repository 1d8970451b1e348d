"""Rows of the pipelines, for their tests: made once, spoilt, prepared."""

import copy
import json
from functools import cache
from pathlib import Path

import yaml

from nemotron_nb.data.prep import PrepConfig, prepare
from nemotron_nb.synth.pipelines import PIPELINES
from nemotron_nb.synth.row import PASSED
from nemotron_nb.synth.steps import Fallen, Workshop, make_row

CONFIGS = Path(__file__).parents[1] / "papermill_runs" / "synth"


@cache
def made(name, count, **settings):
    """Rows and falls of a pipeline."""
    pipeline = PIPELINES[name]
    workshop = Workshop(pipeline.part("settings")(**settings))
    return [make_row(name, pipeline.part("steps"), workshop, i, "recipe") for i in range(count)]


def right(name, least=200, begun=0, **settings):
    """At least so many finished rows, as a file has them."""
    rows = [json.loads(json.dumps(row)) for row in made(name, begun or least, **settings) if not isinstance(row, Fallen)]
    assert len(rows) >= least
    return rows


def reason(name, row):
    """Why the judge refuses a row; empty if it does not."""
    proofs = PIPELINES[name].part("judge")(row)
    assert proofs
    return next((proof.reason for proof in proofs if proof.status != PASSED), "")


def spoilt(rows, spoil):
    """Copies of the rows, each spoilt; those that the spoiler returns False for are left out."""
    copies = copy.deepcopy(rows)
    return [row for row in copies if spoil(row) is not False]


def reasons(name, rows):
    """Reason -> rows."""
    found = {}
    for row in rows:
        why = reason(name, row)
        found[why] = found.get(why, 0) + 1
    return found


def prepared(rows, folder, **settings):
    """The manifest of a preparation with all filters."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    asked = {"pack_size": 0, "filter_chats": True, "workers": 1, **settings}
    manifest = prepare(PrepConfig(path=str(path), output_dir=str(folder / "out"), **asked))
    assert manifest["rejects"] == {} and manifest["accepted"] == len(rows), manifest["rejects"]
    return manifest


def configs_of(name):
    """The settings that its two configs give."""
    settings = PIPELINES[name].part("settings")
    files = {kind: CONFIGS / name / f"{kind}.yaml" for kind in ("default", "tiny")}
    return {kind: settings(**yaml.safe_load(path.read_text())) for kind, path in files.items()}
