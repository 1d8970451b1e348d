"""Does a real Slurm take the scripts, and is what it refuses told in its own words?"""

import subprocess
import sys
from pathlib import Path

import pytest

from nemotron_nb.core import UserError
from nemotron_nb.ops.profiles import Profile, load_profile
from nemotron_nb.ops.slurm import TAKES, job, launch_command, render, submit

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
EXAMPLE = ROOT / "papermill_runs" / "env.toml.example"


def test_the_scripts_are_the_ones_the_library_knows():
    assert {path.stem for path in SCRIPTS} == set(TAKES)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.stem)
@pytest.mark.parametrize("options", [[], ["--nodes=2"]], ids=["one", "two"])
def test_slurm_takes_each_script_by_hand(cluster, path, options):
    done = subprocess.run(["sbatch", "--test-only", *options, str(path), "nano3", "tiny"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "to start at" in done.stderr, done.stderr
    assert ("n[1-2]" in done.stderr) == bool(options)


@pytest.mark.parametrize("script", sorted(TAKES))
@pytest.mark.parametrize("name", ["local-slurm", "cluster-offline"])
def test_slurm_takes_each_script_with_the_profiles_of_the_example(cluster, script, name):
    profile = load_profile(name, EXAMPLE)
    assert "to start at" in submit(render(script, profile, ["nano3", "tiny"]), test_only=True)
    assert profile.nodes == 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"partition": "nowhere"}, "Invalid partition name specified"),
        ({"nodes": 5}, "Node count specification invalid|Requested node configuration is not available"),
        ({"gpus_per_node": 9}, "Requested node configuration is not available"),
        ({"mem": "100G"}, "Memory specification can not be satisfied|Requested node configuration is not available"),
        ({"additional_parameters": {"constraint": "h100"}}, "Invalid feature specification"),
        ({"additional_parameters": {"no-such-option": "1"}}, "unrecognized option"),
        ({"partition": "quick", "time": "08:00:00"}, "Requested time limit is invalid"),
    ],
)
def test_what_slurm_refuses_is_told_in_its_words(cluster, wrong, said):
    profile = Profile("wrong", **wrong)
    with pytest.raises(UserError, match=f"Slurm refuses the job: .*({said})"):
        submit(render("sft", profile, ["nano3", "tiny"]), test_only=True)


@pytest.mark.parametrize("name", ['Bob\'s "best" #1', "a b $(touch hurt) `id` \\ ; * ü", "#", "x JobState=COMPLETED ExitCode=0:0", "50% \\\\ %j"])
def test_a_hostile_name_arrives_as_it_is_and_runs_nothing(cluster, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    odd = tmp_path / "it's 100% #1 (a)"
    odd.mkdir()
    text = render("sft", Profile("p", job_name=name, gpus_per_node=0, exclusive=False, mem="1G"), ["nano3", f"no such {name}"], run_dir=odd)
    held = submit(text.replace("\nexport ", "\n#SBATCH --hold\nexport ", 1))
    try:
        page = cluster.run("scontrol", "show", "job", held)
        assert f"JobName={name}\n" in page and f"StdOut={odd}/slurm.log\n".replace("%", "%%") in page
        assert job(held).state == "PENDING" and not job(held).ended
    finally:
        cluster.run("scancel", held)
    assert [p.name for p in tmp_path.iterdir()] == [odd.name]


def test_a_variable_of_the_shell_does_not_overrule_the_profile(cluster, monkeypatch):
    monkeypatch.setenv("SBATCH_PARTITION", "nowhere")
    monkeypatch.setenv("SBATCH_TIMELIMIT", "100000")
    submit(render("sft", Profile("p", partition="quick", time="5"), ["nano3", "tiny"]), test_only=True)
    with pytest.raises(UserError, match="Invalid partition"):
        submit(render("sft", Profile("p"), ["nano3", "tiny"]), test_only=True)


def test_a_job_that_slurm_does_not_know(cluster):
    with pytest.raises(UserError, match="Invalid job id specified"):
        job("999999")


def test_a_container_is_refused_where_srun_cannot_start_one(cluster, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert launch_command("train.yaml", 1, 1)[0] == sys.executable
    monkeypatch.setenv("NEMOTRON_CONTAINER", "image.sqsh")
    with pytest.raises(UserError, match="this cluster's srun starts no containers"):
        launch_command("train.yaml", 1, 1)
    text = render("sft", Profile("p", mounts=("/a:/b",)), ["nano3", "tiny"], container="registry/it's:1", mounts=["/c:/d"])
    assert "\nexport NEMOTRON_CONTAINER='registry/it'\"'\"'s:1'\nexport NEMOTRON_MOUNTS=/a:/b,/c:/d\n" in text
