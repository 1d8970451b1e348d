"""A stage that another package adds, through Slurm: submitted from its command line, and by hand."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from stage_outside import add_demo

from nemotron_nb.ops.run_folder import read_status
from nemotron_nb.ops.slurm import job

ROOT = Path(__file__).parents[2]
NEMOTRON = Path(sys.executable).with_name("nemotron")


@pytest.fixture(scope="module")
def place(cluster, tmp_path_factory):
    """A folder of work with the example's env.toml, and the environment in which Python finds the stage."""
    folder = tmp_path_factory.mktemp("it's outside")
    text = (ROOT / "papermill_runs" / "env.toml.example").read_text()
    (folder / "env.toml").write_text(re.sub(r"(?ms)^\[wandb\].*?(?=^\[)", "", text))
    return folder, os.environ | add_demo(folder / "package")


def ask(place, *words, **more):
    """Run a command there."""
    return subprocess.run(words, cwd=place[0], env=place[1] | more, capture_output=True, text=True, timeout=300)


def test_a_stage_from_outside_runs_in_a_job_and_fails_in_one(place):
    done = ask(place, str(NEMOTRON), "nano3", "demo", "--run", "local-slurm", "x=3", "run.nodes=1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    run = place[0] / re.search(r"^run folder: (.+)$", done.stdout, re.MULTILINE)[1]
    assert read_status(run)["state"] == "done" and (run / "made" / "count.txt").read_text() == "3"
    assert "COMPLETED, exit code 0" in done.stdout and "demo.sbatch: run folder" in (run / "slurm.log").read_text()
    assert "DemoArtifact:v1" in ask(place, str(NEMOTRON), "lineage", "DemoArtifact").stdout
    failed = ask(place, str(NEMOTRON), "nano3", "demo", "--run", "local-slurm", "x=13", "run.nodes=1")
    run = place[0] / re.search(r"^run folder: (.+)$", failed.stdout, re.MULTILINE)[1]
    assert failed.returncode == 1 and "thirteen" in read_status(run)["message"], failed.stdout[-3000:]


def test_by_hand_the_script_of_every_stage_asks_the_table(cluster, place):
    named = {"NEMOTRON_STAGE": "demo", "NEMOTRON_ROOT": str(ROOT), "NEMOTRON_BIN": str(NEMOTRON.parent)}
    script = str(ROOT / "slurm" / "stage.sbatch")
    words = ("sbatch", "--parsable", "--mem=500M", script, "nano3", "default", "x=5")
    jobs = [ask(place, *words, **named | more).stdout.strip() for more in ({}, {"NEMOTRON_STAGE": "nosuch"})]
    cluster.wait_for(lambda: all(job(one).ended for one in jobs), 200, "the end of both")
    run = next((place[0] / "output" / "nano3" / "demo").glob(f"*-job{jobs[0]}*"))
    log = (place[0] / f"nemotron-stage-{jobs[0]}.log").read_text()
    assert job(jobs[0]).result == 0 and json.loads((run / "status.json").read_text())["state"] == "done", log
    assert (run / "made" / "count.txt").read_text() == "5"
    said = (place[0] / f"nemotron-stage-{jobs[1]}.log").read_text()
    assert job(jobs[1]).result == 2 and "there is no stage 'nosuch'" in said and "name a stage" in said
