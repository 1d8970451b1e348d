"""The published commands of stage 0, typed on a Slurm of two nodes with the published env.toml: text, a job that prepares it, base models, their lineage."""

import json
import os
import re
import subprocess

import pytest
from commands import ENV_TOML, NEMOTRON, ONE_THREAD

from nemotron_nb.ops.run_folder import read_metrics, read_status
from nemotron_nb.ops.slurm import job
from nemotron_nb.pretrain.documents import DocumentsManifest

STEPS = 3
HERE = ("tokenizer=tiny", "run.env.container=", "run.nodes=1")  # no hub, no containers, and a job that is small
SMALL = (
    f"train.train_iters={STEPS}", "train.global_batch_tokens=512", "dataset.sequence_length=64", "dataset.valid_samples=1",
    "train.eval_interval=0", "scheduler.lr_warmup_iters=1", "scheduler.lr_wsd_decay_iters=1", "model.hidden_size=64",
    "evaluation.num_generations=0", "evaluation.needle_lengths=[]", "run.nproc_per_node=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(cluster, tmp_path_factory):
    """A folder with the published env.toml, and 40 documents of which 30 will be asked for."""
    folder = tmp_path_factory.mktemp("base models")
    (folder / "env.toml").write_text(re.sub(r"(?ms)^\[wandb\].*?(?=^\[)", "", ENV_TOML))
    rows = [{"text": f"Document {i} tells how lamp {i} was lit, and what it cost: {i * 7} euros."} for i in range(40)]
    (folder / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def typed(place, line, *more):
    """The answer to `nemotron LINE`, word for word as it is published, and what makes it small behind it."""
    words = [str(NEMOTRON), *line.split(), *more]
    return subprocess.run(words, cwd=place, env=ONE_THREAD | os.environ, capture_output=True, text=True, timeout=300)


def run_folder(place, text):
    return place / re.search(r"^run folder: (.+)$", text, re.MULTILINE)[1]


def losses(folder):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]


@pytest.fixture(scope="module")
def prepared(place):
    """Prepared in a job, attached."""
    done = typed(place, "nano3 data prep pretrain --run YOUR-CLUSTER --sample 30", "path=docs.jsonl", "num_shards=3", *HERE)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def detached(place, prepared):
    """A run that the command did not wait for: its folder, the number of its job, and whether it was still going on."""
    done = typed(place, "nano3 pretrain -c tiny --batch YOUR-CLUSTER", "run.data=DataBlendsArtifact-pretrain", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    number = re.search(r"submitted job (\d+)", done.stdout)[1]
    return run_folder(place, done.stdout), number, not job(number).ended


@pytest.fixture(scope="module")
def attached(place, prepared, detached):
    """A run that the command followed, behind the other."""
    done = typed(place, "nano3 pretrain -c tiny --run YOUR-CLUSTER", "run.data=DataBlendsArtifact-pretrain", *SMALL)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    return run_folder(place, done.stdout), done.stdout


def test_documents_are_prepared_in_a_job(place, prepared):
    assert "COMPLETED, exit code 0" in prepared and "registered: art://DataBlendsArtifact-pretrain:v1" in prepared
    manifest = DocumentsManifest.load(place / re.search(r"prepared documents: (\S+)", prepared)[1])
    assert (manifest["documents"], manifest["sample"]) == (30, 30)
    assert {split: len(manifest.shards(split)) for split in manifest["splits"]} == {"train": 1, "valid": 1, "test": 1}


def test_attached_the_base_model_is_trained_on_both_nodes_and_shown_while_it_grows(place, attached):
    folder, said = attached
    assert [step for step, *_ in losses(folder)] == list(range(1, STEPS + 1)) and read_status(folder)["state"] == "done"
    assert said.index("RUNNING on n[1-2]") < said.index(f"step     1 of {STEPS}") < said.index("COMPLETED, exit code 0")
    assert "srun --nodes=2 --ntasks=2 --ntasks-per-node=1" in (folder / "train.log").read_text()
    assert (folder / "model" / "config.json").is_file() and "Bits per byte by source" in (folder / "report.html").read_text()


def test_detached_it_is_the_same_training(cluster, detached, attached):
    folder, number, still_going = detached
    assert still_going, "the command returns before the job has ended"
    cluster.wait_for(lambda: job(number).ended, 120, "the end of the job")
    assert job(number).state == "COMPLETED", (folder / "slurm.log").read_text()[-3000:]
    assert losses(folder) == losses(attached[0])


def test_lineage_goes_from_the_model_to_the_text(place, attached):
    shown = typed(place, "lineage ModelArtifact-pretrain").stdout
    assert re.search(r"ModelArtifact-pretrain:v\d(.|\n)*DataBlendsArtifact-pretrain:v1(.|\n)*docs +documents", shown), shown


def test_a_dry_run_shows_the_job_and_slurm_hears_nothing(cluster, place):
    before = cluster.run("squeue", "-h", "-t", "all"), sorted(place.rglob("*"))
    done = typed(place, "nano3 pretrain -c tiny --run YOUR-CLUSTER --dry-run")
    assert done.returncode == 0, done.stderr
    for said in ("#SBATCH --account=YOUR-ACCOUNT", "#SBATCH --nodes=2", "#SBATCH --gpus-per-node=8", "stage=pretrain notebook=nbs/runs/pretrain.ipynb"):
        assert said in done.stdout, said
    assert (cluster.run("squeue", "-h", "-t", "all"), sorted(place.rglob("*"))) == before


def test_what_the_default_lacks_is_named_before_slurm_hears_of_it(cluster, place):
    before = cluster.run("squeue", "-h", "-t", "all"), sorted(place.rglob("*"))
    done = typed(place, "nano3 data prep pretrain --run YOUR-CLUSTER")
    assert done.returncode == 1 and "no documents are given" in done.stderr and "path=docs.jsonl" in done.stderr
    assert (cluster.run("squeue", "-h", "-t", "all"), sorted(place.rglob("*"))) == before
