"""Watching a real job: its log, its exit code, and Ctrl-C."""

import signal
import subprocess
import sys

import pytest

from nemotron_nb.ops.slurm import cancel, follow, job, submit

WATCH = "import sys; from nemotron_nb.ops.slurm import follow; sys.exit(follow(sys.argv[1], sys.argv[2], 0.2))"


def begin(folder, *lines):
    """A job of a few lines and its log."""
    log = folder / "slurm.log"
    return submit("\n".join(["#!/usr/bin/env bash", f"#SBATCH --output={log}", "#SBATCH --mem=100M", *lines, ""])), log


@pytest.mark.parametrize(("line", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137), ("sleep 60", 143)], ids=["well", "badly", "killed", "cancelled"])
def test_the_exit_code_of_the_job_is_handed_on(cluster, tmp_path, capsys, line, code):
    number, log = begin(tmp_path, "echo one; sleep 0.5; printf two", line)
    if line.startswith("sleep"):
        cluster.wait_for(lambda: log.exists() and "two" in log.read_text(), 20, "the log")
        cancel(number)
    assert follow(number, log, 0.2) == code
    said = capsys.readouterr().out.splitlines()  # a change of the job's state may be told between the two lines
    assert line.startswith("sleep") or [text for text in said if text in ("one", "two")] == ["one", "two"]


@pytest.mark.parametrize(("typed", "code", "goes_on"), [("d\n", 130, True), ("", 130, True), ("w\nc\n", 143, False)], ids=["detach", "no answer", "watch, then cancel"])
def test_ctrl_c_asks_what_shall_become_of_the_job(cluster, tmp_path, typed, code, goes_on):
    number, log = begin(tmp_path, "sleep 60")
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell may have started these tests with it ignored
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", WATCH, number, str(log)], **pipes, text=True, preexec_fn=heard)
    for answer in typed.splitlines(keepends=True) or [""]:
        assert any(f"job {number}: RUNNING" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        process.stdin.write(answer)
        process.stdin.close() if not answer else process.stdin.flush()
    said = process.stdout.read()
    assert process.wait(30) == code and ("goes on by itself" in said) == goes_on
    assert job(number).state == ("RUNNING" if goes_on else "CANCELLED")
    cancel(number)
