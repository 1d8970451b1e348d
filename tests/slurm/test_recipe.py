"""A recipe as jobs that wait for each other: on a Slurm of two nodes, with two short pretrainings, and one that fails."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nemotron_nb.ops.slurm import job
from nemotron_nb.stages.recipe import read_journal

ROOT = Path(__file__).parents[2]
NEMOTRON = Path(sys.executable).with_name("nemotron")
SMALL = ["train.train_iters=2", "scheduler.lr_wsd_decay_iters=1", "scheduler.lr_warmup_iters=0", "train.eval_interval=0", "train.global_batch_tokens=256", "evaluation.num_generations=1", "evaluation.max_new_tokens=2", "evaluation.needle_lengths=[]", "dataset.valid_samples=1"]


@pytest.fixture(scope="module")
def place(cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    text = (ROOT / "papermill_runs" / "env.toml.example").read_text()
    (folder / "env.toml").write_text(re.sub(r"(?ms)^\[wandb\].*?(?=^\[)", "", text))
    return folder


def submitted(place, name, steps, *words):
    """The answer of the command for a recipe of these steps, and the folder of the recipe."""
    (place / f"{name}.yaml").write_text(yaml.safe_dump({"steps": steps}))
    command = [str(NEMOTRON), "nano3", "recipe", "-c", f"{name}.yaml", "--batch", "local-slurm", *words]
    return subprocess.run(command, cwd=place, env=os.environ, capture_output=True, text=True, timeout=300), place / "output/nano3/recipe" / name


@pytest.mark.long
def test_each_step_is_a_job_behind_the_one_before(cluster, place):
    first = {"name": "first", "stage": "pretrain", "config": ["tiny"], "settings": SMALL}
    rows = {"name": "rows", "stage": "synth", "pipeline": "tool_world", "config": ["tiny"], "settings": ["rows=8"]}
    steps = [first, first | {"name": "second", "takes": {"run.model": "first"}}, rows]
    done, folder = submitted(place, "chain", steps)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((folder / "jobs.json").read_text())
    assert [(row["step"], row["after"]) for row in rows] == [("first", ""), ("second", rows[0]["job"]), ("rows", rows[1]["job"])]
    assert f"afterok:{rows[0]['job']}" in cluster.run("scontrol", "show", "job", rows[1]["job"])
    again, _ = submitted(place, "chain", steps)
    assert again.returncode == 1 and "jobs of this recipe wait or run" in again.stderr
    cluster.wait_for(lambda: all(job(row["job"]).ended for row in rows), 280, "the end of all")
    logs = "".join(path.read_text() for path in sorted(folder.glob("*.slurm.log")))
    assert list(read_journal(folder)["done"]) == ["first", "second", "rows"], logs
    card = json.loads((folder / "card.json").read_text())
    assert [step["state"] for step in card["steps"]] == ["done"] * 3 and card["steps"][2]["data"] == "art://SynthArtifact-tool_world:v1"
    assert "ModelArtifact-pretrain:v2" in card["lineage"] and "ModelArtifact-pretrain:v1" in card["lineage"]
    none, _ = submitted(place, "chain", steps)
    assert none.returncode == 0 and json.loads((folder / "jobs.json").read_text()) == rows, "nothing is left to submit"


def test_a_step_that_fails_ends_the_chain(cluster, place):
    first = {"name": "first", "stage": "pretrain", "config": ["tiny"], "settings": [*SMALL, "data.path=nowhere.jsonl"]}
    done, folder = submitted(place, "broken", [first, first | {"name": "second", "takes": {"run.model": "first"}}])
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((folder / "jobs.json").read_text())
    cluster.wait_for(lambda: all(job(row["job"]).ended for row in rows), 120, "the end of both")
    assert read_journal(folder)["done"] == {} and "nowhere.jsonl" in (folder / "first.slurm.log").read_text()
    assert not (folder / "second.slurm.log").exists(), "it never began"
    assert job(rows[1]["job"]).result != 0
