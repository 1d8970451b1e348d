"""Stage 0 as a user runs it: documents, batches in Megatron's order, one denominator, a base model, fine-tuning from it."""

import copy
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import NEMOTRON, ONE_THREAD
from forked import Forked
from omegaconf import OmegaConf
from precision import EXACT, FACTOR, float_error, sum_error
from typer.testing import CliRunner

from nemotron_nb.cli import app
from nemotron_nb.core import UserError, from_mapping
from nemotron_nb.data.prep import PrepConfig, prepare
from nemotron_nb.data.tokenizer import load_tokenizer
from nemotron_nb.ops.artifacts import Store, log_data
from nemotron_nb.ops.config import documents_prep_config, pretrain_config
from nemotron_nb.pretrain.curriculum import Curriculum
from nemotron_nb.pretrain.mixing import CurriculumReader
from nemotron_nb.pretrain.documents import DocumentsConfig, DocumentsManifest, prepare_documents, read_megatron_blend
from nemotron_nb.pretrain.indexed import IndexedReader
from nemotron_nb.pretrain.order import Mixture
from nemotron_nb.train.__main__ import main
from nemotron_nb.train.__main__ import train as train_any
from nemotron_nb.train.base_model import DocumentSource, examine_base, loss_by_position, token_bytes
from nemotron_nb.train.batches import collate, grouped, share_of_loss
from nemotron_nb.train.lr import learning_rate
from nemotron_nb.train.model import build_model
from nemotron_nb.train.sequences import SequenceReader, held_out_samples
from nemotron_nb.train.settings import DatasetSection, ModelConfig, TrainConfig
from nemotron_nb.train.checkpoint import Checkpoints
from nemotron_nb.train.torch_engine import build_learner, train

TINY = load_tokenizer("tiny")
SMALL = {"pattern": "ME*", "hidden_size": 32, "attention_heads": 2, "mamba_heads": 2, "experts": 2, "expert_size": 16}
LINE = {
    **{f"model.{name}": value for name, value in SMALL.items()},
    "dataset.sequence_length": 64,
    "dataset.valid_samples": 2,
}
LINE |= {"train.train_iters": 6, "train.global_batch_tokens": 256, "train.eval_interval": 2, "train.log_interval": 2}
LINE |= {"scheduler.lr_warmup_iters": 2, "scheduler.lr_wsd_decay_iters": 3, "evaluation.num_generations": 2}
LINE |= {"evaluation.max_new_tokens": 4, "data.world_megabytes": 0.1, "data.workers": 1, "checkpoint.save_interval": 2}
TYPED = [f"{name}={value}" for name, value in LINE.items()]


def jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def random_documents(folder, seed=0, datasets=("a", "b"), **given):
    """Documents of random tokens, of very different lengths; some have one token and the end."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for k, name in enumerate(datasets):
        lengths = [*rng.integers(1, 90, 40), 1, 1, 300]
        texts = ["".join(chr(c) for c in rng.integers(97, 123, n)) for n in lengths]
        entries.append({"name": name, "path": str(jsonl(folder / f"{name}.jsonl", texts)), "weight": k + 1.0})
    (folder / "blend.json").write_text(json.dumps({"datasets": entries}))
    given = {"num_shards": 4, "workers": 1} | given
    return prepare_documents(
        DocumentsConfig(blend_path=str(folder / "blend.json"), output_dir=str(folder / "out"), **given)
    )


def config_of(data_dir, output_dir, **sections):
    sections = {"train": {"train_iters": 8, "global_batch_size": 4, "eval_interval": 3, "log_interval": 8}} | sections
    base = {"dataset": {"sequence_length": 32, "valid_samples": 2}, "model": SMALL}
    base |= {"optimizer": {"lr": 1e-3}, "evaluation": {"num_generations": 2, "max_new_tokens": 4}}
    return from_mapping(TrainConfig, {"data_dir": str(data_dir), "output_dir": str(output_dir)} | base | sections)


def timeless(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k != "seconds"} for line in lines if line["kind"] not in ("resume", "paused")
    ]


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return random_documents(tmp_path_factory.mktemp("documents"))


@pytest.fixture(scope="module")
def model():
    return build_model(ModelConfig(**SMALL), TINY.vocab_size)


# ---- batches


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_of_the_batches_is_that_of_the_mixture(tmp_path, reset, seed):
    manifest = random_documents(tmp_path, seed)
    steps, size, length = 9, 4, 32
    reader = SequenceReader(manifest, DatasetSection(length, reset), steps, size, seed)
    mixture = Mixture(read_megatron_blend(manifest.folder / "blend.json")["train"], steps * size, length, seed)
    names = [shard["dataset"] for shard in manifest.shards("train")]
    for step in range(steps):
        rows = list(reader.batch(step).rows)
        for i in range(step * size, step * size + size):
            sample = mixture[i]
            pieces = np.split(np.arange(length), sample.boundaries[1:-1]) if reset else [np.arange(length)]
            for piece in pieces:
                row = rows.pop(0)
                assert row.tokens.tolist() == sample.tokens[piece].tolist()
                assert row.labels.tolist() == sample.labels[piece].tolist()
                assert row.source == names[sample.dataset] and row.mask.all()
        assert not rows
        assert reader.batch(step).denominators.tokens == size * length


def test_phases_are_read_as_the_curriculum_says(documents):
    phases = [{"weights": {"a": 1.0, "b": 2.0}, "until_step": 3}, {"weights": {"b": 1.0}}]
    dataset = from_mapping(DatasetSection, {"sequence_length": 32, "phases": phases})
    files = {}
    for shard in documents.shards("train"):
        files.setdefault(shard["dataset"], []).append(documents.folder / shard["name"])
    expected = CurriculumReader(Curriculum(list(dataset.phases), 6, 4, 32), files, seed=5)
    reader = SequenceReader(documents, dataset, 6, 4, seed=5)
    for step in (5, 0, 3, 2):
        assert np.array_equal(np.stack([row.tokens for row in reader.batch(step).rows]), expected[step].tokens)
    assert {s for step in (3, 4, 5) for s in reader.samples(step)[1]} == {"b"}
    assert {s for step in (0, 1, 2) for s in reader.samples(step)[1]} == {"a", "b"}


def by_hand(model, documents_of_samples):
    """Mean loss of all labels, sample by sample, document by document, from full logits; no library code of ours."""
    nll = [
        F.cross_entropy(model(torch.tensor([tokens])).logits[0], torch.tensor(labels), reduction="none")
        for tokens, labels in documents_of_samples
    ]
    return torch.cat(nll).mean()


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("cap", [1, 100, 10**6])
def test_the_loss_has_one_denominator_however_it_is_split(documents, model, reset, cap):
    size, length = 5, 32
    mixture = Mixture(documents.prefixes("train"), 3 * size, length, 7)
    plain = []
    for i in range(size, 2 * size):  # the second step
        stretch, cuts = [*mixture[i].tokens.tolist(), int(mixture[i].labels[-1])], mixture[i].boundaries.tolist()
        for a, b in zip(cuts, cuts[1:]) if reset else [(0, length)]:
            plain.append((stretch[a:b], stretch[a + 1 : b + 1]))
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        truth = by_hand(exact, plain)
        unit = float_error(lambda m: by_hand(m, plain), model)
        batch = SequenceReader(documents, DatasetSection(length, reset), 3, size, 7).batch(1)
        shares = [share_of_loss(model, collate(g), "token", batch.denominators)[0] for g in grouped(batch.rows, cap)]
        assert abs(sum(s.double() for s in shares) - truth) <= FACTOR * unit
    assert batch.denominators.tokens == sum(len(labels) for _, labels in plain) == size * length
    assert all((collate([row]).weights("token") == 1).all() for row in batch.rows)


def test_a_reset_cuts_all_that_runs_over_a_border(documents, model):
    """Whatever the first document says, the losses of the second are the same bits; without a reset they are not."""
    reader = {reset: SequenceReader(documents, DatasetSection(32, reset), 6, 4, 0) for reset in (False, True)}
    cut = next(
        (step, i, b)
        for step in range(6)
        for i, b in enumerate(reader[False].samples(step)[0].boundaries)
        if len(b) == 3 and b[1] > 4
    )
    step, i, (_, border, _) = cut
    moved = {}
    for reset in (False, True):
        found = []
        for shift in (0, 3):
            batch, _ = reader[reset].samples(step)
            tokens = batch.tokens.copy()
            tokens[i, : border - 1] = (tokens[i, : border - 1] + shift) % 4096
            rows = [
                (tokens[i, a:b], batch.labels[i, a:b]) for a, b in ([(0, border), (border, 32)] if reset else [(0, 32)])
            ]
            with torch.no_grad():
                nll = [
                    F.cross_entropy(model(torch.from_numpy(t)[None]).logits[0], torch.from_numpy(y), reduction="none")
                    for t, y in rows
                ]
            found.append(torch.cat(nll)[border:])
        moved[reset] = (found[0] - found[1]).abs().max().item()
        kept = [len(r) for r in reader[reset].batch(step).rows]
        assert (border in np.cumsum(kept)[: len(kept) - 1] % 32) == reset or not reset
    assert moved[True] == 0 < moved[False]


def test_held_out_samples_are_the_documents_in_their_order(documents):
    for length, most in ((16, 0), (16, 3), (1000, 0)):
        rows = held_out_samples(documents, DatasetSection(length, valid_samples=most))
        for name in ("a", "b"):
            paths = [documents.folder / s["name"] for s in documents.shards("valid") if s["dataset"] == name]
            ids = np.concatenate([reader[i] for reader in map(IndexedReader, paths) for i in range(len(reader))])
            ids = ids[: most * length + 1] if most else ids
            own = [row for row in rows if row.source == name]
            assert np.concatenate([row.tokens for row in own]).tolist() == ids[:-1].tolist()
            assert np.concatenate([row.labels for row in own]).tolist() == ids[1:].tolist()
            assert max(len(row) for row in own) <= length


# ---- what the base model knows


def test_bits_per_byte_against_the_definition(documents, model):
    rows = held_out_samples(documents, DatasetSection(24, valid_samples=3))
    found = examine_base(model, rows, [], TINY, documents["end_token"], 0)
    plain = [(row.tokens.tolist(), row.labels.tolist()) for row in rows]
    with torch.no_grad():
        truth = by_hand(copy.deepcopy(model).double(), plain).item()
        unit = float_error(lambda m: by_hand(m, plain), model)
    texts = [TINY.decode([i for i in labels if i != documents["end_token"]]) for _, labels in plain]
    labels, size = sum(map(len, rows)), sum(len(text.encode()) for text in texts)
    assert (found["bytes"], found["trained_tokens"], found["conversations"]) == (size, labels, len(rows))
    assert abs(found["loss_token"] - truth) <= FACTOR * unit
    assert math.isclose(found["bits_per_byte"], found["loss_token"] * labels / math.log(2) / size, rel_tol=EXACT)
    parts = found["sources"].values()
    assert math.isclose(sum(p["bits_per_byte"] * p["bytes"] for p in parts), found["bits_per_byte"] * size, rel_tol=EXACT)
    bins = found["positions"]
    assert math.isclose(sum(b["loss"] * b["labels"] for b in bins), found["loss_token"] * labels, rel_tol=EXACT)
    assert bins[0]["labels"] == len(rows) and bins[-1]["to"] == 24


def test_bytes_of_tokens_are_those_of_the_text():
    sizes, texts = (
        token_bytes(TINY),
        ["a lamp", "caf\u00e9 \u96fb\u7403 \U0001f4a1\x00", "<|im_end|> as text", "\n\n  "],
    )
    for text in texts:
        assert sizes[TINY.encode(text, special=False)].sum() == len(text.encode())
    assert all(sizes[i] == 0 for i in TINY.special_ids.values())


def test_positions_of_rows_of_different_lengths():
    bins = loss_by_position([np.array([5.0]), np.array([3.0, 1, 1, 1, 2])])
    assert [(b["from"], b["to"], b["labels"], b["loss"]) for b in bins] == [
        (0, 1, 2, 4.0),
        (1, 2, 1, 1.0),
        (2, 4, 2, 1.0),
        (4, 5, 1, 2.0),
    ]


# ---- the schedule


def test_the_way_down_is_megatrons_minus_sqrt():
    config = config_of("d", "o", optimizer={"lr": 2.0}, train={"train_iters": 20}, scheduler={
        "lr_decay_style": "WSD", "lr_wsd_decay_iters": 8, "lr_wsd_decay_style": "minus_sqrt", "min_lr": 0.5, "lr_warmup_iters": 4,
    })  # fmt: skip
    for step in range(20):
        ratio = (
            max(0, step - 12) / 8
        )  # megatron.core.optimizer_param_scheduler: coeff = 1 - sqrt(steps into the decay / its steps)
        expected = 2.0 * (step + 1) / 4 if step < 3 else 0.5 + (1 - math.sqrt(ratio)) * 1.5
        assert math.isclose(learning_rate(step, config), expected, rel_tol=EXACT), step
    straight = dataclasses.replace(config, scheduler=dataclasses.replace(config.scheduler, lr_wsd_decay_style="linear"))
    assert learning_rate(16, straight) == 2.0 - 1.5 * 4 / 8 and learning_rate(16, config) < learning_rate(16, straight)
    with pytest.raises(UserError, match="did you mean 'minus_sqrt'"):
        config_of("d", "o", scheduler={"lr_wsd_decay_style": "minus_sqr"})


# ---- a training


def run_training(config):
    train(config, open_source=DocumentSource)


def test_a_killed_training_ends_with_the_same_bytes(documents, tmp_path):
    sections = {"train": {"train_iters": 12, "global_batch_size": 4, "eval_interval": 3, "log_interval": 12}}
    sections |= {
        "checkpoint": {"save_interval": 2},
        "dataset": {"sequence_length": 32, "valid_samples": 2, "reset_documents": True},
    }
    whole, killed = (config_of(documents.folder, tmp_path / name, **sections) for name in ("whole", "killed"))
    run_training(whole)
    child = Forked(run_training, killed)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while child.poll() is None and not (metrics.exists() and '"step": 5,' in metrics.read_text()):
        time.sleep(0.01)
    child.kill()
    assert child.wait() == -signal.SIGKILL and not (tmp_path / "killed" / "model").exists()
    run_training(killed)
    lines = metrics.read_text()
    assert '"kind": "resume"' in lines and timeless(metrics) == timeless(tmp_path / "whole" / "metrics.jsonl")
    for name in ("model/model.safetensors", "evaluation_before.json", "evaluation_after.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_longer_training_has_another_order_and_is_refused(documents, tmp_path):
    config = config_of(documents.folder, tmp_path / "out")
    run_training(config)
    longer = config_of(documents.folder, tmp_path / "out", train={"train_iters": 9, "global_batch_size": 4})
    with pytest.raises(UserError, match="the place in the data was counted with other settings: samples 32, here 36"):
        run_training(longer)


def test_the_metrics_are_those_of_a_fine_tuning(documents, tmp_path):
    run_training(config_of(documents.folder, tmp_path / "out"))
    lines = timeless(tmp_path / "out" / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "valid"] == [0, 3, 6, 8]
    steps = [line for line in lines if line["kind"] == "train"]
    assert all(
        line["tokens"] == line["trained_tokens"] == 4 * 32 and line["loss"] == pytest.approx(line["loss_token"], rel=sum_error(4 * 32))
        for line in steps
    )
    start = lines[0]
    assert start["kind"] == "start" and start["packs"] == documents["splits"]["train"]["tokens"] // 32
    assert steps[-1]["epoch"] == pytest.approx(8 * 4 / start["packs"])
    assert set(lines[1]["sources"]) == {"a", "b"}


@pytest.mark.parametrize("sections, said", [
    ({"dataset": {"sequence_length": 0}}, "no sample length is given"),
    ({"dataset": {"sequence_length": 10**5}}, "one sample needs"),
    ({"dataset": {"sequence_length": 32, "phases": [{"weights": {"c": 1.0}}]}}, "there are no files of the source 'c'"),
    ({"dataset": {"sequence_length": 32, "phases": [{"weights": {"a": 1.0}, "until_step": 99}, {"weights": {"b": 1.0}}]}}, "ends at step 99"),
    ({"scheduler": {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 9}}, "9 steps of decay in 8"),
    ({"train": {"train_iters": 8, "global_batch_size": 4, "step_batch_size_schedule": "0:2 64:3"}}, "the last size is 3"),
    ({"dataset": {"sequence_length": 32, "mixed_lengths": [{"tokens": 32, "share": 1.0}, {"tokens": 5, "share": 1.0}]}}, "no multiple of"),
    ({"checkpoint": {"save_interval": 4, "average_last": 4}}, "a window of 4 steps, and a checkpoint every 4"),
    ({"checkpoint": {"save_interval": 9, "average_last": 10}}, "1 checkpoint in the last 10 of 8 steps"),
    ({"checkpoint": {"save_interval": 2, "average_last": 5}, "peft": {"enabled": True}}, "a mean of adapters"),
], ids=["no length", "no sample", "no source", "no step", "no way down", "no growth", "no lengths", "no mean", "a mean of one", "of adapters"])  # fmt: skip
@pytest.mark.parametrize("engine", ["torch", "megatron"])
def test_what_cannot_be_trained_is_refused_and_nothing_is_written(documents, tmp_path, sections, said, engine):
    with pytest.raises(UserError, match=said):
        config = config_of(documents.folder, tmp_path / "out", **sections)
        train_any(dataclasses.replace(config, train=dataclasses.replace(config.train, engine=engine)))
    assert not (tmp_path / "out").exists()


def test_ids_beyond_the_vocabulary_are_refused(tmp_path):
    manifest = random_documents(tmp_path)
    path = manifest.folder / (manifest.shards("train")[1]["name"] + ".bin")
    ids = np.fromfile(path, "<i4")
    ids[7] = TINY.vocab_size
    ids.tofile(path)
    with pytest.raises(UserError, match="holds the token id 4096"):
        run_training(config_of(manifest.folder, tmp_path / "trained"))
    (manifest.folder / (manifest.shards("train")[0]["name"] + ".idx")).write_bytes(b"MMIDIDX")
    with pytest.raises(UserError, match="was cut off"):
        run_training(config_of(manifest.folder, tmp_path / "trained"))


def test_packs_and_documents_are_told_apart(documents, tmp_path):
    with pytest.raises(UserError, match="holds documents, and not packs"):
        train(config_of(documents.folder, tmp_path / "out"))
    packs = tmp_path / "packs"
    prepare(
        PrepConfig(output_dir=str(packs), sample=12, pack_size=1024, train_ratio=0.8, valid_ratio=0.1, test_ratio=0.1)
    )
    with pytest.raises(UserError, match="the data is packs of chats, and a sample length is given"):
        train_any(config_of(packs, tmp_path / "out"))
    with pytest.raises(UserError, match="data of another kind"):
        log_data(Store(tmp_path / "register"), "nano3", packs, stage="pretrain")
    with pytest.raises(UserError, match="holds documents"):
        log_data(Store(tmp_path / "register"), "nano3", documents.folder)
    assert not (tmp_path / "register").exists()


# ---- the commands


def ask(*words):
    return CliRunner().invoke(app, list(words))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_documents_are_prepared_and_registered(home):
    jsonl(home / "docs.jsonl", [f"Document {i} is about lamps." for i in range(60)], "body")
    words = (
        "nano3",
        "data",
        "prep",
        "pretrain",
        "path=docs.jsonl",
        "tokenizer=tiny",
        "num_shards=5",
        "text_field=body",
    )
    done = ask(*words, "min_doc_chars=10", "dtype=uint16", "add_eos=false", "workers=1", "--sample", "50")
    assert done.exit_code == 0, (done.output, done.exception)
    assert "registered: art://DataBlendsArtifact-pretrain:v1" in done.output
    folder = next(home.glob("output/nano3/data_prep_pretrain/*/manifest.json")).parent
    manifest = DocumentsManifest.load(folder)
    assert (manifest["documents"], manifest["dtype"], manifest["add_eos"], manifest["sample"]) == (
        50,
        "uint16",
        False,
        50,
    )
    assert {split: len(manifest.shards(split)) for split in ("train", "valid", "test")} == {
        "train": 3,
        "valid": 1,
        "test": 1,
    }
    blend = read_megatron_blend(folder / "blend.json")
    assert IndexedReader(blend["train"][0][1]).dtype == np.uint16
    text = ask("lineage", "DataBlendsArtifact-pretrain").output
    assert "docs  documents" in text and "tiny  tokenizer" in text
    again = ask(*words, "min_doc_chars=10", "dtype=uint16", "add_eos=false", "workers=1", "--sample", "50")
    assert "DataBlendsArtifact-pretrain:v1" in again.output and "tokenized:" not in again.output
    super3 = ask("super3", *words[1:], "workers=1")
    assert "art://DataBlendsArtifact-pretrain:v2" in super3.output, super3.exception


def test_a_value_of_the_environment_is_written_nowhere(home, monkeypatch):
    """A folder whose name is a secret: no file of the documents, of the cache and of the register holds it."""
    place = home / "kept" / "hf_VerySecret&1"
    place.mkdir(parents=True)
    monkeypatch.setenv("PLACE", str(place))
    jsonl(place / "docs.jsonl", ["a", *(f"Document {i} is about lamps." for i in range(60))])
    words = ("nano3", "data", "prep", "pretrain", "path=${oc.env:PLACE}/docs.jsonl", "tokenizer=tiny", "min_doc_chars=5", "workers=1")
    done = ask(*words, "num_shards=5")
    assert done.exit_code == 0 and "VerySecret" not in done.output, (done.output, done.exception)
    files = [p for p in (home / "output").rglob("*") if p.is_file()]
    assert [str(p) for p in files if b"VerySecret" in p.read_bytes()] == []
    (manifest,) = home.glob("output/nano3/data_prep_pretrain/*/manifest.json")
    assert "${oc.env:PLACE}" in manifest.read_text()
    again = ask(*words, "num_shards=5")
    assert again.exit_code == 0 and "tokenized:" not in again.output, (again.output, again.exception)


@pytest.mark.parametrize("typed, said", [
    ([], "no documents are given"),
    (["path=nowhere.jsonl"], "nowhere.jsonl"),
    (["path=docs.jsonl", "num_shards=2"], "no document would be left to train on"),
    (["path=docs.jsonl", "num_shards=4", "shard_size=1MB"], "num_shards and shard_size are both given"),
    (["path=docs.jsonl", "shard_size=many"], "'many' is not a size"),
    (["path=docs.jsonl", "dtype=float32"], "dtype 'float32' for token ids"),
    (["path=docs.jsonl", "dtype=uint8"], "dtype|uint8"),
    (["path=docs.jsonl", "tokenizer=tinny"], "tinny"),
    (["path=docs.jsonl", "max_doc_tokens=1"], "max_doc_tokens is 1"),
    (["path=docs.jsonl", "num_shard=3"], "did you mean 'data.num_shards'"),
    (["path=null.jsonl", "num_shards=3"], "rows are no document"),
    (["blend_path=odd.json"], "weight 0.* of 'a'"),
    (["blend_path=flat.json"], r"flat.json: train\[0\]"),
    (["blend_path=empty.json"], "empty.json: valid: is not a list with at least one dataset"),
    (["path=docs.jsonl", "dtype=int23"], "unknown dtype 'int23'"),
    (["blend_path=nowhere.json"], "there is no such file"),
    (["path=docs.jsonl", "valid_shards=-1"], "valid_shards is -1"),
    (["path=s3://bucket/docs.jsonl"], r"s3://bucket/docs.jsonl(.|\n)*s3fs"),
    (["path=gs://bucket/*.parquet"], r"gs://bucket/\*.parquet(.|\n)*gcsfs"),
    (["path=hf://nobody/nothing"], r"cannot be fetched from the hub(.|\n)*no network(.|\n)*hf download"),
    (["path=sss://bucket/docs.jsonl"], "Protocol not known: sss"),
], ids=lambda x: "-".join(x)[:40] if isinstance(x, list) else "")  # fmt: skip
def test_bad_input_is_refused_by_name_and_nothing_half_written(home, typed, said, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for package in ("s3fs", "gcsfs"):
        monkeypatch.setitem(sys.modules, package, None)
    jsonl(home / "docs.jsonl", ["one document", "another", "a third", "a fourth", "a fifth"])
    jsonl(home / "null.jsonl", [None, None, "text"])
    (home / "odd.json").write_text('{"datasets": [{"name": "a", "path": "docs.jsonl", "weight": 0}]}')
    (home / "flat.json").write_text('{"train": ["1.0", "docs.jsonl", "0.5"]}')
    (home / "empty.json").write_text('{"train": [{"name": "a", "path": "docs.jsonl"}], "valid": []}')
    typed = typed if any(t.startswith("tokenizer") for t in typed) else [*typed, "tokenizer=tiny"]
    done = ask("nano3", "data", "prep", "pretrain", "workers=1", *typed)
    assert isinstance(done.exception, UserError), (done.output, done.exception)
    assert re.search(said, str(done.exception)), str(done.exception)
    assert not [p for p in home.rglob("*") if p.name in ("manifest.json", "blend.json") or p.suffix in (".bin", ".idx")
                and "runs" not in p.parts]  # fmt: skip
    assert not (home / "output" / "artifacts").exists()


def test_a_document_beyond_the_format_is_refused_and_leaves_no_shard(home, monkeypatch):
    """The limit of 2^31 bytes, made small: the first documents of the shard are written before it is met."""
    monkeypatch.setattr("nemotron_nb.pretrain.indexed.LONGEST_DOCUMENT", 400)
    jsonl(home / "docs.jsonl", [*["A lamp."] * 20, "one lamp after another " * 30, "The end."])
    done = ask("nano3", "data", "prep", "pretrain", "path=docs.jsonl", "tokenizer=tiny", "num_shards=3", "workers=1")
    assert isinstance(done.exception, UserError), (done.output, done.exception)
    assert re.search(r"has [\d,]+ bytes of tokens, more than 2\^31 - 1", str(done.exception))
    assert not [p for p in home.rglob("*") if p.name in ("manifest.json", "blend.json", "artifacts") or p.suffix in (".bin", ".idx")]


def lost_end(ending, count):
    """What cuts a file of the first shard of a folder off."""

    def cut(folder):
        path = folder / (DocumentsManifest.load(folder).shards("train")[0]["name"] + ending)
        path.write_bytes(path.read_bytes()[:-count])

    return cut


@pytest.mark.parametrize("damage, said", [
    (lost_end(".idx", 9), r"\.idx(.|\n)*it was cut off"),
    (lost_end(".bin", 4), r"\.bin(.|\n)*it was cut off"),
    (lambda folder: (folder / (DocumentsManifest.load(folder).shards("valid")[0]["name"] + ".bin")).unlink(), "no such file"),
    (lambda folder: (folder / "manifest.json").write_text("null"), "data of another kind"),
], ids=["idx", "bin", "missing", "manifest"])  # fmt: skip
def test_damaged_documents_do_not_enter_the_register(home, documents, damage, said):
    folder = shutil.copytree(documents.folder, home / "copied")
    damage(folder)
    done = ask("nano3", "data", "import", "pretrain", "copied")
    assert isinstance(done.exception, UserError) and re.search(said, str(done.exception)), (done.output, done.exception)
    assert [p.name for p in home.iterdir()] == ["copied"]


def test_changed_documents_are_refused_before_there_is_a_folder(home, documents):
    folder = shutil.copytree(documents.folder, home / "copied")
    assert ask("nano3", "data", "import", "pretrain", "copied").exit_code == 0
    lost_end(".idx", 9)(folder)
    done = ask("nano3", "pretrain", "-c", "tiny", "run.data=DataBlendsArtifact-pretrain")
    assert isinstance(done.exception, UserError) and re.search(r"changed: train/.*\.idx", str(done.exception)), done.exception
    assert not list(home.rglob("output/nano3"))


def wrong_id(home, folder):
    """An id that the tokenizer does not have; nothing else of the folder tells."""
    path = folder / (DocumentsManifest.load(folder).shards("train")[0]["name"] + ".bin")
    ids = np.fromfile(path, "<i4")
    ids[3] = 5000
    ids.tofile(path)
    return []


def wrong_model(home, folder):
    """A model with a tokenizer that lost five merges."""
    build_model(ModelConfig(**SMALL), TINY.vocab_size).save_pretrained(home / "model")
    TINY.save(home / "model", None)
    tokenizer = json.loads((home / "model" / "tokenizer.json").read_text())
    del tokenizer["model"]["merges"][-5:]
    (home / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    return ["checkpoint.pretrained_checkpoint=model"]


@pytest.mark.parametrize("wrong, said", [
    pytest.param(wrong_id, "holds the token id 5000", marks=pytest.mark.long, id="id"),
    pytest.param(wrong_model, "the checkpoint has the tokenizer", id="tokenizer"),
])  # fmt: skip
def test_what_only_the_training_can_see_is_refused_before_its_first_step(home, documents, wrong, said):
    folder = shutil.copytree(documents.folder, home / "copied")
    more = wrong(home, folder)
    assert ask("nano3", "data", "import", "pretrain", "copied").exit_code == 0
    done = run_command(home, "nano3", "pretrain", "-c", "tiny", *TYPED, "run.data=DataBlendsArtifact-pretrain", *more)
    assert done.returncode == 1 and said in done.stderr + done.stdout, done.stderr + done.stdout
    (run,) = (home / "output/nano3/pretrain").iterdir()
    assert said in json.loads((run / "status.json").read_text())["message"]
    assert not [p for name in ("metrics.jsonl", "checkpoints", "model", "evaluation_before.json") if (p := run / name).exists()]


@pytest.mark.parametrize("typed, said", [
    (["-c", "tiny", "dataset.sequence_length=-5"], "-5 is negative"),
    (["-c", "tiny", "dataset.sequence_length=0"], "nothing says how long a sample is"),
    (["-c", "tiny", "dataset.phases=[{weights: {sums: 0}}]"], "a share must be a positive number"),
    (["-c", "tiny", "dataset.phases=[{weights: {sums: 1}, until_step: 999}, {weights: {code: 1}}]"], "ends at step 999, and the training has 260"),
    (["-c", "tiny", "data.num_shards=4", "data.shard_size=1MB"], "num_shards and shard_size are both given"),
    (["-c", "tiny", "data.dtype=int23"], "unknown dtype 'int23'"),
    (["-c", "tiny", "loss.stages=[{stage: sample}]"], "loss.stages"),
    (["-c", "tiny", "peft.enabled=true"], "peft"),
    (["-c", "tiny", "data.path="], "no documents are given"),
    (["-c", "tiny", "checkpoint.load=/no/such"], "there is no such checkpoint"),
    (["-c", "tiny", "--art.data", "DataBlendsArtifact-pretrain:v7"], "DataBlendsArtifact-pretrain"),
    (["-c", "tiny", "evaluation.needle_lengths=[0]"], "0 is no length"),
    (["-c", "tiny", "checkpoint.average_last=20", "checkpoint.save_interval=5", "checkpoint.keep_top_k=2"], "only some are kept"),
    (["-c", "tiny", "train.step_batch_size_schedule='0:8'", "train.epochs=1", "train.train_iters=0"], "a batch that grows, and a length in epochs"),
    (["-c", "tiny", "train.train_iter=3"], "did you mean 'train.train_iters'"),
], ids=lambda x: x[-1][:40] if isinstance(x, list) else "")  # fmt: skip
def test_a_run_that_cannot_be_is_refused_before_there_is_a_folder(home, typed, said):
    done = ask("nano3", "pretrain", *typed)
    assert isinstance(done.exception, UserError) and said in str(done.exception), (done.output, done.exception)
    assert not list(home.rglob("output"))


def test_a_dry_run_shows_and_writes_nothing(home):
    (home / "env.toml").write_text('[CLUSTER]\nexecutor = "slurm"\naccount = "a"\npartition = "p"\n')
    done = ask("nano3", "pretrain", "-c", "tiny", "--dry-run", "train.train_iters=50", "--run", "CLUSTER")
    assert done.exit_code == 0, done.exception
    for said in ("50 steps", "minus_sqrt", "stage=pretrain notebook=nbs/runs/pretrain.ipynb", "tokens in a step"):
        assert said in done.output, said
    assert [p.name for p in home.iterdir()] == ["env.toml"]
    big = ask("nano3", "pretrain", "--dry-run").output
    assert "333.79 steps" in big and "198,682 steps" in big and "25,000,0" in big


def test_published_numbers_are_in_the_configuration():
    for family in ("nano3", "super3"):
        settings = pretrain_config(family, "default", ["data.path=x"]).settings
        with open(f"{os.path.dirname(os.path.dirname(__file__))}/nemotron_nb/pretrain/assets/{family}.json") as f:
            main_run = json.load(f)["main"]
        rate = main_run["learning_rate"]
        assert settings.train.train_iters == main_run["steps"]["value"]
        assert settings.dataset.sequence_length == main_run["sequence_length"]["value"]
        assert settings.train.global_batch_size == main_run["batch_size"]["value"]
        assert (settings.optimizer.lr, settings.scheduler.min_lr) == (rate["peak"]["value"], rate["least"]["value"])
        tokens = settings.train.global_batch_size * settings.dataset.sequence_length
        assert settings.scheduler.lr_wsd_decay_iters == round(rate["decay_tokens"]["value"] / tokens)
    sized = documents_prep_config("nano3", "default", ["shard_size=256MB"]).settings.data
    assert (sized.num_shards, sized.shard_size) == (None, "256MB")


def run_command(home, *words, **about):
    return subprocess.run(
        [NEMOTRON, *words], cwd=home, env=ONE_THREAD, capture_output=True, text=True, timeout=600, **about
    )


def said_by(*words):
    """What a command prints that trains nothing: it needs no process of its own."""
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    return done.output


def test_from_text_to_a_fine_tuned_model(home, monkeypatch):
    """The whole way, as a user types it: text, base model, chats, and the lineage from one to the other."""
    monkeypatch.chdir(home)
    done = run_command(home, "nano3", "pretrain", "-c", "tiny", *TYPED)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "a little world of 0.1 MB that the project makes itself was written to" in done.stdout
    assert "bits per byte before" in done.stdout and "The run is complete." in done.stdout
    run = next((home / "output/nano3/pretrain").iterdir())
    assert (
        (run / "report.html").is_file()
        and (run / "model" / "config.json").is_file()
        and (run / "notebook.ipynb").is_file()
    )
    assert next(home.glob("output/nano3/data_prep_pretrain/world-*/train/sums.jsonl")).is_file()
    page = (run / "report.html").read_text()
    assert "Bits per byte by source" in page and "dialogues" in page and "<script" not in page
    said_by("report", str(run))
    text = said_by("lineage", "ModelArtifact-pretrain")
    assert (
        "ModelArtifact-pretrain:v1" in text and "DataBlendsArtifact-pretrain:v1" in text and "sums  documents" in text
    )

    model = ["model.pattern=ME*", *(f"model.{n}={v}" for n, v in SMALL.items() if n != "pattern")]
    short = ["train.train_iters=2", "loss.stages=[{stage: token}]", "data.sample=12", "evaluation.num_generations=1"]
    done = run_command(
        home,
        "nano3",
        "sft",
        "-c",
        "tiny",
        *model,
        *short,
        "evaluation.max_new_tokens=4",
        "--art.model",
        "ModelArtifact-pretrain:latest",
    )
    assert done.returncode == 0, done.stderr + done.stdout
    text = said_by("lineage", "ModelArtifact-sft")
    for name in (
        "ModelArtifact-sft:v1",
        "DataBlendsArtifact-sft:v1",
        "ModelArtifact-pretrain:v1",
        "DataBlendsArtifact-pretrain:v1",
        "sums  documents",
    ):
        assert name in text, (name, text)


def test_the_newest_documents_are_taken_where_none_are_named(home):
    """`data prep pretrain`, then `pretrain` without a word about text."""
    jsonl(home / "docs.jsonl", [f"Document {i} is about lamps and about nothing else." for i in range(200)])
    assert (
        ask(
            "nano3", "data", "prep", "pretrain", "path=docs.jsonl", "tokenizer=tiny", "num_shards=4", "workers=1"
        ).exit_code
        == 0
    )
    effective = pretrain_config("nano3", "default", ["tokenizer.model=tiny", "train.engine=torch"])
    assert (
        effective.settings.run.data == "DataBlendsArtifact-pretrain:v1"
        and "no documents are named" in effective.notes[0]
    )
    other = pretrain_config("nano3", "default", ["train.engine=torch"])
    assert not other.settings.run.data and "it is not taken" in other.notes[0], "made with another tokenizer"
    assert pretrain_config("nano3", "tiny").settings.data.path == "world"


# ---- batches that grow, several lengths, means of checkpoints, needles


def in_a_row(reader, steps):
    return np.concatenate([row.tokens for step in range(steps) for row in reader.batch(step).rows])


def test_a_batch_that_grows_reads_the_same_samples_in_other_portions(documents):
    plan, length = "0:1 96:3 320:4", 32
    reader = SequenceReader(documents, DatasetSection(length), 8, 4, 5, batch_schedule=plan)
    sizes = [len(reader.batch(step).rows) for step in range(8)]
    assert sizes == [1, 1, 1, 3, 3, 3, 4, 4]
    mixture = Mixture(documents.prefixes("train"), sum(sizes), length, 5)
    assert in_a_row(reader, 8).tolist() == np.concatenate([mixture[i].tokens for i in range(sum(sizes))]).tolist()
    phases = [{"weights": {"a": 1.0}, "until_tokens": 6 * length}, {"weights": {"b": 1.0}}]
    dataset = from_mapping(DatasetSection, {"sequence_length": length, "phases": phases})
    grown = SequenceReader(documents, dataset, 8, 4, 5, batch_schedule=plan)
    assert [set(grown.samples(step)[1]) for step in range(8)] == [{"a"}] * 4 + [{"b"}] * 4
    assert [len(grown.batch(step).rows) for step in range(8)] == sizes


def test_a_warm_up_in_samples_counts_what_is_read():
    config = config_of("d", "o", optimizer={"lr": 1.0}, train={"train_iters": 20, "global_batch_size": 4, "step_batch_size_schedule": "0:1 96:4"},
                       scheduler={"lr_warmup_samples": 7})  # fmt: skip
    assert [round(learning_rate(step, config), 6) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]  # 1, 1, 1 and 4 samples: four steps


def test_steps_of_several_lengths_hold_the_same_tokens(documents):
    lengths = [{"tokens": 64, "share": 1.0}, {"tokens": 16, "share": 3.0}]
    dataset = from_mapping(DatasetSection, {"sequence_length": 64, "mixed_lengths": lengths})
    reader = SequenceReader(documents, dataset, 8, 2, 3)
    assert sorted(reader.length_of(step) for step in range(8)) == [16] * 6 + [64] * 2
    for step in range(8):
        batch = reader.batch(step)
        assert batch.denominators.tokens == 128 and {len(row) for row in batch.rows} == {reader.length_of(step)}
    again = SequenceReader(documents, dataset, 8, 2, 3)
    assert all(np.array_equal(again.batch(step).rows[0].tokens, reader.batch(step).rows[0].tokens) for step in (7, 2))


def test_a_run_leaves_the_mean_of_its_last_checkpoints(documents, tmp_path, capsys):
    config = config_of(documents.folder, tmp_path / "out", checkpoint={"save_interval": 2, "average_last": 5},
                       evaluation={"num_generations": 1, "max_new_tokens": 2, "needle_lengths": [40]})  # fmt: skip
    train_any(config)
    assert "mean of the checkpoints of steps 4, 6, 8" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "evaluation_averaged.json").read_text())
    assert found["averaged"] == [4, 6, 8] and found["needles"][0]["tokens"] == 40
    learner = build_learner(config, TINY.vocab_size)
    store, total = Checkpoints(tmp_path / "out" / "checkpoints", made_for=DocumentSource(config).made_for), 0
    for checkpoint in store.all()[-3:]:
        store.load_weights(checkpoint, learner)
        total = total + learner.base.lm_head.weight.detach().double()
    mean = build_model(ModelConfig(name=str(tmp_path / "out" / "model_averaged")), TINY.vocab_size).lm_head.weight
    assert torch.equal(mean.detach(), (total / 3).float())


@pytest.mark.long
def test_a_signal_ends_a_pretraining_in_words_and_it_goes_on(home):
    """kill: the training writes a checkpoint, the status says preempted, and the line that resumes is printed; each step once."""
    typed = [x for x in TYPED if not x.startswith(("train.train_iters", "train.eval", "checkpoint"))]
    words = ["nano3", "pretrain", "-c", "tiny", *typed, "train.train_iters=200", "evaluation.needle_lengths=[]"]
    command = subprocess.Popen([NEMOTRON, *words], cwd=home, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 900
    while not any('"step": 4,' in path.read_text() for path in home.glob("output/nano3/pretrain/*/metrics.jsonl")):
        assert time.monotonic() < deadline and command.poll() is None
        time.sleep(0.05)
    command.send_signal(signal.SIGTERM)
    said = command.communicate(timeout=600)[0]
    (run,) = home.glob("output/nano3/pretrain/*")
    assert command.returncode == 128 + signal.SIGTERM, said
    assert f"Go on with: nemotron nano3 pretrain --resume output/nano3/pretrain/{run.name}" in said
    assert json.loads((run / "status.json").read_text())["state"] == "preempted" and not (run / "model").exists()
    done = run_command(home, "nano3", "pretrain", "--resume", str(run))
    assert done.returncode == 0, done.stderr + done.stdout
    assert [a["state"] for a in json.loads((run / "status.json").read_text())["attempts"]] == ["preempted", "done"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 201))
    assert "arc_challenge" in (run / "harness.sh").read_text() and str(run / "model") in (run / "harness.sh").read_text()


def test_a_training_process_without_a_notebook(documents, tmp_path, capsys):
    path = tmp_path / "train.yaml"
    OmegaConf.save(OmegaConf.create(dataclasses.asdict(config_of(documents.folder, tmp_path / "out"))), path)
    assert main(["--config", str(path)]) == 0
    assert "bits per byte" in capsys.readouterr().out and (tmp_path / "out" / "model").is_dir()
