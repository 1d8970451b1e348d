"""From the command line over papermill, srun and torchrun to a report: two nodes, two processes on each, a real training, once in one piece and once in three."""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from precision import assert_same_curve, curve_units, in_double

from nemotron_nb.ops.profiles import Profile
from nemotron_nb.ops.run_folder import read_metrics, read_status
from nemotron_nb.ops.slurm import job, render, submit
from nemotron_nb.train.__main__ import read_config
from nemotron_nb.train.torch_engine import train

ROOT = Path(__file__).parents[2]
NEMOTRON = Path(sys.executable).with_name("nemotron")
STEPS = 10
SETTINGS = (
    f"train.train_iters={STEPS}", "train.global_batch_tokens=8192", "train.eval_interval=0", "evaluation.num_generations=0",
    "loss.stages=[{stage: token, steps: 5}, {stage: sample}]", "checkpoint.save_interval=2", "data.sample=80", "model.hidden_size=64",
)  # fmt: skip


def nemotron(*words, cwd, timeout=300):
    """`nemotron WORDS...` as a user types it."""
    return subprocess.run([str(NEMOTRON), *words], cwd=cwd, capture_output=True, text=True, timeout=timeout, env=os.environ | {"OMP_NUM_THREADS": "1"})


def begun(*words, cwd):
    """The same, not waited for."""
    return subprocess.Popen([str(NEMOTRON), *words], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def run_folder(text):
    """The run folder that a command named."""
    return Path(re.search(r"^run folder: (.+)$", text, re.MULTILINE)[1])


def steps(folder, kind="train"):
    """[(step, loss, gradient norm)] of the metrics."""
    return [(m["step"], m.get("loss"), m.get("grad_norm")) for m in read_metrics(folder / "metrics.jsonl") if m["kind"] == kind]


@pytest.fixture(scope="module")
def place(cluster, tmp_path_factory):
    """A folder with the example's env.toml."""
    folder = tmp_path_factory.mktemp("place of work")
    text = (ROOT / "papermill_runs" / "env.toml.example").read_text()
    (folder / "env.toml").write_text(re.sub(r"(?ms)^\[wandb\].*?(?=^\[)", "", text))
    return folder


@pytest.fixture(scope="module")
def whole(place):
    """A run in one piece, attached."""
    done = nemotron("nano3", "sft", "-c", "tiny", "--run", "local-slurm", *SETTINGS, cwd=place)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    return place / run_folder(done.stdout), done.stdout


@pytest.fixture(scope="module")
def others(place, whole):
    """Two jobs of one process, begun here and waited for where they are needed: one submitted as by hand, without a run folder, and one that must fail."""
    with contextlib.chdir(place):
        alone = submit(render("sft", Profile("one", nodes=1, gpus_per_node=0, exclusive=False, mem="2G", time="20"), ["nano3", "tiny", *SETTINGS]))
    (place / "nowhere").mkdir()  # a folder without a checkpoint: what can be seen here is refused here
    failing = begun("nano3", "sft", "-c", "tiny", "--run", "local-slurm", *SETTINGS, "checkpoint.load=nowhere", "run.nodes=1", "run.nproc_per_node=1", cwd=place)
    yield {"alone": alone, "failing": failing}
    failing.kill()


@pytest.fixture(scope="module")
def pieces(cluster, place, whole, others):
    """The same run, detached: asked to stop, queued again, then left without one of its nodes, queued again, and done."""
    began = time.monotonic()
    done = nemotron("nano3", "sft", "-c", "tiny", "--batch", "local-slurm", *SETTINGS, cwd=place)
    assert done.returncode == 0, done.stderr
    folder, number = place / run_folder(done.stdout), re.search(r"submitted job (\d+)", done.stdout)[1]
    at_once = (not job(number).ended, time.monotonic() - began)
    reached = lambda step: lambda: any(s[0] >= step for s in steps(folder)) or job(number).ended
    cluster.wait_for(reached(2), 200, "step 2")
    cluster.run("scancel", "--batch", "--signal=USR1", number)
    cluster.wait_for(reached(STEPS - 3), 200, "the second attempt")
    cluster.run("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    cluster.wait_for(lambda: job(number).restarts == 2 or job(number).ended, 200, "the third attempt")
    cluster.run("scontrol", "update", "nodename=n2", "state=resume", check=False)  # it may have come back by itself
    cluster.wait_for(lambda: job(number).ended, 200, "the end")
    return folder, number, at_once


def test_two_nodes_of_two_processes_from_papermill_to_a_report(whole):
    folder, said = whole
    assert [s[0] for s in steps(folder)] == list(range(1, STEPS + 1))
    assert read_status(folder)["state"] == "done" and "COMPLETED, exit code 0" in said
    log = (folder / "train.log").read_text()
    assert "srun --nodes=2 --ntasks=2 --ntasks-per-node=1" in log and "--nproc-per-node=2" in log
    notebook = nbformat.read(folder / "notebook.ipynb", 4)
    assert all(c.metadata.papermill.status == "completed" for c in notebook.cells if c.cell_type == "code")
    assert "<img" in (folder / "report.html").read_text() and "slurm" in json.loads((folder / "env.json").read_text())


def test_attached_the_log_is_shown_while_it_grows(whole):
    said = whole[1]
    assert "attempt 1 of job" in said and f"step {STEPS:>5} of {STEPS}" in said and "The run is complete." in said
    assert said.index("RUNNING on n[1-2]") < said.index(f"step     1 of {STEPS}")
    assert "Executing" not in said and "Cell" not in said and "papermill" not in said, said


def test_detached_the_command_returns_at_once(pieces):
    still_going, seconds = pieces[2]
    assert still_going, seconds


def test_stopped_and_robbed_of_a_node_it_ends_with_the_same_losses_bitwise(whole, pieces):
    folder, number, _ = pieces
    assert job(number).state == "COMPLETED" and job(number).restarts == 2, (folder / "slurm.log").read_text()[-3000:]
    assert steps(folder) == steps(whole[0])
    assert read_status(folder)["state"] == "done" and read_status(folder)["attempt"] == 3
    kinds = [m["kind"] for m in read_metrics(folder / "metrics.jsonl")]
    assert kinds.count("resume") == 2 and kinds[-1] == "end"
    assert kinds.count("paused") in (1, 2), "robbed of its node it may hear the signal in time for another checkpoint"


def test_every_attempt_keeps_its_notebook_and_there_is_one_report(pieces):
    folder = pieces[0]
    assert {p.name for p in folder.glob("notebook*.ipynb")} == {"notebook.1.ipynb", "notebook.2.ipynb", "notebook.ipynb"}
    assert not list(folder.parent.glob(".*.partial.ipynb")) and not (folder / "STOP").exists()
    assert (folder / "report.html").exists()


def test_submitted_by_hand_one_process_has_the_same_losses(cluster, place, whole, others, tmp_path):
    """Four processes on two nodes train the same model as one alone, up to the order of sums."""
    number = others["alone"]
    cluster.wait_for(lambda: job(number).ended, 200, "the end of the job by hand")
    assert job(number).state == "COMPLETED", (place / f"nemotron-sft-{number}.log").read_text()[-3000:]
    (folder,) = (place / "output" / "nano3" / "sft").glob(f"*-tiny-job{number}")
    with in_double(), contextlib.chdir(place):
        train(dataclasses.replace(read_config(folder / "train.yaml"), output_dir=str(tmp_path)))
    ours, theirs, truth = ([m for m in read_metrics(f / "metrics.jsonl") if m["kind"] == "train"] for f in (whole[0], folder, tmp_path))
    assert [m["step"] for m in ours] == [m["step"] for m in theirs]
    assert_same_curve(ours, theirs, curve_units(truth, [theirs], ("loss", "loss_token", "loss_sample", "grad_norm")))
    assert read_status(folder)["state"] == "done" and (folder / "report.html").exists() and (folder / "notebook.ipynb").exists()


def test_a_failing_training_gives_exit_code_1_and_says_why(place, others):
    said = others["failing"].communicate(timeout=300)[0]
    folder = place / run_folder(said)
    assert others["failing"].returncode == 1 and "FAILED, exit code 1" in said and read_status(folder)["state"] == "failed"
    errors = [o for c in nbformat.read(folder / "notebook.ipynb", 4).cells if c.cell_type == "code" for o in c.outputs if o.output_type == "error"]
    assert len(errors) == 1 and "nowhere" in errors[0]["evalue"]


def test_a_misspelt_setting_is_refused_before_slurm_hears_of_it(cluster, place):
    before = cluster.run("squeue", "-h", "-t", "all").count("\n"), list((place / "output" / "nano3" / "sft").iterdir())
    done = nemotron("nano3", "sft", "-c", "tiny", "--run", "local-slurm", "train.train_itres=5", cwd=place)
    assert done.returncode == 1 and "did you mean 'train.train_iters'" in done.stderr
    assert (cluster.run("squeue", "-h", "-t", "all").count("\n"), list((place / "output" / "nano3" / "sft").iterdir())) == before


def test_what_slurm_refuses_leaves_no_run_folder(cluster, place):
    before = sorted((place / "output" / "nano3" / "sft").iterdir())
    done = nemotron("nano3", "sft", "-c", "tiny", "--batch", "local-slurm", "run.nodes=64", cwd=place)
    assert done.returncode == 1 and "Slurm refuses the job" in done.stderr
    assert sorted((place / "output" / "nano3" / "sft").iterdir()) == before


def test_data_is_prepared_in_a_job(place):
    done = nemotron("nano3", "data", "prep", "sft", "-c", "tiny", "--run", "local-slurm", "sample=40", cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "prepared data: " in done.stdout and "COMPLETED, exit code 0" in done.stdout


def test_rows_are_made_in_a_job(place):
    done = nemotron("synth", "sql", "-c", "tiny", "--run", "local-slurm", "rows=12", "max_drop_share=1", cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = list((place / "output/synth/sql").glob("*/rows.jsonl"))
    assert len(rows) == 1 and rows[0].read_text()
    assert "registered: art://SynthArtifact-sql:v1" in done.stdout
