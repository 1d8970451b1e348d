"""Does the command line do what it says, from chats to report?"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from commands import ENV_TOML, NEMOTRON, ONE_THREAD, forked_nemotron, nemotron
from counted_calls import counts, watch
from run_folders import fabricated_run
from typer.testing import CliRunner

from nemotron_nb.core import UserError
from nemotron_nb import cli
from nemotron_nb.cli import app
from nemotron_nb.ops.run_folder import read_metrics

CASES = Path(__file__).parent / "cases"
SMALL = ["-c", "tiny", "data.sample=24", "data.pack_size=512", "model.pattern=ME*", "model.hidden_size=32", "train.global_batch_size=1"]
SMALL += ["evaluation.num_generations=2", "evaluation.max_new_tokens=4", "train.train_iters=2"]


def test_help_needs_nothing_heavy():
    code = "import sys, nemotron_nb.cli; print([m for m in ('torch', 'transformers', 'papermill', 'pyarrow', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize("words", [(), ("nano3",), ("super3", "data"), ("nano3", "data", "prep", "sft"), ("super3", "sft"), ("nano3", "pretrain"), ("nano3", "model", "import", "sft"), ("report",), ("inspect",)])
def test_help_at_every_level(tmp_path, words):
    done = nemotron(*words, "--help", cwd=tmp_path)
    assert done.returncode == 0 and "Usage: nemotron" in done.stdout


def test_dry_run_shows_every_value_with_its_origin_and_runs_nothing(tmp_path):
    (tmp_path / "mine.yaml").write_text("optimizer:\n  lr: 2e-3\n")
    done = forked_nemotron("nano3", "sft", "-c", "mine.yaml", "--dry-run", "train.train_iters=50", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    row = {line.split()[1]: line for line in done.stdout.splitlines() if line.startswith("* ")}
    assert set(row) == {"optimizer.lr", "train.train_iters"}
    assert re.search(r"0\.002 +\S*mine\.yaml$", row["optimizer.lr"]) and re.search(r"50 +command line$", row["train.train_iters"])
    assert [p.name for p in tmp_path.iterdir()] == ["mine.yaml"]


def test_data_prep_prints_where_and_what_and_finds_it_again(tmp_path):
    words = ("super3", "data", "prep", "sft", "-c", "tiny", "--sample", "12")
    first, second = (asked(*words, cwd=tmp_path) for asked in (nemotron, forked_nemotron))
    said = [[line for line in run.stdout.splitlines() if line and not line.startswith("tokenized: ")] for run in (first, second)]
    assert first.returncode == 0 and said[0] == said[1] and "tokenized: 1 units by tokenizers" in first.stdout
    folder = tmp_path / re.search(r"prepared data: (\S+)", first.stdout)[1]
    assert json.loads((folder / "manifest.json").read_text())["rows"] == 12
    stamp = (folder / "manifest.json").stat().st_mtime_ns
    assert forked_nemotron(*words, "--force", cwd=tmp_path).returncode == 0
    assert (folder / "manifest.json").stat().st_mtime_ns > stamp


def test_report_and_runs_read_folders_alone(tmp_path):
    folder = fabricated_run(tmp_path / "output" / "nano3" / "sft" / "20260314T092653Z-x-000000")
    listed = nemotron("runs", cwd=tmp_path)
    assert re.search(r"20260314T092653Z-x-000000 +done +40 +1\.250 +1\.073 +sample +0:00:04", listed.stdout)
    done = forked_nemotron("report", folder, cwd=tmp_path)
    assert done.returncode == 0 and "5.125 before, 1.250 after" in done.stdout and (folder / "report.html").exists()
    assert forked_nemotron("report", tmp_path / "nowhere", cwd=tmp_path).returncode == 1


PUBLISHED = [  # the commands of the published texts, as they stand there, with --dry-run
    "nano3 data prep sft --run YOUR-CLUSTER path=chats.jsonl",
    "nano3 data prep sft --run YOUR-CLUSTER path=chats.jsonl --sample 100 --force",
    "nano3 sft --run YOUR-CLUSTER",
    "nano3 sft -c tiny --run YOUR-CLUSTER",
    "nano3 sft -c tiny --batch YOUR-CLUSTER",
    "nano3 sft -c tiny train.train_iters=5000 optimizer.lr=1e-5 checkpoint.save_interval=100",
    "nano3 sft -c tiny checkpoint.load=/path/to/pretrain/checkpoint",
    "super3 sft checkpoint.pretrained_checkpoint=/path/to/checkpoint",
    "super3 sft --run YOUR-CLUSTER logger.wandb_project=your_project logger.wandb_entity=nvidia logger.log_interval=5 checkpoint.save=/path/to/checkpoints checkpoint.load=/path/to/checkpoints checkpoint.pretrained_checkpoint=/path/to/pretrained/ckpt checkpoint.save_interval=50 train.global_batch_size=16 train.train_iters=200 loss.stages=[{stage:\xa0token}] scheduler.lr_warmup_iters=10 scheduler.lr_warmup_samples=0 model.tensor_model_parallel_size=4 model.sequence_parallel=True",
    "super3 sft --run YOUR-CLUSTER --peft lora checkpoint.pretrained_checkpoint=/path/to/pretrained/ckpt train.global_batch_size=4 model.tensor_model_parallel_size=4 model.context_parallel_size=2 model.sequence_parallel=True",
    "nano3 sft cluster.gpus_per_node=1 logger.wandb.name=sft-dev-1-gpu",
    "nano3 data prep pretrain --run YOUR-CLUSTER path=docs.jsonl",
    "nano3 data prep pretrain --run YOUR-CLUSTER path=docs.jsonl --sample 1000 --force",
    "nano3 pretrain --run YOUR-CLUSTER",
    "nano3 pretrain -c tiny --run YOUR-CLUSTER",
    "nano3 pretrain -c tiny --batch YOUR-CLUSTER",
    "super3 pretrain --run YOUR-CLUSTER",
    "super3 pretrain -c long_context --batch YOUR-CLUSTER",
]


@pytest.mark.parametrize("line", PUBLISHED)
def test_the_published_commands_are_understood(tmp_path, monkeypatch, line):
    """In this process, as a process each would take long: exit code 0, the plan with the job script, and nothing written."""
    (tmp_path / "env.toml").write_text(ENV_TOML)
    monkeypatch.chdir(tmp_path)
    words = [word.replace("\xa0", " ") for word in line.split(" ")]
    done = CliRunner().invoke(app, [*words, "--dry-run"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "env.toml" in done.output and ("#SBATCH" in done.output) == ("YOUR-CLUSTER" in line)
    assert [p.name for p in tmp_path.iterdir()] == ["env.toml"]


def test_the_plan_holds_what_the_profile_and_the_command_say(tmp_path, monkeypatch):
    (tmp_path / "env.toml").write_text(ENV_TOML)
    monkeypatch.chdir(tmp_path)
    text = CliRunner().invoke(app, ["super3", "sft", "-r", "YOUR-CLUSTER", "-d", "run.nodes=8", "--nproc_per_node", "4"]).output
    for said in ("#SBATCH --nodes=8", "#SBATCH --account=YOUR-ACCOUNT", "NEMOTRON_RANKS_PER_NODE=4", "nvcr.io/nvidia/nemo:26.02.nemotron_3_super", "NEMOTRON_MOUNTS=/lustre:/lustre"):
        assert said in text, said
    assert re.search(r"run\.wandb\.project +nemotron .*env\.toml \[YOUR-CLUSTER\]", text) and re.search(r"logger\.wandb_project +nemotron ", text)
    assert re.search(r"warm-up +468\.75 steps +30,000 samples", text)


@pytest.mark.parametrize("family", ["nano3", "super3"])
@pytest.mark.parametrize("words", [("pretrain",), ("sft",), ("rl",), ("data", "prep", "pretrain"), ("data", "prep", "sft"), ("data", "prep", "rl")])
def test_each_stage_of_the_recipe_has_its_command(family, words):
    shown = CliRunner().invoke(app, [family, *words, "--help"])
    assert shown.exit_code == 0 and "--dry-run" in shown.output and "Examples" in shown.output, shown.output


def test_as_a_module(tmp_path):
    done = subprocess.run([sys.executable, "-m", "nemotron_nb", "runs"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "no runs under output\n")


def test_a_theme_that_nobody_knows(tmp_path, monkeypatch):
    (tmp_path / "env.toml").write_text("[cli]\ntheme = 'monokay'\n")
    monkeypatch.chdir(tmp_path)
    assert "did you mean 'monokai'" in str(CliRunner().invoke(app, ["nano3", "sft", "-c", "tiny", "-d"]).exception)


def test_force_and_sample_as_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(cli, "_data_prep_here", lambda effective, family, force: asked.append((effective.settings.data.sample, force)))
    for words in (["sample=7", "force=true"], ["--sample", "7", "--force"], ["data.sample=7", "force=false"]):
        assert CliRunner().invoke(app, ["nano3", "data", "prep", "sft", "-c", "tiny", *words]).exit_code == 0
    assert asked == [(7, True), (7, True), (7, False)]
    assert "expected true or false" in str(CliRunner().invoke(app, ["nano3", "data", "prep", "sft", "force=perhaps"]).exception)


def test_models_and_data_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    done = CliRunner().invoke(app, ["nano3", "model", "import", "pretrain", "base", "-s", "100", "-p", "nemotron", "-e", "me"])
    assert done.exit_code == 0 and done.output.startswith("art://ModelArtifact-pretrain:v1"), done.exception
    assert json.loads((tmp_path / "output/artifacts/ModelArtifact-pretrain/v1/metadata.json").read_text()) | {"iteration": 100, "project": "nemotron", "entity": "me", "family": "nano3"} == json.loads((tmp_path / "output/artifacts/ModelArtifact-pretrain/v1/metadata.json").read_text())
    for words, said in ((("model", "import", "sft", "none"), "no such folder"), (("data", "import", "sft", "base"), "manifest.json")):
        assert said in str(CliRunner().invoke(app, ["nano3", *words]).exception)
    assert "ModelArtifact-pretrain:v1" in CliRunner().invoke(app, ["artifacts"]).output
    assert "ModelArtifact-pretrain:v1" in CliRunner().invoke(app, ["lineage", "ModelArtifact-pretrain"]).output


def test_imported_data_are_traced_to_the_chats_they_were_made_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepared = forked_nemotron("nano3", "data", "prep", "sft", "-c", "tiny", "--sample", "24", cwd=tmp_path)
    folder = next((tmp_path / "output" / "nano3" / "data_prep").glob("*/manifest.json")).parent  # beside the cache
    assert prepared.returncode == 0 and (folder / "manifest.json").exists(), prepared.stderr
    shutil.move(folder, tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "output")
    done = CliRunner().invoke(app, ["nano3", "data", "import", "sft", "elsewhere", "-n", "mine"])
    assert done.exit_code == 0 and done.output.startswith("art://mine:v1"), done.exception
    entered = tmp_path / "output" / "artifacts" / "mine" / "v1"
    roles = {source["role"] for source in json.loads((entered / "manifest.json").read_text())["inputs"]}
    assert {"chats", "tokenizer", "template"} <= roles, roles
    assert json.loads((entered / "metadata.json").read_text())["pack_size"] == 2048


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One real run, two steps long: what it said, and its folder. What its processes do is counted beside it."""
    cwd = tmp_path_factory.mktemp("run")
    (cwd / "counted").mkdir()
    done = nemotron("nano3", "sft", *SMALL, cwd=cwd, env=ONE_THREAD | watch(cwd / "counted"))
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


def test_what_decides_a_run_is_done_once_in_all_its_processes(run):
    """The command merges the settings and plans the data; the notebook reads them and hands them on. No file is hashed twice."""
    called, importing, hashed = counts(run[1].parents[3] / "counted")
    assert called["make_plan"] == called["sft_config"] == 1 and not importing
    assert [name for name, times in hashed.items() if times > 1] == [] and any(name.endswith("manifest.json") for name in hashed)


def test_a_run_is_in_the_register_with_all_that_went_into_it(run):
    done, folder = run
    root = folder.parents[3]
    text = forked_nemotron("lineage", "ModelArtifact-sft", "--png", "tree.png", cwd=root).stdout
    for said in ("ModelArtifact-sft:v1", "DataBlendsArtifact-sft:v1", "sample_chats", "nemotron nano3 sft -c tiny", "random weights"):
        assert said in text, said
    assert (root / "tree.png").read_bytes().startswith(b"\x89PNG")
    kept = json.loads((folder / "artifacts.json").read_text())
    assert [a["name"] for a in kept["consumed"]] == ["DataBlendsArtifact-sft", "tiny"] and [a["address"] for a in kept["made"]] == ["art://ModelArtifact-sft:v1"]


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_where_it_was(tmp_path):
    """STOP, then --resume: one folder, two attempts, every step once."""
    words = ["nano3", "sft", *SMALL[:-1], "train.train_iters=30", "evaluation.num_generations=0"]
    stopped = subprocess.Popen([str(NEMOTRON), *words], cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=ONE_THREAD)
    for line in stopped.stdout:
        folder = tmp_path / line.split()[-1] if line.startswith("run folder: ") else tmp_path
        if line.startswith("run folder: "):
            break
    while not any(m.get("step") for m in read_metrics(folder / "metrics.jsonl") if m["kind"] == "train"):
        assert stopped.poll() is None
        time.sleep(0.05)
    (folder / "STOP").touch()
    assert "can be resumed" in stopped.stdout.read() and stopped.wait(60) == 0
    assert json.loads((folder / "status.json").read_text())["state"] == "preempted"
    done = nemotron("nano3", "sft", "--resume", folder, cwd=tmp_path)
    assert done.returncode == 0 and "It took 2 attempts" in done.stdout, done.stderr
    assert (folder / "notebook.1.ipynb").exists() and (folder / "attempts" / "2.json").exists() and not (folder / "STOP").exists()
    metrics = read_metrics(folder / "metrics.jsonl")
    assert [m["step"] for m in metrics if m["kind"] == "train"] == list(range(1, 31)) and [m["kind"] for m in metrics].count("resume") == 1
    assert [a["state"] for a in json.loads((folder / "status.json").read_text())["attempts"]] == ["preempted", "done"]
    again = forked_nemotron("nano3", "sft", "--resume", folder, cwd=tmp_path)
    assert again.returncode == 1 and "the run is complete" in again.stderr


@pytest.mark.slow
def test_one_chat_is_overfitted_with_adapters_and_the_last_lines_name_what_is_there(tmp_path):
    """Cases 24 and 27: a single chat, in packs for training alone, and LoRA without a merged model."""
    (one,) = CASES.glob("24-*.jsonl")
    stages = "loss.stages=[{stage: token, steps: 2}, {stage: sample}]"
    done = nemotron("nano3", "sft", *SMALL[:2], *SMALL[3:-1], "train.train_iters=4", "--peft", "lora", f"data.path={one}", stages, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "output" / "nano3" / "sft").iterdir()
    assert "no held-out" in done.stdout and f"{folder.relative_to(tmp_path)}/adapter" in done.stdout
    assert (folder / "adapter" / "adapter_config.json").is_file() and (folder / "base" / "config.json").is_file()
    assert not (folder / "model").exists() and not re.search(rf"{folder.name}/model\b", done.stdout)


@pytest.mark.long
@pytest.mark.slow
def test_a_value_of_the_environment_is_written_nowhere(tmp_path):
    """A folder whose name is a secret: no file of a run, of its data and of the register holds it; the variable is named instead."""
    secret = tmp_path / "kept" / "hf_VerySecret&1"
    secret.mkdir(parents=True)
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (secret / "chats.jsonl").write_text("".join(json.dumps(chat | {"id": str(i)}) + "\n" for i in range(30)) + "no chat\n")
    words = [*SMALL[:2], *SMALL[3:-1], "train.train_iters=1", "evaluation.num_generations=0", "data.max_bad_fraction=1", "data.path=${oc.env:PLACE}/chats.jsonl"]
    done = nemotron("nano3", "sft", *words, cwd=tmp_path, env=ONE_THREAD | {"PLACE": str(secret)})
    assert done.returncode == 0 and "VerySecret" not in done.stdout, done.stdout + done.stderr
    files = [p for p in (tmp_path / "output").rglob("*") if p.is_file()]
    assert [str(p) for p in files if b"VerySecret" in p.read_bytes()] == []
    (folder,) = (tmp_path / "output" / "nano3" / "sft").iterdir()
    for name in ("config.yaml", "manifest.json", "report.html", "notebook.ipynb"):
        assert "${oc.env:PLACE}" in (folder / name).read_text(), name


def test_a_run_tells_what_it_does(run):
    done, folder = run
    assert f"Report: output/nano3/sft/{folder.name}/report.html" in done.stdout
    assert "step     1 of 2" in done.stdout and "The run is complete." in done.stdout


def test_the_executed_notebook_says_where_the_command_found_each_setting(run):
    cells = json.loads((run[1] / "notebook.ipynb").read_text())["cells"]
    (shown,) = ["".join(o["data"]["text/plain"]) for c in cells if "notebook_settings(parameters)" in "".join(c["source"]) for o in c["outputs"]]
    assert re.search(r"train\.train_iters +2 +command line", shown) and re.search(r"optimizer\.lr .* papermill_runs/nano3/sft/\S+\.yaml", shown)


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
    (tmp_path / "no_model").mkdir()
    (tmp_path / "no_model" / "config.json").write_text('{"model_type": "bert"}')
    done = nemotron("nano3", "sft", *SMALL, "model.name=./no_model", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.count("error: ") >= 1 and "no_model" in done.stderr
    folder = next((tmp_path / "output" / "nano3" / "sft").iterdir())
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "failed" and "no_model" in status["message"]
    assert (folder / "notebook.ipynb").exists() and not (folder / ".partial.ipynb").exists()
    assert forked_nemotron("report", folder, cwd=tmp_path).stdout.startswith("The run failed")


def _descendants(pid: int) -> list[int]:
    """All processes below `pid` (Linux)."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout.split()
    return [p for child in map(int, found) for p in [child, *_descendants(child)]]


def _heard(number: int):
    """What a child does first: a shell may have started these tests with the signal ignored."""
    return lambda: signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("how", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_a_run_that_is_asked_to_end_keeps_its_steps_and_leaves_no_process_behind(tmp_path, how):
    """kill and Ctrl-C: the training writes a checkpoint, the status says preempted, and the line that resumes is printed."""
    words = ["nano3", "sft", *SMALL[:-1], "train.train_iters=100000", "evaluation.num_generations=0"]
    command = subprocess.Popen([str(NEMOTRON), *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ONE_THREAD, preexec_fn=_heard(how))
    deadline = time.monotonic() + 240
    while not (found := list(tmp_path.glob("output/nano3/sft/*/metrics.jsonl"))) or not any(m["kind"] == "train" for m in read_metrics(found[0])):
        assert time.monotonic() < deadline and command.poll() is None
        time.sleep(0.2)
    below = _descendants(command.pid)
    assert len(below) >= 2, "the kernel and the training"
    command.send_signal(how)
    said, folder = command.communicate(timeout=120)[0], found[0].parent
    assert command.returncode == 128 + how and f"Go on with: nemotron nano3 sft --resume output/nano3/sft/{folder.name}" in said
    while not _ended(below):
        assert time.monotonic() < deadline, "a process was left behind"
        time.sleep(0.1)
    assert json.loads((folder / "status.json").read_text())["state"] == "preempted"
    last = read_metrics(folder / "metrics.jsonl")[-1]
    assert last["kind"] == "paused" and list((folder / "checkpoints").glob("step_*")), said


def _ended(pids: list[int]) -> bool:
    """Is none of these processes left?"""
    return not any(os.path.exists(f"/proc/{p}") and "Z" not in open(f"/proc/{p}/stat").read().split()[2] for p in pids)


@pytest.mark.parametrize("how", [signal.SIGTERM, *(pytest.param(s, marks=pytest.mark.long) for s in (signal.SIGINT, signal.SIGUSR1))])
def test_a_signal_before_the_first_step_ends_in_words(tmp_path, how):
    """There is nothing to keep yet: the command says so, names the line that goes on, and leaves no process and no traceback."""
    words = ["nano3", "sft", *SMALL[:-1], "train.train_iters=100000", "evaluation.num_generations=0"]
    command = subprocess.Popen([str(NEMOTRON), *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ONE_THREAD, preexec_fn=_heard(how))
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("output/nano3/sft/*/.partial.ipynb")):  # the notebook has begun
        assert time.monotonic() < deadline and command.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)
    below = _descendants(command.pid)
    command.send_signal(how)
    said = command.communicate(timeout=120)[0]
    (folder,) = tmp_path.glob("output/nano3/sft/*")
    assert command.returncode == 128 + how and f"{how.name} before its first step" in said, said
    assert f"Go on with: nemotron nano3 sft --resume output/nano3/sft/{folder.name}" in said
    assert not re.search("Traceback|DeadKernel|Error", said), said
    assert json.loads((folder / "status.json").read_text())["state"] == "preempted"
    while not _ended(below):
        assert time.monotonic() < deadline, "a process was left behind"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_training_whose_command_was_killed_is_listed_and_taken_up(tmp_path):
    """kill -9: nobody can write that down. The list says who is not followed and what to type, and that ends the run with each step once."""
    words = ["nano3", "sft", *SMALL[:-1], "train.train_iters=600", "evaluation.num_generations=0"]
    command = subprocess.Popen([str(NEMOTRON), *words], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ONE_THREAD)
    deadline = time.monotonic() + 240
    while not (found := list(tmp_path.glob("output/nano3/sft/*/metrics.jsonl"))) or not any(m["kind"] == "train" for m in read_metrics(found[0])):
        assert time.monotonic() < deadline and command.poll() is None
        time.sleep(0.1)
    command.kill()
    command.wait()
    folder, row = found[0].parent, {"state": "running"}
    while row["state"] == "running":
        assert time.monotonic() < deadline
        (row,) = json.loads(nemotron("runs", "--json", cwd=tmp_path).stdout)
    resume = f"nemotron nano3 sft --resume output/nano3/sft/{folder.name}"
    assert row["state"] == "unfollowed" and row["said"] == f"nobody follows its training; take it up: {resume}"
    training = json.loads((folder / "train.json").read_text())["pid"]
    done = nemotron(*resume.split()[1:], cwd=tmp_path)
    assert done.returncode == 0 and "The run is complete." in done.stdout, done.stdout + done.stderr
    assert json.loads((folder / "train.json").read_text())["pid"] == training, "the same training, followed again"
    assert [m["step"] for m in read_metrics(folder / "metrics.jsonl") if m["kind"] == "train"] == list(range(1, 601))


@pytest.mark.parametrize("ignored", [True, False])
def test_ctrl_c_reaches_what_stands_in_the_foreground_alone(ignored):
    """Started with SIGINT ignored, as by nohup, a command keeps it ignored; else it ends."""
    code = "import os, signal, typer; from nemotron_nb import cli\n@cli.app.command('wait')\ndef wait():\n    os.kill(os.getpid(), signal.SIGINT)\n    print('went on')\ncli.sys.argv = ['nemotron', 'wait']\ncli.main()"
    way = signal.SIG_IGN if ignored else signal.SIG_DFL
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, way))
    assert ("went on" in done.stdout, done.returncode == 0) == (ignored, ignored), done.stderr


@pytest.mark.parametrize("words", [("nano3", "sft", "--dry-run", "--all"), ("--help",), ("nano3", "sft", "--dry-run", "--json")])
def test_a_reader_that_leaves_ends_nothing(tmp_path, words):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([str(NEMOTRON), *words], cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert "Traceback" not in done.stderr and "Broken" not in done.stderr and done.returncode in (0, 1)


def test_versions_tables_and_folders_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ask = lambda *words: CliRunner().invoke(app, words)
    assert ask("--version").output.startswith("nemotron_nb ") and ask("nano3", "sft", "-h").exit_code == 0
    assert "there is no such folder" in str(ask("runs", "nosuch").exception)
    assert json.loads(ask("runs", "--json").output) == [] and json.loads(ask("artifacts", "--json").output) == []
    plan = json.loads(ask("nano3", "sft", "-c", "tiny", "--dry-run", "--json", "train.seed=7").output)
    assert [s["value"] for s in plan["settings"] if s["setting"] == "train.seed" and s["changed"]] == [7]
    (tmp_path / "mine.yaml").write_text("train: {seed: 8}")
    folded, whole = (ask("nano3", "sft", "-c", "tiny", "-c", "mine.yaml", "--dry-run", *more).output for more in ((), ("--all",)))
    assert re.search(r"\* +train.seed +8", folded) and "adam_beta1" not in folded and "adam_beta1" in whole and "--all" in folded


@pytest.mark.parametrize(("words", "said"), [
    (["checkpoint.load=/no/such"], "checkpoint.load=/no/such: there is no such checkpoint"),
    (["checkpoint.pretrained_checkpoint=/no/such"], "there is no such checkpoint"),
    (["model.name=/no/such"], "model.name=/no/such: there is no such folder"),
    (["model.name=./such"], "there is no such folder"),
    (["model.name=nobody/has-this"], "no such model on this machine: 'nobody/has-this'"),
    (["logger.wandb_mode=offline"], "no project is named"),
])
def test_what_cannot_begin_is_refused_before_there_is_a_run_folder(tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    for variable in ("WANDB_PROJECT", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    error = CliRunner().invoke(app, ["nano3", "sft", "-c", "tiny", *words]).exception
    assert isinstance(error, UserError) and said in str(error) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("stage", ["eval", "budget"])
def test_a_job_is_refused_what_this_machine_refuses(tmp_path, monkeypatch, stage):
    """One way for both: a model that is not there gives no job script, here or on a cluster."""
    (tmp_path / "env.toml").write_text(ENV_TOML)
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--run", "YOUR-CLUSTER"], ["--batch", "YOUR-CLUSTER"]):
        error = CliRunner().invoke(app, ["super3", stage, "-c", "tiny", *more, "--dry-run", "model=/no/such/model"]).exception
        assert isinstance(error, UserError) and "no such model" in str(error), more


@pytest.mark.parametrize("stage", ["sft", "eval", "budget"])
def test_every_stage_has_a_plan_with_a_job_script(run, tmp_path, monkeypatch, stage):
    (tmp_path / "env.toml").write_text(ENV_TOML)
    monkeypatch.chdir(tmp_path)
    more = [] if stage == "sft" else [f"model={run[1]}"]
    done = CliRunner().invoke(app, ["super3", stage, "-c", "tiny", "--batch", "YOUR-CLUSTER", "--dry-run", *more])
    assert done.exit_code == 0, (done.output, done.exception)
    assert f"#SBATCH --job-name=nemotron-{stage}" in done.output and "[YOUR-CLUSTER]" in done.output and f"stage={stage} " in done.output
    assert ("#SBATCH --nodes=2" in done.output) == (stage != "eval") and 'slurm/body.sh" || {' not in done.output.partition("stage=")[2].replace('slurm/body.sh}" ] || {', "")
    assert [p.name for p in tmp_path.iterdir()] == ["env.toml"]


def test_a_machine_without_slurm_is_said_to_have_none(tmp_path, monkeypatch):
    (tmp_path / "env.toml").write_text(ENV_TOML)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    words = ["nano3", "sft", "-c", "tiny", "--batch", "YOUR-CLUSTER", "run.env.container="]
    error = CliRunner().invoke(app, words).exception
    assert isinstance(error, UserError) and "no Slurm on this machine" in str(error) and "refuses" not in str(error)
    assert not list(tmp_path.glob("output/nano3/sft/*")), "no folder of a job that was never handed over"


def test_runs_of_a_folder_that_is_not_there(tmp_path):
    done = nemotron("runs", "nosuch", cwd=tmp_path)
    assert done.returncode == 1 and "there is no such folder" in done.stderr
    fabricated_run(tmp_path / "output" / "nano3" / "sft" / "a")
    assert json.loads(forked_nemotron("runs", "--json", cwd=tmp_path).stdout)[0]["state"] == "done"


@pytest.mark.parametrize("name", ["x\x1b]52;c;aGk=\x07", "x\x9b31m", "x\u202egnp", "x\x1b[2J\x08\r"], ids=["clipboard", "C1", "bidi", "screen"])
def test_nothing_in_an_error_acts_on_the_terminal(tmp_path, monkeypatch, capsys, name):
    """A file name, a key and a line of a data file reach the terminal as marks."""
    (tmp_path / "chats.jsonl").write_text(json.dumps({name: 1}) + "\n" + json.dumps({"messages": [{"role": name, "content": "x"}]}) + "\n")
    monkeypatch.chdir(tmp_path)
    commands = [["inspect", name], ["inspect", "chats.jsonl:1"], ["inspect", "chats.jsonl:2"], ["report", name], ["nano3", "sft", "-c", "tiny", f"train.{name}=1", "--dry-run"]]
    for words in commands:
        monkeypatch.setattr(sys, "argv", ["nemotron", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert ended.value.code and err and not set(out + err) & set("\x1b\x07\x9b\u202e\x08\r"), (words, out, err)
