"""Does one row of the table make a stage, also from another package: command, plan, run folder, job, lineage?"""

import json
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from commands import ENV_TOML, NEMOTRON, forked_nemotron
from stage_outside import MODULE, add_demo, add_package
from typer.testing import CliRunner

from nemotron_nb.core import UserError
from nemotron_nb.cli import FAMILIES, OPTIONS, app
from nemotron_nb.ops.slurm import render, shell_line
from nemotron_nb.ops.profiles import Profile
from nemotron_nb.ops.stage import STAGES, Stage, command_words, outside_stages, refusal, runner, stage_named, stage_of

ROOT = Path(__file__).parents[1]
DEMO = Stage("demo", "demo_stage:DemoConfig", "demo.ipynb")


@pytest.fixture
def outside(tmp_path):
    """Ask `nemotron` with the stage `demo` beside it, from a folder of work."""
    env = add_demo(tmp_path / "package")
    work = tmp_path / "work"
    work.mkdir()

    def ask(*words):
        return subprocess.run([str(NEMOTRON), *words], cwd=work, env=env, capture_output=True, text=True, timeout=300)

    def ask_here(*words):
        """What starts no kernel, in a child of this process."""
        return forked_nemotron(*words, cwd=work, packages=(tmp_path / "package",))

    ask.work, ask.package, ask.here = work, tmp_path / "package", ask_here
    return ask


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A folder of packages that this process finds."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name, module in sys.modules.items() if str(tmp_path) in str(getattr(module, "__file__", ""))]:
        del sys.modules[name]


def test_every_row_is_whole():
    for name, stage in STAGES.items():
        assert name == stage.name and stage.words and stage.examples and callable(runner(stage))
        assert {f.name for f in fields(stage.settings_class)} >= {"run"} and set(stage.families) <= set(FAMILIES)
        assert not stage.notebook or (ROOT / stage.notebook).is_file()
        assert all((ROOT / "papermill_runs" / family / name / "default.yaml").is_file() for family in stage.families)


def test_every_row_has_its_command_with_options_and_examples():
    for family in FAMILIES:
        for stage in STAGES.values():
            done = CliRunner().invoke(app, [family, *command_words(stage), "--help"])
            assert (done.exit_code == 0) == (family in stage.families)
            if family in stage.families:
                typed = set(re.findall(r"^  (?:-\w, )?(--[\w.-]+)", done.output, re.MULTILINE))
                assert typed & set(OPTIONS) == set(stage.options)
                assert f"nemotron {family} {stage.examples[0].replace('{family}', family)}"[:60] in done.output


@pytest.mark.parametrize("stage", STAGES.values(), ids=list(STAGES))
def test_a_script_by_hand_says_what_the_row_says(stage):
    assert f"\n{shell_line(stage)}\n" in (ROOT / "slurm" / f"{stage.name}.sbatch").read_text()


def test_a_stage_without_a_script_of_its_own_has_one_from_its_row():
    profile = Profile("p", nodes=2, gpus_per_node=4)
    text = render(replace(DEMO, notebook="/it's here/demo.ipynb"), profile, ["nano3", "default"])
    assert "#SBATCH --job-name=nemotron-demo\n" in text and "--nodes=2\n" in text and "--gpus-per-node=4\n" in text
    assert "stage=demo notebook='/it'\"'\"'s here/demo.ipynb' command= resumes= sized=yes\n" in text
    assert "signal" not in re.findall(r"^#SBATCH --(\w+)", text, re.MULTILINE)
    bare = render(replace(DEMO, takes=(), ends=("done", "preempted")), profile, ["nano3", "default"])
    assert "--nodes=1\n" in bare and "gpus-per-node" not in re.findall(r"^#SBATCH --([\w-]+)", bare, re.MULTILINE)
    assert "#SBATCH --signal=B:USR1@120\n" in bare and "resumes=yes sized=\n" in bare


def test_three_files_make_a_stage(outside):
    """Command, settings, run folder, table of runs, register and lineage; nothing else is edited."""
    helped = outside("nano3", "--help")
    assert re.search("^  demo +Count to a number", helped.stdout, re.MULTILINE) and helped.stderr == ""
    assert "nemotron nano3 demo {odd} x=4" in outside.here("nano3", "demo", "--help").stdout
    done = outside("nano3", "demo", "x=3")
    assert done.returncode == 0, done.stdout + done.stderr
    run = outside.work / re.search(r"^run folder: (.+)$", done.stdout, re.MULTILINE)[1]
    assert run.parent == outside.work / "output" / "nano3" / "demo" and (run / "made" / "count.txt").read_text() == "3"
    assert f"Report: {run.relative_to(outside.work) / 'report.html'}" in done.stdout
    row = json.loads(outside.here("runs", "--json").stdout)[0]
    assert row["state"] == "done" and row["report"].endswith("report.html")
    assert "DemoArtifact:v1" in outside.here("lineage", "DemoArtifact").stdout
    made = json.loads((outside.work / "output/artifacts/DemoArtifact/v1/manifest.json").read_text())["producer"]
    assert made["command"] == "nemotron nano3 demo x=3"
    assert "the report of the stage demo cannot be drawn again" in outside.here("report", str(run)).stderr


def test_a_stage_from_outside_is_planned_and_refused_like_the_others(outside):
    (outside.work / "env.toml").write_text(ENV_TOML)
    (outside.work / "mine.yaml").write_text("x: 4\n")
    done = outside.here("super3", "demo", "-c", "mine.yaml", "--batch", "YOUR-CLUSTER", "--dry-run")
    assert done.returncode == 0 and re.search(r"\* +x +4 .*mine\.yaml", done.stdout), done.stdout + done.stderr
    assert "#SBATCH --job-name=nemotron-demo" in done.stdout and "#SBATCH --nodes=2" in done.stdout
    assert f"notebook={outside.package / 'demo.ipynb'} " in done.stdout
    assert json.loads(outside.here("nano3", "demo", "-d", "--json", "x=5").stdout)["settings"]
    for words, said in ((("y=3",), "'y'"), (("x=three",), "x"), (("-c", "tiny"), "no files in papermill_runs")):
        refused = outside.here("nano3", "demo", *words)
        assert refused.returncode == 1 and said in refused.stderr and "Traceback" not in refused.stderr
    assert not (outside.work / "output").exists()


def test_a_stage_from_outside_fails_and_goes_on(outside):
    failed = outside("nano3", "demo", "x=13")
    assert failed.returncode == 1 and "thirteen" in failed.stderr
    stopped = outside("nano3", "demo", "x=7")
    run = re.search(r"^run folder: (.+)$", stopped.stdout, re.MULTILINE)[1]
    states = {row["run"]: row["state"] for row in json.loads(outside.here("runs", "--json").stdout)}
    assert states[run] == "preempted" and sorted(states.values()) == ["failed", "preempted"]
    assert "together with --resume" in outside.here("nano3", "demo", "--resume", run, "x=8").stderr
    done = outside("nano3", "demo", "--resume", run)
    assert done.returncode == 0 and (outside.work / run / "notebook.1.ipynb").exists(), done.stdout + done.stderr
    assert json.loads((outside.work / run / "status.json").read_text())["state"] == "done"


@pytest.mark.parametrize(("row", "said"), [
    (replace(DEMO, name="sft"), "the name 'sft' is taken"),
    (replace(DEMO, name="Sft"), "not plain"),
    (replace(DEMO, name="a;b"), "not plain"),
    (replace(DEMO, name="data"), "a command is one word"),
    (replace(DEMO, command=("eval",)), "the command 'eval' is taken"),
    (replace(DEMO, command=("data", "prep", "sft")), "is taken"),
    (replace(DEMO, command=("data", "import", "x")), "a command is one word"),
    (replace(DEMO, families=("nano4",)), "did you mean 'nano3'"),
    (replace(DEMO, takes=("node",)), "did you mean 'nodes'"),
    (replace(DEMO, command=("budget",), families=("nano3",)), ""),
    (replace(DEMO, command=("data", "prep", "rl")), "is taken"),
    (replace(DEMO, command=("data", "prep", "genrm")), ""),
    ("demo", "of type str"),
])  # fmt: skip
def test_a_row_that_cannot_be_one(row, said):
    why = refusal(row, STAGES.values())
    assert said in why and bool(why) == bool(said)


def test_what_does_not_load_is_said_and_left_out(path):
    good = MODULE.replace('notebook="demo.ipynb"', 'notebook=""')
    (path / "good_stage.py").write_text(good.replace("demo_stage", "good_stage"))
    bad = {"raises": "raise RuntimeError('no')", "ends": "raise SystemExit(3)", "syntax": "def", "empty": ""}
    for name, text in bad.items():
        (path / f"{name}_stage.py").write_text(text)
    (path / "typo_stage.py").write_text(good.replace('name="demo"', 'name="typo"').replace("--resume", "--resum"))
    (path / "lost_stage.py").write_text(MODULE.replace('name="demo"', 'name="lost"'))
    points = {name: f"{name}_stage:STAGE" for name in (*bad, "good", "lost", "typo")}
    add_package(path, "many", **points, absent="absent_stage:STAGE", twice="good_stage:STAGE")
    rows, refused = outside_stages()
    assert [row.name for row in rows] == ["demo", "typo"] and len(refused) == 7
    loads = ("RuntimeError: no", "SystemExit: 3", "SyntaxError", "No module named 'absent", "no attribute 'STAGE'")
    for said in (*loads, "there is no notebook", "is taken"):
        assert sum(said in reason for reason in refused) == 1, (said, refused)
    assert stage_named("demo") == rows[0]
    with pytest.raises(UserError, match="did you mean 'demo'"):
        stage_named("dem")
    done = CliRunner().invoke(app, ["nano3", "--help"])
    assert done.exit_code == 0 and "demo" in done.stdout and "typo " not in done.stdout and "sft" in done.stdout
    assert done.stderr.count("warning: ") == 8 and "did you mean '--resume'" in done.stderr
    assert CliRunner().invoke(app, ["--help"]).stderr == "", "nothing is read for the first help"


def test_a_row_adds_data_preparation_and_a_model_to_import(path):
    made, words = ("DataBlendsArtifact-notes", "ModelArtifact-notes"), ("data", "prep", "notes")
    row = f"STAGE = Stage('prep_notes', 'm:C', '', makes={made}, command={words}, words='Documents.')"
    (path / "prep_stage.py").write_text(f"from nemotron_nb.ops.stage import Stage\n{row}")
    add_package(path, "prep", prep="prep_stage:STAGE")
    ask = lambda *words: CliRunner().invoke(app, ["nano3", *words, "--help"]).output
    assert "Documents." in ask("data", "prep", "notes")
    assert "Register packs" in ask("data", "import", "notes") and "Register a model" in ask("model", "import", "notes")
    error = CliRunner().invoke(app, ["nano3", "data", "prep", "notes"]).exception
    assert isinstance(error, UserError) and "'m:C' cannot be loaded" in str(error)


def test_the_stage_of_a_run_folder(tmp_path, path):
    for stage in STAGES.values():
        assert stage_of(tmp_path / "nano3" / stage.name / "run") == stage
    (tmp_path / "moved").mkdir()
    assert stage_of(tmp_path / "moved").name == "sft"
    (tmp_path / "moved" / "eval.yaml").touch()
    assert stage_of(tmp_path / "moved").name == "eval"
