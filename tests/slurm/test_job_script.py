"""What the job script makes of a notebook that ends well, fails, is cancelled, dies, or is asked to stop. The notebook counts instead of training."""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat
import pytest
from standin import checkout

from nemotron_nb.ops.profiles import Profile
from nemotron_nb.ops.run_folder import read_status, set_status
from nemotron_nb.ops.slurm import follow, job, render, submit

PROFILE = Profile("small", nodes=1, gpus_per_node=0, exclusive=False, mem="500M", time="10")
WHILE_IT_COUNTS = "pause=0.3"


@dataclass
class Submitted:
    """A job and its run folder."""

    id: str
    run: Path

    def steps(self, kind="train"):
        path = self.run / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []
        return [line["step"] for line in lines if line["kind"] == kind]

    def log(self):
        return (self.run / "slurm.log").read_text()

    def notebooks(self):
        return sorted(p.name for p in self.run.glob("notebook*.ipynb"))


def submitted(folder, *overrides, profile=PROFILE):
    """Submit the training script with the counting notebook, into a run folder with a name that hurts."""
    run = folder / "out" / "it's 100% (#1)"
    run.mkdir(parents=True)
    set_status(run, "queued")
    text = render("sft", profile, ["nano3", "tiny", *overrides], run_dir=run)
    return Submitted(submit(elsewhere(text, checkout(folder / "root"))), run)


def elsewhere(text, root):
    """The script for another checkout."""
    assert "\nexport NEMOTRON_ROOT=" in text
    return text.replace("\nset -- ", f"\nexport NEMOTRON_ROOT={root}\nset -- ", 1)


@pytest.fixture(scope="module", autouse=True)
def short(cluster, tmp_path_factory):
    """A job with a time limit of a minute. Slurm looks at the clock every half minute or so, so it is started first and looked at later."""
    profile = Profile("short", nodes=1, gpus_per_node=0, exclusive=False, mem="500M", time="1", signal_seconds=45)
    return submitted(tmp_path_factory.mktemp("short"), "steps=110", WHILE_IT_COUNTS, profile=profile)


@pytest.fixture
def start(cluster, tmp_path, monkeypatch):
    """What submits a job of a test; it is ended with the test."""
    monkeypatch.chdir(tmp_path)
    given = []

    def begin(*overrides):
        given.append(submitted(tmp_path, *overrides))
        return given[-1]

    yield begin
    for one in given:
        cluster.run("scancel", one.id, check=False)
        cluster.wait_for(lambda one=one: job(one.id).ended, 30, "the end of the job")


def ended(cluster, started, seconds=150):
    """The job after it has ended."""
    cluster.wait_for(lambda: job(started.id).ended, seconds, f"the end of job {started.id}")
    return job(started.id)


def counting(cluster, started, step):
    """Wait until the notebook has counted to `step`."""
    cluster.wait_for(lambda: step in started.steps(), 150, f"step {step} of job {started.id}")


def test_a_run_that_ends_well_and_arguments_as_they_were_given(cluster, start, capsys):
    odd = ["a=$(touch hurt) `id` 'x' \"y\" \\ *", "b=two\nlines", "c=ü 😀 \u2028", "d=[{stage: token}]"]
    started = start(*odd)
    assert follow(started.id, started.run / "slurm.log", 0.2) == 0
    said = capsys.readouterr().out
    assert "COMPLETED, exit code 0" in said and "step 5" in said and "attempt 1 of job" in said and "Executing" not in said
    assert json.loads((started.run / "given-0.json").read_text())["overrides"] == odd
    assert started.steps() == [1, 2, 3, 4, 5] and read_status(started.run)["state"] == "done"
    assert started.notebooks() == ["notebook.ipynb"] and not list(started.run.parent.glob(".*.ipynb")) and not list(Path.cwd().glob("hurt"))


def test_a_failing_cell_gives_exit_code_1_and_a_notebook_that_shows_it(cluster, start):
    started = start("fail=2")
    assert follow(started.id, started.run / "slurm.log", 0.2) == 1
    assert job(started.id).state == "FAILED" and read_status(started.run)["state"] == "failed"
    notebook = nbformat.read(started.run / "notebook.ipynb", 4)
    assert [o["evalue"] for c in notebook.cells if c.cell_type == "code" for o in c.outputs if o.output_type == "error"] == ["the loss is not a number"]
    assert "the loss is not a number" in started.log()


def test_a_notebook_that_ends_early_without_an_error_has_failed(cluster, start):
    """papermill calls it a success: exit code 0, and the last cell was never reached."""
    started = start("end=running")
    assert ended(cluster, started).result == 1
    assert read_status(started.run)["state"] == "failed"


def test_a_cancelled_run_has_failed_and_its_notebook_is_kept(cluster, start):
    started = start("steps=1000", WHILE_IT_COUNTS)
    counting(cluster, started, 2)
    cluster.run("scancel", started.id)
    assert ended(cluster, started).state == "CANCELLED"
    cluster.wait_for(lambda: read_status(started.run)["state"] == "failed", 15, "the status failed")
    assert "SIGTERM" in read_status(started.run)["message"]
    assert started.notebooks() == ["notebook.ipynb"]


def test_asked_to_stop_it_is_queued_again_and_goes_on_in_the_same_folder(cluster, start):
    """Twice: in the middle, and while the second attempt is still beginning, which takes the file STOP of the first one away."""
    started = start("steps=8", "prepare=1.5", WHILE_IT_COUNTS)
    counting(cluster, started, 2)
    cluster.run("scancel", "--batch", "--signal=USR1", started.id)
    cluster.wait_for(lambda: "attempt 2 of job" in started.log(), 150, "the second attempt")
    cluster.run("scancel", "--batch", "--signal=USR1", started.id)
    assert ended(cluster, started).state == "COMPLETED"
    assert job(started.id).restarts == 2 and len(started.steps("paused")) == 2
    assert started.steps() == list(range(1, 9)) and read_status(started.run)["state"] == "done"
    assert started.notebooks() == ["notebook.1.ipynb", "notebook.2.ipynb", "notebook.ipynb"]


def test_a_training_whose_notebook_died_comes_to_its_end(cluster, start):
    started = start("die=1")
    assert ended(cluster, started).result == 138  # papermill's code for a dead kernel
    assert (started.run / "trained").exists() and read_status(started.run)["state"] == "failed"


def test_a_job_that_gets_nowhere_is_not_queued_for_ever(cluster, start):
    started = start("steps=1000", WHILE_IT_COUNTS, "stuck=1")
    counting(cluster, started, 2)
    cluster.run("scancel", "--batch", "--signal=USR1", started.id)
    cluster.wait_for(lambda: job(started.id).restarts == 1 and job(started.id).state == "RUNNING", 150, "the second attempt")
    counting(cluster, started, len(started.steps()) + 2)
    cluster.run("scancel", "--batch", "--signal=USR1", started.id)
    assert ended(cluster, started).state == "FAILED"
    assert "the time limit is too short" in read_status(started.run)["message"]


def test_stopped_by_hand_it_stays_stopped(cluster, start):
    started = start("steps=1000", WHILE_IT_COUNTS)
    counting(cluster, started, 2)
    (started.run / "STOP").touch()
    assert ended(cluster, started).result == 0
    assert read_status(started.run)["state"] == "preempted" and job(started.id).restarts == 0


def test_slurms_own_signal_comes_before_the_time_limit(cluster, short):
    """A run of 33 seconds and more in a job of a minute that is asked to stop when at most 45 seconds are left."""
    assert ended(cluster, short).state == "COMPLETED"
    assert job(short.id).restarts >= 1  # on a slow machine the signal may come more than once
    assert short.steps() == list(range(1, 111)) and "Slurm asks to stop" in short.log()


def test_asked_to_stop_while_data_is_prepared_it_begins_again(cluster, tmp_path, monkeypatch):
    """By hand, there is no run folder yet. The job finds its own folder by its number."""
    monkeypatch.chdir(tmp_path)
    text = render("sft", PROFILE, ["nano3", "conf/my tiny.yaml", "prepare=3", "steps=2"])
    number = submit(elsewhere(text, checkout(tmp_path / "root")))
    log = tmp_path / f"nemotron-sft-{number}.log"
    cluster.wait_for(lambda: log.exists() and "preparing" in log.read_text(), 150, "the first cell")
    time.sleep(1.0)
    cluster.run("scancel", "--batch", "--signal=USR1", number)
    cluster.wait_for(lambda: job(number).ended, 150, "the end")
    assert job(number).state == "COMPLETED" and job(number).restarts == 1, log.read_text()
    (run,) = (tmp_path / "output" / "nano3" / "sft").iterdir()
    assert json.loads((run / "given-1.json").read_text())["overrides"][:2] == ["run.nodes=1", "run.nproc_per_node=1"]
    assert run.name.endswith(f"-my-tiny-job{number}") and read_status(run)["state"] == "done"
