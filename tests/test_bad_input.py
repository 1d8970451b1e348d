"""What does a user see who gives something that cannot work? One error, and nothing half-written."""

import json
import os

import pytest
from commands import forked_nemotron, nemotron
from typer.testing import CliRunner

from nemotron_nb.core import UserError, write_json
from nemotron_nb.ops.artifacts import Store
from nemotron_nb.cli import app
from nemotron_nb.ops.config import sft_config
from nemotron_nb.stages.sft import new_run

GOOD = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}


def lines(*records) -> str:
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records)


def chat(*messages) -> dict:
    return {"messages": [dict(zip(("role", "content"), m)) for m in messages]}


# name: (what the file holds or None, settings, what the error must name)
CASES = {
    "missing_file": (None, [], ["chats.jsonl"]),
    "empty_file": ("", [], ["chats.jsonl", "empty"]),
    "blank_lines": ("\n\n", [], ["chats.jsonl"]),
    "not_json": (lines(GOOD, "{'messages': []}"), [], ["chats.jsonl:2"]),
    "no_messages": (lines(GOOD, GOOD, {"text": "hello"}), [], ["chats.jsonl:3", "messages"]),
    "unknown_role": (lines(GOOD, chat(("usr", "hi"), ("assistant", "yes"))), [], ["chats.jsonl:2", "usr"]),
    "no_assistant_turn": (lines(chat(("user", "hi")), chat(("system", "be brief"), ("user", "hello"))), [], ["chats.jsonl", "assistant"]),
    "not_utf8": (b'{"messages": [{"role": "user", "content": "\xff"}]}\n', [], ["chats.jsonl:1"]),
    "unknown_setting": (lines(GOOD), ["optimizer.learning_rte=1"], ["optimizer.learning_rte", "command line"]),
    "misspelt_setting": (lines(GOOD), ["data.pack_sise=64"], ["data.pack_sise", "did you mean 'data.pack_size'"]),
    "wrong_type": (lines(GOOD), ["train.train_iters=many"], ["train_iters", "int"]),
    "not_an_override": (lines(GOOD), ["train.train_iters"], ["key=value"]),
    "unknown_template": (lines(GOOD), ["data.chat_template=nano4"], ["nano4", "nano3"]),
    "unknown_tokenizer": (lines(GOOD), ["data.tokenizer=tinny"], ["tinny", "tiny"]),
    "ratios_that_do_not_add_up": (lines(GOOD), ["data.train_ratio=0.5"], ["train_ratio", "add up to 1"]),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """For each case, what the command answered and the files that are there afterwards."""

    def ask(case):
        content, overrides, _ = CASES[case]
        folder = tmp_path_factory.mktemp(case)
        if content is not None:
            (folder / "chats.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
        done = forked_nemotron("nano3", "sft", "-c", "tiny", "data.path=chats.jsonl", *overrides, cwd=folder)
        return done, {p.relative_to(folder).as_posix() for p in folder.rglob("*")}

    return {case: ask(case) for case in CASES}


def without_cache(names):
    """The files of a folder, without rows that were tokenized before the error and are kept for the next attempt."""
    return {n for n in names if "/data_prep/runs" not in n} - {"output", "output/nano3", "output/nano3/data_prep"}


@pytest.mark.parametrize("case", CASES)
def test_a_training_run_refuses_it_before_anything_is_written(answers, case):
    content, _, named = CASES[case]
    done, left = answers[case]
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert "what to do:" in done.stderr, done.stderr
    for word in named:
        assert word in done.stderr, done.stderr
    assert without_cache(left) == ({"chats.jsonl"} if content is not None else set())


@pytest.mark.parametrize("case", ["missing_file", "not_json"])
def test_data_preparation_refuses_it_too(tmp_path, case):
    content, _, named = CASES[case]
    if content is not None:
        (tmp_path / "chats.jsonl").write_text(content)
    done = nemotron("super3", "data", "prep", "sft", "-c", "tiny", "path=chats.jsonl", cwd=tmp_path)
    assert done.returncode == 1 and all(word in done.stderr for word in named), done.stderr
    assert without_cache({p.relative_to(tmp_path).as_posix().replace("super3", "nano3") for p in tmp_path.rglob("*")}) <= {"chats.jsonl"}


def test_no_data_at_all(tmp_path):
    """The recipe names no chats: they are the user's."""
    done = nemotron("nano3", "sft", cwd=tmp_path)
    assert done.returncode == 1 and "data.path=chats.jsonl" in done.stderr and not list(tmp_path.iterdir())


CLUSTER = "[cluster]\nexecutor = 'slurm'\npartition = 'batch'\n"
PLACES = {  # name: (env.toml or None, words, what the error must name)
    "no_env_toml": (None, ["--run", "cluster"], ["env.toml", "env.toml.example"]),
    "unknown_profile": (CLUSTER, ["--run", "clutser"], ["there is no profile 'clutser'", "did you mean 'cluster'"]),
    "unknown_key": (CLUSTER + "partitoin = 'x'\n", ["--batch", "cluster"], ["partitoin", "did you mean 'partition'"]),
    "broken_toml": ("[cluster\n", ["--run", "cluster"], ["cannot be read as TOML"]),
    "both": (CLUSTER, ["--run", "cluster", "--batch", "cluster"], ["--run and --batch together"]),
    "misspelt_setting": (CLUSTER, ["--run", "cluster", "train.train_itres=5"], ["did you mean 'train.train_iters'"]),
    "misspelt_bridge_setting": (CLUSTER, ["--run", "cluster", "train.engine=megatron", "model.tensor_model_paralel_size=5"], ["did you mean 'model.tensor_model_parallel_size'"]),
    "other_engine": (CLUSTER, ["--run", "cluster", "model.tensor_model_parallel_size=5"], ["Megatron-Bridge", "train.engine=megatron"]),
    "no_such_container": (CLUSTER, ["--run", "cluster", "run.env.container=/nowhere/image.sqsh"], ["container", "/nowhere/image.sqsh"]),
    "no_such_artifact": (None, ["run.data=SFTDataArtifact-sft:v3"], ["there is no artifact SFTDataArtifact-sft:v3", "the register is empty"]),
    "several_nodes_here": (None, ["run.nodes=2"], ["2 nodes are asked for", "--run PROFILE"]),
    "resume_nothing": (None, ["--resume", "output/nano3/sft/none"], ["not a run folder"]),
    "resume_with_settings": (None, ["--resume", "output/nano3/sft/none", "train.seed=1"], ["settings together with --resume"]),
}


@pytest.mark.parametrize("case", PLACES)
def test_places_and_clusters_that_are_not_there(tmp_path, monkeypatch, case):
    """In this process: the error is the same, and a process for each would take long."""
    env, words, named = PLACES[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NEMOTRON_ENV_TOML", raising=False)
    if env is not None:
        (tmp_path / "env.toml").write_text(env)
    error = CliRunner().invoke(app, ["nano3", "sft", "-c", "tiny", *words]).exception
    assert isinstance(error, UserError), error
    assert all(word in str(error) for word in named) and "what to do:" in str(error), str(error)
    assert {p.name for p in tmp_path.iterdir()} == ({"env.toml"} if env is not None else set())


def test_what_slurm_refuses_leaves_no_run_folder(tmp_path, monkeypatch):
    """Its own words are shown."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: fast' >&2\nexit 1\n")
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    (tmp_path / "env.toml").write_text(CLUSTER)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    error = CliRunner().invoke(app, ["nano3", "sft", "-c", "tiny", "--batch", "cluster"]).exception
    assert isinstance(error, UserError) and "invalid partition specified: fast" in str(error)
    assert not list(tmp_path.glob("output/nano3/sft/*"))


def test_a_submitted_run_is_queued_and_knows_its_job(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "sbatch").write_text(f"#!/bin/sh\ncat > {tmp_path}/script\necho 4711\n")
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    (tmp_path / "env.toml").write_text(CLUSTER)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["nano3", "sft", "-c", "tiny", "--batch", "cluster", "train.train_iters=7"])
    assert done.exit_code == 0 and "submitted job 4711" in done.output and "tail -F" in done.output, done.exception
    folder = next(tmp_path.glob("output/nano3/sft/*"))
    assert json.loads((folder / "status.json").read_text())["state"] == "queued" and json.loads((folder / "job.json").read_text())[0]["job"] == "4711"
    assert str(folder / "config.yaml") in (tmp_path / "script").read_text() and "train_iters: 7" in (folder / "config.yaml").read_text()


def test_an_artifact_whose_bytes_have_changed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    write_json(tmp_path / "data" / "manifest.json", {"pack_size": 512})
    Store("output/artifacts").log("SFTDataArtifact-sft", "data", tmp_path / "data", {"pack_size": 512})
    write_json(tmp_path / "data" / "manifest.json", {"pack_size": 1024})
    error = CliRunner().invoke(app, ["nano3", "sft", "-c", "tiny", "--art.data", "SFTDataArtifact-sft:v1"]).exception
    assert isinstance(error, UserError) and "changed: manifest.json" in str(error) and not (tmp_path / "output" / "nano3").exists()


def test_an_output_folder_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "nano3").write_text("a file where a folder should be")
    effective = sft_config("nano3", "tiny")
    with pytest.raises(UserError, match="cannot be written.*\n.*run.output_root=FOLDER"):
        new_run(effective, "tiny")


@pytest.mark.parametrize("words", [("nano3", "fly"), ("nano4", "sft"), ("nano3", "sft", "--colour"), ("nano3", "data", "prep", "sft", "--sample", "0")])
def test_a_command_nobody_knows_is_a_usage_error(tmp_path, words):
    assert nemotron(*words, cwd=tmp_path).returncode == 2
