"""`nemotron synth`, as it is typed: bad servers, bad settings, a full disk, a killed run. What falls is said, with its step."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from nemotron_nb.cli import app
from nemotron_nb.core import UserError
from nemotron_nb.rehearsal import Reply, rehearsal
from nemotron_nb.synth import produce
from nemotron_nb.synth.pipelines import PIPELINES
from nemotron_nb.synth.science import rehearse_science
from nemotron_nb.synth.sql import SqlSettings

SECRET = "sk-4711-very-secret"


def typed(*words):
    """(exit status, all that it said) of a command, as `nemotron` ends and says it."""
    said = CliRunner().invoke(app, ["synth", *map(str, words)])
    if isinstance(said.exception, UserError):
        return 1, f"{said.output}error: {said.exception}"
    assert said.exception is None or isinstance(said.exception, SystemExit), said.exception
    return said.exit_code, said.output


def science(server, root, *more):
    """A run of science on a server that is really there."""
    words = ("science", "-c", "tiny", "rows=4", "max_drop_share=0.5", f"run.output_root={root}", f"teacher.base_url={server.url}")
    return typed(*words, "teacher.model=m", "teacher.retries=0", "teacher.timeout=60", *more)


def run_of(root):
    """The folder of the one run below a root."""
    [folder] = [path.parent for path in Path(root).glob("synth/*/*/journal")]
    return folder


def honest(body, before):
    return rehearse_science(body, before, honest=True)


def test_a_server_that_answers_well(tmp_path):
    with rehearsal(honest) as server:
        code, said = science(server, tmp_path)
    assert code == 0 and "4 of 4 rows kept" in said
    assert typed("check", run_of(tmp_path) / "rows.jsonl")[0] == 0


UNUSABLE = {
    "html": Reply(raw=b"<html>busy</html>"),
    "no choices": Reply(raw=b'{"choices": []}'),
    "a list": Reply(raw=b'{"choices": [{"message": {"content": ["a"]}}]}'),
    "null": Reply(raw=b'{"choices": [{"message": {"content": null}}]}'),
    "half": Reply('{"question": "Wh'),
    "two values": Reply("{} {}"),
    "nan": Reply('{"question": NaN}'),
    "a key twice": Reply('{"question": "a", "question": "b"}'),
    "17 megabytes": Reply("x" * (17 << 20)),
    "thought cut": Reply(None, reasoning="Hm.", finish_reason="length"),
    "refused": Reply(status=400),
}


@pytest.mark.parametrize("reply", UNUSABLE.values(), ids=list(UNUSABLE))
def test_a_server_whose_answers_are_of_no_use_fails_the_run_and_the_step_is_named(reply, tmp_path):
    with rehearsal(lambda body, before: reply) as server:
        code, said = science(server, tmp_path)
    assert code == 1 and "100% of the rows fell, and at most 50% may: the step 'write' took 4 of 4 rows: teacher_" in said
    drops = [json.loads(line) for line in open(run_of(tmp_path) / "drops.jsonl")]
    assert [drop["index"] for drop in drops] == [0, 1, 2, 3] and {drop["step"] for drop in drops} == {"write"}
    assert (run_of(tmp_path) / "rows.jsonl").read_bytes() == b""


GONE = {
    "dies in the middle": (Reply("x", headers={"Content-Length": "900"}), "broke off", ""),
    "too slow": (Reply("late", delay=6), "no answer within 2 s", "teacher.timeout=2"),
    "overloaded": (Reply(status=503), "HTTP 503", ""),
    "wait an hour": (Reply(status=429, headers={"Retry-After": "3600"}), "asks to wait 3600 s", "teacher.retries=1"),
    "no such model": (Reply(status=404, raw=b"no model m"), "HTTP 404", ""),
}


@pytest.mark.parametrize("name", GONE)
def test_a_server_that_goes_away_stops_the_run_which_goes_on_later(name, tmp_path):
    reply, words, more = GONE[name]
    asked = []

    def script(body, before):
        asked.append(body)
        return reply if len(asked) > 5 else honest(body, before)

    with rehearsal(script) as server:
        code, said = science(server, tmp_path, "teacher.concurrency=1", *more.split())
    assert code == 1 and words in said, said
    assert not (run_of(tmp_path) / "manifest.json").exists()
    with rehearsal(honest) as server:
        assert science(server, tmp_path)[0] == 0
    with rehearsal(honest) as server:
        assert science(server, tmp_path / "quiet")[0] == 0
    rows = [(run_of(where) / "rows.jsonl").read_bytes() for where in (tmp_path, tmp_path / "quiet")]
    assert rows[0] == rows[1] and rows[0].count(b"\n") == 4


def test_a_model_that_changes_its_name_is_told(tmp_path):
    names = iter(f"m-{i // 7}" for i in range(10**6))
    with rehearsal(lambda body, before: Reply(**{**vars(honest(body, before)), "model": next(names)})) as server:
        assert science(server, tmp_path, "teacher.concurrency=1")[0] == 0
    cost = json.loads((run_of(tmp_path) / "cost.json").read_text())
    assert cost["model_changes"] >= 2 and set(cost["models"]) >= {"m-0", "m-1"}
    assert len({json.dumps(json.loads(line)["synth"]["models"]) for line in open(run_of(tmp_path) / "rows.jsonl")}) > 1


def test_the_answers_of_another_model_are_not_taken(tmp_path):
    asked = []
    with rehearsal(lambda body, before: asked.append(body["model"]) or honest(body, before)) as server:
        for i, model in enumerate(("one", "one", "two")):
            words = (f"teacher.model={model}", f"teacher.cache_dir={tmp_path}/answers")
            assert science(server, tmp_path / str(i), *words)[0] == 0
    assert asked.count("one") == asked.count("two") == len(asked) // 2 > 0


def test_a_key_stands_in_no_file_and_in_nothing_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", SECRET)
    with rehearsal(lambda body, before: Reply(status=400, raw=f"bad key {SECRET}".encode())) as server:
        code, said = science(server, tmp_path, "teacher.api_key_env=MY_KEY")
    assert server.headers[0]["authorization"] == f"Bearer {SECRET}"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert code == 1 and SECRET not in said and len(files) > 3
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


TYPED = {
    "sql rowz=4": "did you mean 'synth.rows'", "sql rows=0": "0 is too small", "sql rows=many": "rows",
    "sql max_drop_share=2": "max_drop_share", "sql engine=postgres": "did you mean 'postgresql'",
    "science teacher.api_key=sk-1": "did you mean 'synth.teacher.api_key_env'",
    "science teacher.base_url=localhost": "base_url", "science teacher.base_url=http://me:pw@localhost/v1 teacher.model=m": "password",
    "long_context target_cap=1500": "are no order", "long_context tasks=[neddle]": "did you mean 'needle'",
    "long_context tokenizer=nobody/none": "could not be fetched", "search triples=nowhere.jsonl": "no such file",
    "search fewest_hops=9": "is no range", "rqa documents=nowhere.jsonl": "nowhere.jsonl", "infinity seeds=nowhere.jsonl": "nowhere.jsonl",
}  # fmt: skip


@pytest.mark.parametrize("words", TYPED)
def test_a_setting_that_cannot_be_meant_stops_before_a_row(words, tmp_path):
    name, *settings = words.split()
    code, said = typed(name, "-c", "tiny", *settings, f"run.output_root={tmp_path}")
    assert code == 1 and TYPED[words] in said and "Traceback" not in said
    assert not list(tmp_path.rglob("rows.jsonl"))


def test_a_pipeline_that_keeps_too_little_fails_each_time_it_is_asked_for(tmp_path):
    for _ in range(2):
        code, said = typed("sql", "-c", "tiny", "rows=40", "max_drop_share=0.01", f"run.output_root={tmp_path}")
        assert code == 1 and "at most 1% may: the step 'prove' took" in said and "empty_result" in said
    assert (run_of(tmp_path) / "rows.jsonl").read_bytes().count(b"\n") > 20  # what there is can be read


def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(tmp_path):
    words = ["synth", "sql", "-c", "tiny", "rows=40"]
    full = subprocess.run(
        [sys.executable, "-c", "from nemotron_nb.cli import main; main()", *words, f"run.output_root={tmp_path}"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)), capture_output=True, text=True,
    )  # fmt: skip
    assert full.returncode == 1 and "Traceback" not in full.stderr, full.stderr
    assert "cannot be written: No space left on device" in full.stderr and "goes on" in full.stderr
    kept = (run_of(tmp_path) / "journal").read_bytes()
    assert len(kept) == 40_000
    for root in (tmp_path, tmp_path / "quiet"):
        assert typed(*words[1:], f"run.output_root={root}")[0] == 0
    assert (run_of(tmp_path) / "journal").read_bytes().startswith(kept[: kept.rindex(b"\n")])
    rows = [(run_of(where) / "rows.jsonl").read_bytes() for where in (tmp_path, tmp_path / "quiet")]
    assert rows[0] == rows[1] != b""


def test_a_disk_that_is_full_at_the_end_is_said(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(produce, "_write_files", full)
        with pytest.raises(UserError, match="cannot be written: No space left"):
            produce.produce(PIPELINES["sql"], SqlSettings(rows=4), tmp_path)
    assert produce.produce(PIPELINES["sql"], SqlSettings(rows=4), tmp_path).made_now == 0


def test_a_clock_that_goes_back_changes_nothing(tmp_path, monkeypatch):
    back = iter(range(10**9, 0, -60))
    monkeypatch.setattr("time.time", lambda: next(back))
    produce.produce(PIPELINES["sql"], SqlSettings(rows=12), tmp_path / "back")
    monkeypatch.undo()
    produce.produce(PIPELINES["sql"], SqlSettings(rows=12), tmp_path / "on")
    for name in ("rows.jsonl", "drops.jsonl", "manifest.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "on" / name).read_bytes()
