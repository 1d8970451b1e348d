"""Does the command line do what it says, from chats to report?"""

import json
import os
import re
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from commands import NEMOTRON, ONE_THREAD, nemotron
from run_folders import fabricated_run

SMALL = ["-c", "tiny", "data.sample=24", "data.pack_size=512", "model.pattern=ME*", "model.hidden_size=32", "train.global_batch_size=1"]
SMALL += ["evaluation.num_generations=2", "evaluation.max_new_tokens=4", "train.train_iters=2"]


def test_help_needs_nothing_heavy():
    code = "import sys, nemotron_nb.ops.cli; print([m for m in ('torch', 'transformers', 'papermill', 'pyarrow', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize("words", [(), ("nano3",), ("super3", "data"), ("nano3", "data", "prep", "sft"), ("super3", "sft"), ("report",), ("runs",)])
def test_help_at_every_level(tmp_path, words):
    done = nemotron(*words, "--help", cwd=tmp_path)
    assert done.returncode == 0 and "Usage: nemotron" in done.stdout


def test_dry_run_shows_every_value_with_its_origin_and_runs_nothing(tmp_path):
    (tmp_path / "mine.yaml").write_text("optimizer:\n  lr: 2e-3\n")
    done = nemotron("nano3", "sft", "-c", "mine.yaml", "--dry-run", "train.train_iters=50", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    row = {line.split()[1]: line for line in done.stdout.splitlines() if line.startswith("*")}
    assert set(row) == {"optimizer.lr", "train.train_iters"}
    assert re.search(r"0\.002 +\S*mine\.yaml$", row["optimizer.lr"]) and re.search(r"50 +command line$", row["train.train_iters"])
    assert [p.name for p in tmp_path.iterdir()] == ["mine.yaml"]


def test_data_prep_prints_where_and_what_and_finds_it_again(tmp_path):
    words = ("super3", "data", "prep", "sft", "-c", "tiny", "--sample", "12")
    first, second = (nemotron(*words, cwd=tmp_path) for _ in range(2))
    said = [[line for line in run.stdout.splitlines() if line and not line.startswith("tokenized: ")] for run in (first, second)]
    assert first.returncode == 0 and said[0] == said[1] and "tokenized: 1 units by tokenizers" in first.stdout
    folder = tmp_path / re.search(r"prepared data: (\S+)", first.stdout)[1]
    assert json.loads((folder / "manifest.json").read_text())["rows"] == 12
    stamp = (folder / "manifest.json").stat().st_mtime_ns
    assert nemotron(*words, "--force", cwd=tmp_path).returncode == 0
    assert (folder / "manifest.json").stat().st_mtime_ns > stamp


def test_report_and_runs_read_folders_alone(tmp_path):
    folder = fabricated_run(tmp_path / "output" / "nano3" / "sft" / "20260314T092653Z-x-000000")
    listed = nemotron("runs", cwd=tmp_path)
    assert re.search(r"20260314T092653Z-x-000000 +done +40 +1\.250", listed.stdout)
    done = nemotron("report", folder, cwd=tmp_path)
    assert done.returncode == 0 and "5.125 before, 1.250 after" in done.stdout and (folder / "report.html").exists()
    assert nemotron("report", tmp_path / "nowhere", cwd=tmp_path).returncode == 1


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One real run, two steps long: what it said, and its folder."""
    cwd = tmp_path_factory.mktemp("run")
    done = nemotron("nano3", "sft", *SMALL, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done, next((cwd / "output" / "nano3" / "sft").iterdir())


def test_a_run_leaves_all_it_promises(run):
    done, folder = run
    promised = ["config.yaml", "origins.json", "env.json", "manifest.json", "train.yaml", "train.log", "metrics.jsonl", "evaluation_before.json"]
    promised += ["evaluation_after.json", "notebook.ipynb", "report.html", "status.json", "model/config.json"]
    assert [p for p in promised if not (folder / p).exists()] == []
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    assert done.stderr == ""


def test_a_run_tells_what_it_does(run):
    done, folder = run
    assert f"Report: output/nano3/sft/{folder.name}/report.html" in done.stdout
    assert "step     1 of 2" in done.stdout and "The run is complete." in done.stdout


def test_the_executed_notebook_is_whole(run):
    _, folder = run
    notebook = nbformat.read(folder / "notebook.ipynb", 4)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert all(c.execution_count for c in code) and not any(o.output_type == "error" for c in code for o in c.outputs)
    assert [c for c in code if "injected-parameters" in c.metadata.get("tags", [])]
    assert (folder / "notebook.ipynb").stat().st_size < 1_000_000


def test_the_report_of_a_real_run_has_every_section(run):
    _, folder = run
    text = (folder / "report.html").read_text()
    for title in ("What became of the chats", "Loss", "One held-out chat, token by token", "Answers to held-out prompts", "Settings in force", "Code and machine"):
        assert f"<h2>{title}</h2>" in text, title
    assert "<script" not in text and "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", text.partition("Answers to held-out")[0])


def test_a_run_that_fails_in_training_says_why(run, tmp_path):
    done = nemotron("nano3", "sft", *SMALL, "model.name=no_such_folder/model", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.count("error: ") >= 1 and "no_such_folder/model" in done.stderr
    folder = next((tmp_path / "output" / "nano3" / "sft").iterdir())
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "failed" and "no_such_folder/model" in status["message"]
    assert (folder / "notebook.ipynb").exists() and not (folder / ".partial.ipynb").exists()
    assert nemotron("report", folder, cwd=tmp_path).stdout.startswith("The run failed")


def _descendants(pid: int) -> list[int]:
    """All processes below `pid` (Linux)."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [p for child in map(int, found) for p in [child, *_descendants(child)]]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_end_leaves_no_process_behind(tmp_path, how):
    """scancel and Ctrl-C: the training stops, the status says failed."""
    words = ["nano3", "sft", *SMALL[:-1], "train.train_iters=100000"]
    command = subprocess.Popen([str(NEMOTRON), *words], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ONE_THREAD)
    deadline = time.monotonic() + 90
    while len(below := _descendants(command.pid)) < 2 or not list(tmp_path.glob("output/nano3/sft/*/train.log")):  # the kernel and the training
        assert time.monotonic() < deadline and command.poll() is None
        time.sleep(0.2)
    command.send_signal(how)
    assert command.wait(30) != 0
    while any(os.path.exists(f"/proc/{p}") and "Z" not in open(f"/proc/{p}/stat").read().split()[2] for p in below):
        assert time.monotonic() < deadline, "a process was left behind"
        time.sleep(0.1)
    assert json.loads(next(tmp_path.glob("output/nano3/sft/*/status.json")).read_text())["state"] == "failed"
