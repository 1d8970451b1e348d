"""Does a run folder tell the truth, whatever happens to the run?"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone

import pytest

from nemotron_nb.core import UserError, write_json
from nemotron_nb.ops import run_folder
from nemotron_nb.ops.run_folder import (
    planned_steps,
    Found,
    MetricsReader,
    Started,
    begin_attempt,
    environment,
    follow,
    found_training,
    keep_notebook,
    list_runs,
    make_run_folder,
    new_lines,
    passing_signals_on,
    put_back,
    read_metrics,
    read_status,
    read_tail,
    run_name,
    run_state,
    set_status,
    slug,
    slurm_job,
    start_training,
)

PYTHON = sys.executable


def test_the_name_is_in_utc_whatever_the_clock_says():
    here = datetime(2026, 1, 1, 1, 30, tzinfo=timezone(timedelta(hours=2)))
    assert run_name(here, "x", {}).startswith("20251231T233000Z-x-")


def test_equal_inputs_have_equal_digits():
    now = datetime.now(timezone.utc)
    assert run_name(now, "a", {"x": 1, "y": 2}) == run_name(now, "a", {"y": 2, "x": 1})
    assert run_name(now, "a", {"x": 1})[-6:] != run_name(now, "a", {"x": 2})[-6:]


@pytest.mark.parametrize("label", ["", "../../etc", "a/b", "Ärger!", "x" * 300, ".hidden"])
def test_no_label_leads_out_of_the_folder(label):
    assert "/" not in slug(label) and not slug(label).startswith(".") and 0 < len(slug(label)) <= 40


def test_many_at_once_get_a_folder_each(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: make_run_folder(tmp_path / "runs", "same"), range(40)))
    assert len(set(folders)) == 40 and all(f.is_dir() for f in folders)


@pytest.mark.parametrize("end", ["preempted", "failed", "done"])
@pytest.mark.parametrize("later", ["queued", "running", "preempted", "failed", "done"])
def test_a_finished_run_keeps_its_state(tmp_path, end, later):
    set_status(tmp_path, "running")
    before = set_status(tmp_path, end, message="first")
    assert set_status(tmp_path, later, message="second") == before == read_status(tmp_path)


def test_the_start_is_kept_when_the_state_changes(tmp_path):
    started = set_status(tmp_path, "running")["started"]
    assert set_status(tmp_path, "done")["started"] == started


def test_a_killed_run_is_lost_and_one_of_another_machine_is_not(tmp_path):
    child = subprocess.Popen([PYTHON, "-c", "import time; time.sleep(60)"])
    write_json(tmp_path / "status.json", set_status(tmp_path, "running") | {"pid": child.pid})
    assert run_state(tmp_path) == "running"
    child.kill()
    child.wait()
    assert run_state(tmp_path) == "lost"
    write_json(tmp_path / "status.json", read_status(tmp_path) | {"host": "another-machine"})
    assert run_state(tmp_path) == "running"


def test_metrics_cut_at_every_byte(tmp_path):
    """Wherever the writer has got to, the reader sees whole lines, all of them, in order."""
    entries = [{"kind": "train", "step": i, "text": "Ä" * i} for i in range(4)]
    data = "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in entries).encode()
    path = tmp_path / "metrics.jsonl"
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        assert read_metrics(path) == entries[: data[:cut].count(b"\n")]


def test_metrics_read_piece_by_piece_are_the_whole(tmp_path):
    path, seen, got = tmp_path / "metrics.jsonl", 0, []
    data = b"".join(json.dumps({"step": i}).encode() + b"\n" for i in range(50))
    for end in range(0, len(data) + 7, 7):
        path.write_bytes(data[:end])
        entries, seen = new_lines(path, seen)
        got += entries
    assert [e["step"] for e in got] == list(range(50))


def test_a_length_in_epochs_is_steps_once_training_has_said_so(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    assert planned_steps(tmp_path) == 0
    metrics.write_text('{"kind": "start", "train_it')
    assert planned_steps(tmp_path) == 0
    metrics.write_text('{"kind": "start", "train_iters": 3}\n{"kind": "train", "step": 1}\n')
    assert planned_steps(tmp_path) == 3


def test_a_damaged_line_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"a": 1}\n{"a"\n{"a": 2}\n')
    with pytest.raises(UserError, match="damaged"):
        read_metrics(tmp_path / "metrics.jsonl")


def writer(folder, steps, tail=""):
    lines = f"for i in range({steps}): f.write(json.dumps(dict(kind='train', step=i)) + chr(10)); f.flush()"
    return [PYTHON, "-c", f"import json, os, sys, time\nf = open({str(folder / 'metrics.jsonl')!r}, 'w')\n{lines}\n{tail}"]


def test_every_line_is_followed_even_the_last(tmp_path):
    """The process writes and ends between two looks; nothing may be missed."""
    got = list(follow(start_training(tmp_path, writer(tmp_path, 500)), poll_seconds=0.3))
    assert [e["step"] for e in got] == list(range(500))


def test_a_line_written_between_two_looks_is_not_missed(tmp_path):
    """The process writes its last line and ends just as it is asked whether it still runs."""

    class Process:
        returncode, asked = 0, 0

        def poll(self):
            self.asked += 1
            if self.asked == 2:
                (tmp_path / "metrics.jsonl").write_text('{"kind": "end"}\n')
            return None if self.asked < 2 else 0

    assert list(follow(Started(Process(), tmp_path), poll_seconds=0)) == [{"kind": "end"}]


def test_a_failure_comes_after_the_lines_and_brings_the_log(tmp_path):
    got = []
    with pytest.raises(UserError) as e:
        for entry in follow(start_training(tmp_path, writer(tmp_path, 3, "print('out of luck'); sys.exit(5)"))):
            got.append(entry["step"])
    assert got == [0, 1, 2]
    assert "exit code 5" in str(e.value) and "out of luck" in str(e.value) and "train.log" in str(e.value)


def test_a_kill_is_named(tmp_path):
    with pytest.raises(UserError, match="SIGKILL.*out of memory"):
        list(follow(start_training(tmp_path, writer(tmp_path, 1, f"os.kill(os.getpid(), {int(signal.SIGKILL)})"))))


def test_turning_away_stops_the_process(tmp_path):
    training = start_training(tmp_path, writer(tmp_path, 1, "time.sleep(60)"))
    next(lines := follow(training))
    lines.close()
    assert training.process.returncode == -signal.SIGTERM


def test_a_process_that_ignores_the_request_is_ended_anyway(tmp_path):
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    process = subprocess.Popen([PYTHON, "-c", deaf], stdout=subprocess.PIPE)
    process.stdout.readline()
    started = time.monotonic()
    Started(process, tmp_path).stop(patience=0.2)
    assert process.returncode == -signal.SIGKILL and time.monotonic() - started < 5


def test_the_environment_is_json_and_names_what_runs(tmp_path):
    env = environment()
    assert json.loads(json.dumps(env)) == env
    assert env["python"] == sys.version.split()[0] and "pytest" in env["packages"] and env["host"]["cpus"] == os.cpu_count()


def test_runs_are_listed_oldest_first(tmp_path):
    for family, name in (("super3", "20260101T000000Z-b"), ("nano3", "20260102T000000Z-a")):
        set_status(make_run_folder(tmp_path / family / "sft", name), "running")
    (tmp_path / "nano3" / "sft" / "not-a-run").mkdir()
    assert [p.name for p in list_runs(tmp_path)] == ["20260101T000000Z-b", "20260102T000000Z-a"]


JOB = {"SLURM_JOB_ID": "7"}


def in_job(monkeypatch, job="7", restart=None):
    """As if this process ran in a Slurm job, started again so many times."""
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    if restart is not None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))


def test_attempts_are_numbered_and_each_is_kept(tmp_path):
    set_status(tmp_path, "queued", command="nemotron nano3 sft")
    (tmp_path / "STOP").touch()
    for number in (1, 2, 3):
        assert begin_attempt(tmp_path) == number and not (tmp_path / "STOP").exists()
        set_status(tmp_path, "preempted", message=f"stop {number}")
        (tmp_path / "STOP").touch()
    status = read_status(tmp_path)
    assert [(a["attempt"], a["state"], a["message"]) for a in status["attempts"]] == [(n, "preempted", f"stop {n}") for n in (1, 2, 3)]
    assert status["command"] == "nemotron nano3 sft" and all(a["ended"] for a in status["attempts"])
    assert [json.loads((tmp_path / "attempts" / f"{n}.json").read_text())["python"] for n in (1, 2, 3)] == [sys.version.split()[0]] * 3


def test_only_one_of_many_begins_an_attempt(tmp_path):
    set_status(tmp_path, "queued")

    def begin(_):
        try:
            return begin_attempt(tmp_path)
        except UserError:
            return None

    with ThreadPoolExecutor(8) as pool:
        assert sorted(filter(None, pool.map(begin, range(8)))) == [1]
    assert len(read_status(tmp_path)["attempts"]) == 1


@pytest.mark.parametrize(("state", "may"), [("queued", True), ("running", False), ("preempted", True), ("failed", False), ("done", False)])
def test_who_may_go_on(tmp_path, state, may):
    set_status(tmp_path, state)
    if may:
        assert begin_attempt(tmp_path) == 1
    else:
        with pytest.raises(UserError, match=f"the run is {state}"):
            begin_attempt(tmp_path)


@pytest.mark.parametrize("state", ["running", "failed"])
def test_a_job_that_slurm_started_again_goes_on_whatever_its_predecessor_wrote(tmp_path, monkeypatch, state):
    """While a node dies nobody writes a status, and while a job is killed somebody may write `failed`."""
    in_job(monkeypatch)
    monkeypatch.setattr(run_folder, "_job_is_there", lambda job: True)
    set_status(tmp_path, "queued")
    begin_attempt(tmp_path)
    if state == "failed":
        set_status(tmp_path, "failed", message="ended by SIGTERM")
    with pytest.raises(UserError):
        begin_attempt(tmp_path)  # the same start of the same job
    in_job(monkeypatch, job="8", restart=1)
    with pytest.raises(UserError):
        begin_attempt(tmp_path)  # another job
    in_job(monkeypatch, restart=1)
    assert begin_attempt(tmp_path) == 2


def test_a_failed_run_goes_on_when_somebody_asks(tmp_path):
    set_status(tmp_path, "queued")
    begin_attempt(tmp_path)
    set_status(tmp_path, "failed", message="no memory")
    put_back(tmp_path)
    assert begin_attempt(tmp_path) == 2 and "message" not in read_status(tmp_path)
    with pytest.raises(UserError, match="is running"):
        put_back(tmp_path)


def test_a_job_that_is_gone_has_lost_its_run(tmp_path, monkeypatch):
    """The process is on another machine: Slurm is asked, and where it cannot be asked the state stays."""
    set_status(tmp_path, "queued")
    write_json(tmp_path / "job.json", [{"job": "41"}, {"job": "42"}])
    for there, shown in ((True, "queued"), (None, "queued"), (False, "lost")):
        monkeypatch.setattr(run_folder, "_job_is_there", lambda job: there if job == "42" else True)
        assert run_state(tmp_path) == shown
    assert slurm_job(JOB | {"SLURM_JOB_PARTITION": "batch"}) == {"job": "7", "partition": "batch"}


def test_a_reader_sees_what_was_cut_back_and_written_again(tmp_path):
    """Whatever it had read before the cut: afterwards it gives the lines from the newest resume line on, each once."""
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "train", "step": n, "loss": n / 7}) + "\n" for n in range(1, 9)]
    resume = json.dumps({"kind": "resume", "step": 3, "attempt": 2}) + "\n"
    for read_before in range(9):
        path.write_text("".join(lines[:read_before]))
        reader = MetricsReader(path)
        assert len(reader.new()) == read_before
        path.write_text("".join(lines[:3]) + resume + "".join(lines[3:]))
        steps = [(e["kind"], e["step"]) for e in reader.new()]
        after = [("train", n) for n in range(4, 9)]
        before = [("train", n) for n in range(read_before + 1, 4)]
        assert steps in ([("resume", 3), *after], [*before, ("resume", 3), *after])
        assert reader.new() == []


def test_following_a_second_attempt_begins_where_the_first_ended(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "paused", "step": 1}\n')
    appends = f"f = open({str(tmp_path / 'metrics.jsonl')!r}, 'a'); f.write('{{\"kind\": \"resume\", \"step\": 1}}\\n{{\"kind\": \"end\"}}\\n')"
    assert [e["kind"] for e in follow(start_training(tmp_path, [PYTHON, "-c", appends]))] == ["resume", "end"]


def test_a_training_inside_a_job_outlives_its_reader_and_is_found_again(tmp_path, monkeypatch):
    in_job(monkeypatch)
    set_status(tmp_path, "queued")
    (tmp_path / "train.yaml").touch()
    slow = f"import time\nf = open({str(tmp_path / 'metrics.jsonl')!r}, 'w')\nfor i in range(3): f.write('{{\"kind\": \"train\", \"step\": %d}}\\n' % i); f.flush(); time.sleep(0.4)\nf.write('{{\"kind\": \"end\"}}\\n')".replace("{{", "{").replace("}}", "}")
    training = start_training(tmp_path, [PYTHON, "-c", slow, str(tmp_path / "train.yaml")])
    assert os.getpgid(training.process.pid) != os.getpgid(0), "it must not be in the notebook's process group"
    next(lines := follow(training))
    lines.close()
    assert training.running()
    found = start_training(tmp_path, [PYTHON, "-c", "raise SystemExit(1)"])
    assert isinstance(found, Found) and found.pid == training.process.pid
    assert [e["kind"] for e in follow(found)][-1] == "end"
    training.process.wait()
    assert isinstance(found_training(tmp_path), Found), "a training that has ended is not begun again"


def test_a_training_that_died_is_begun_again(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    write_json(tmp_path / "train.json", {"pid": os.getpid(), "host": socket.gethostname()})
    assert found_training(tmp_path) is None, "this process has the number, but is no training"


def test_notebooks_of_earlier_attempts_are_kept(tmp_path):
    for text in "abc":
        (tmp_path / ".partial.ipynb").write_text(text)
        keep_notebook(tmp_path, tmp_path / ".partial.ipynb")
    assert [(tmp_path / n).read_text() for n in ("notebook.1.ipynb", "notebook.2.ipynb", "notebook.ipynb")] == ["a", "b", "c"]
    keep_notebook(tmp_path, tmp_path / ".partial.ipynb")
    assert (tmp_path / "notebook.ipynb").read_text() == "c"


def test_the_tail_is_the_end_of_the_whole(tmp_path):
    """Compared with reading everything, for lines of every length and windows of every size."""
    draw, path = random.Random(0), tmp_path / "metrics.jsonl"
    assert read_tail(path) == ([], True)
    for _ in range(60):
        path.write_text("".join(json.dumps({"kind": "train", "step": n, "text": "Ä" * draw.randrange(60)}) + "\n" for n in range(draw.randrange(1, 30))) + draw.choice(["", '{"kin']))
        everything = read_metrics(path)
        for most in (1, draw.randrange(1, 400), 10_000):
            lines, whole = read_tail(path, most)
            assert lines == everything[-len(lines) :] and lines and (len(lines) == len(everything) or not whole)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"state": "don"}', "\0\xff", "[" * 100_000])
def test_a_damaged_status_is_named(tmp_path, text):
    (tmp_path / "status.json").write_bytes(text.encode("latin1"))
    with pytest.raises(UserError, match=r"status\.json: .*\n.*damaged"):
        run_state(tmp_path)


GOES_ON = """
import json, sys, time
from pathlib import Path
folder, step = Path(sys.argv[1]).parent, 0
while True:
    step += 1
    stop = (folder / "STOP").exists()
    with open(folder / "metrics.jsonl", "a") as f: f.write(json.dumps({"kind": "paused" if stop else "train", "step": step}) + "\\n")
    if stop: sys.exit()
    time.sleep(0.05)
"""


def trains_alone(folder):
    """A process that looks like the training of a folder, counts steps, and obeys STOP."""
    set_status(folder, "queued")
    begin_attempt(folder)
    (folder / "train.yaml").touch()
    return start_training(folder, [PYTHON, "-c", GOES_ON, str(folder / "train.yaml")])


def test_a_training_whose_command_is_gone_is_unfollowed_and_taken_up_again(tmp_path):
    """Not lost, since it goes on; and whoever resumes follows it, and does not start a second one."""
    started = trains_alone(tmp_path)
    gone = subprocess.Popen([PYTHON, "-c", ""])
    gone.wait()
    write_json(tmp_path / "status.json", read_status(tmp_path) | {"pid": gone.pid})
    assert run_state(tmp_path) == "unfollowed"
    put_back(tmp_path)
    assert begin_attempt(tmp_path) == 2
    found = start_training(tmp_path, [PYTHON, "-c", "raise SystemExit('a second training')"])
    assert isinstance(found, Found) and found.pid == started.process.pid
    (tmp_path / "STOP").touch()
    assert list(follow(found))[-1]["kind"] == "paused"
    started.process.wait()


def test_interrupted_once_it_asks_and_follows_on_interrupted_twice_it_ends(tmp_path, monkeypatch, capsys):
    for times, name in ((1, "once"), (2, "twice")):
        folder = tmp_path / name
        folder.mkdir()
        training, slept, left = trains_alone(folder), time.sleep, [times]

        def sleep(seconds):
            slept(0.3)
            if left[0] and read_metrics(folder / "metrics.jsonl"):
                left[0] -= 1
                raise KeyboardInterrupt

        monkeypatch.setattr(run_folder.time, "sleep", sleep)
        if times == 1:
            assert list(follow(training))[-1]["kind"] == "paused" and training.process.returncode == 0
        else:
            monkeypatch.setattr(run_folder, "ask_to_stop", lambda folder: None)
            with pytest.raises(KeyboardInterrupt):
                list(follow(training))
            assert training.process.returncode == -signal.SIGTERM
        monkeypatch.undo()
    assert "writes a checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_every_signal_that_would_end_the_command_asks_the_training_first(tmp_path, number):
    training = trains_alone(tmp_path)
    before, said = signal.getsignal(number), []
    signal.signal(number, signal.SIG_DFL)
    try:
        with passing_signals_on(tmp_path, said.append) as request:
            while not read_metrics(tmp_path / "metrics.jsonl"):
                time.sleep(0.02)
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # as `timeout` does it: one to the process, one to its group
            assert training.process.wait(20) == 0
        assert request.number == number and signal.Signals(number).name in said[0]
    finally:
        signal.signal(number, before)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["kind"] == "paused"


def test_a_signal_that_the_command_was_started_to_ignore_stays_ignored(tmp_path):
    code = f"""
import os, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
from nemotron_nb.ops.run_folder import passing_signals_on
with passing_signals_on({str(tmp_path)!r}) as request:
    os.kill(os.getpid(), signal.SIGINT)
print(request.number)
"""
    assert subprocess.run([PYTHON, "-c", code], capture_output=True, text=True).stdout == "0\n"


def test_a_training_that_died_is_gone_on_with_and_not_started_again(tmp_path):
    (tmp_path / "config.yaml").write_text("family: super3\n")
    (tmp_path / "train.yaml").touch()
    with pytest.raises(UserError, match=r"go on: nemotron super3 sft --resume \S+"):
        list(follow(start_training(tmp_path, [PYTHON, "-c", "raise SystemExit(3)"])))


def test_a_complete_run_says_how_it_is_extended(tmp_path):
    (tmp_path / "config.yaml").write_text("family: nano3\n")
    set_status(tmp_path, "done")
    with pytest.raises(UserError, match=r"nemotron nano3 sft -c \S+config\.yaml checkpoint\.load=\S+checkpoints train\.train_iters="):
        put_back(tmp_path)
