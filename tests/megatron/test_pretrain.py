"""Pretraining with the real Megatron-Bridge on a CPU: every layout, the PyTorch engine, float64, and what goes wrong without our fixes."""

import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import HEAVY, LENGTH, PHASES, pretrainings
from precision import FACTOR
from safetensors.torch import load_file
from transformers import NemotronHForCausalLM

from nemotron_nb.core import from_mapping
from nemotron_nb.pretrain.documents import DocumentsManifest
from nemotron_nb.train.base_model import DocumentSource
from nemotron_nb.train.release import audit
from nemotron_nb.train.scan import use_chunked_scan
from nemotron_nb.train.sequences import SequenceReader, held_out_samples
from nemotron_nb.train.settings import DatasetSection, TrainConfig
from nemotron_nb.train.torch_engine import train

PARALLEL = [pytest.param(name, marks=[pytest.mark.long] * (name in HEAVY)) for name in ("pre_dp", "pre_cp", "pre_tp_sp", "pre_pp", "pre_ep")]
BOTH = [pytest.param(name, marks=[pytest.mark.long] * (name in HEAVY)) for name in ("pre", "pre_reset", "pre_lengths", "pre_grown", "pre_whole", "pre_tiny")]


def of_kind(metrics, kind, *names):
    return np.array([[line[n] for n in names] for line in metrics if line["kind"] == kind])


def model_in_float64(folder, dtype=torch.float64):
    model = NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32, use_mamba_kernels=False, experts_implementation="eager")
    use_chunked_scan(model)  # the scan of transformers computes in float32 whatever it is given
    return model.to(dtype).train()


def job_of(root, name):
    return next(job for job in pretrainings(root) if job["name"] == name)


@pytest.fixture(scope="module")
def by_the_pytorch_engine(root, tmp_path_factory):
    """The metrics of the PyTorch engine with the settings of a job."""

    @cache
    def train_as(name):
        job, folder = job_of(root, name), tmp_path_factory.mktemp(name)
        shared = {"data_dir": job["data_dir"], "output_dir": str(folder), "model": {"name": job["model"]}}
        shared |= {"train": {"train_iters": job["steps"], "global_batch_size": job["batch"], "log_interval": 1}}
        shared |= {"optimizer": {"lr": 1e-3, "weight_decay": 0.0}, "evaluation": {"num_generations": 0}}
        for section, values in job["shared"].items():
            shared[section] = shared.get(section, {}) | values
        train(from_mapping(TrainConfig, shared, name), open_source=DocumentSource)
        return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]

    return train_as


def samples_of(root, step):
    """[4, L+1] the tokens of a step, by the reader alone."""
    reader = SequenceReader(DocumentsManifest.load(f"{root}/documents"), DatasetSection(LENGTH), 4, 4, 1234)
    batch = reader.samples(step)[0]
    return torch.from_numpy(np.concatenate([batch.tokens, batch.labels[:, -1:]], 1))


def plain_training(root, dtype):
    """[(loss, gradient norm)] of the first job: samples through the whole model, full logits, AdamW written out; nothing of an engine."""
    model, found = model_in_float64(f"{root}/model", dtype), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    rates = (0.5e-3, 1e-3, 1e-3, 1e-3 - (1e-3 - 1e-5) / 2)  # warm-up of two steps; half of the way down before the last one
    for step, rate in enumerate(rates):
        x = samples_of(root, step)
        loss = F.cross_entropy(model(x[:, :-1], use_cache=False).logits.flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        found.append((loss.item(), norm.item()))
    return np.array(found)


def test_one_process_is_a_plain_training_in_float64(results, root):
    """Loss and gradient norm of four steps; what may differ is what the same loop in float32 differs by."""
    truth, single = (plain_training(root, dtype) for dtype in (torch.float64, torch.float32))
    unit = np.maximum(np.abs(single / truth - 1).max(0), np.finfo(np.float32).eps)
    found = np.array(results.curve("pre_still"))
    assert (np.abs(found / truth - 1) <= FACTOR * unit).all(), (found / truth - 1, unit)


@pytest.mark.parametrize("job", BOTH)
def test_both_engines_take_the_same_steps(results, by_the_pytorch_engine, job):
    ours, theirs = by_the_pytorch_engine(job), results[job]["metrics"]
    numbers = ("loss", "loss_token", "loss_sample", "lr", "grad_norm")
    assert of_kind(theirs, "train", *numbers) == pytest.approx(of_kind(ours, "train", *numbers), rel=1e-5)
    counts = ("step", "trained_tokens", "conversations", "tokens", "epoch")
    assert of_kind(theirs, "train", *counts).tolist() == of_kind(ours, "train", *counts).tolist()
    held = [of_kind(metrics, "valid", "step", "loss_token", "loss_sample")[-1] for metrics in (theirs, ours)]
    assert held[0] == pytest.approx(held[1], rel=1e-5)


@pytest.mark.parametrize("job", PARALLEL)
def test_every_layout_trains_the_same_model(results, root, job):
    assert np.array(results.curve(job)) == pytest.approx(np.array(results.curve("pre")), rel=5e-6)
    found = audit(root / "pre" / "model", root / job / "model")
    assert not found.missing and not found.extra and max(found.differing.values(), default=0) < 1e-4, found


@pytest.mark.long
@pytest.mark.parametrize("job, alone", [("pre_lengths_cp", "pre_lengths"), ("pre_grown_dp", "pre_grown")])
def test_lengths_and_growing_batches_do_not_depend_on_the_layout(results, job, alone):
    assert np.array(results.curve(job)) == pytest.approx(np.array(results.curve(alone)), rel=5e-6)


def test_steps_are_as_long_and_as_large_as_asked(results):
    assert [line["conversations"] for line in results.lines("pre_lengths")] == [4, 16, 4, 16]
    assert [line["tokens"] for line in results.lines("pre_grown")] == [128, 128, 256, 256]


@pytest.mark.long
def test_documents_of_a_row_are_told_apart(results):
    assert abs(results.curve("pre_read_on")[0][0] - results.curve("pre_reset")[0][0]) > 1e-4
    assert results.curve("pre_read_on")[0] == pytest.approx(results.curve("pre")[0], rel=1e-6)


def test_a_batch_does_not_grow_unless_megatron_is_told(results):
    """It reads on with the full batch, and comes to the end of the samples before the end of the steps."""
    found = dict.get(results, "pre_never_grown") or results["pre_never_grown"]  # the latter skips where the job was not chosen
    assert found["error"].startswith("StopIteration")


def test_a_stopped_pretraining_goes_on_as_the_same_one(results, root):
    exact = [[{n: v for n, v in line.items() if n != "seconds"} for line in results.lines(job)] for job in ("pre_whole", "pre_rest")]
    assert exact[0] == exact[1] and len(exact[0]) == 5
    assert results["pre_part"]["metrics"][-1] == {"kind": "paused", "step": 2}
    assert audit(root / "pre_whole" / "model", root / "pre_resumed" / "model").ok
    before, after = (json.loads((root / "pre_whole" / f"evaluation_{name}.json").read_text()) for name in ("before", "after"))
    lines = results.lines("pre_whole", "valid")
    assert [line["step"] for line in lines] == [0, 3, 5] and "bits_per_byte" in after
    for line, found in ((lines[0], before), (lines[-1], after)):
        assert line["loss_token"] == pytest.approx(found["loss_token"], rel=1e-5)
    assert len(PHASES) == 2, "the job that is stopped reads two phases"


def test_a_run_that_goes_on_keeps_its_length(results, root):
    from nemotron_nb.core import UserError
    from nemotron_nb.megatron.pretrain import PLACE, check_place

    assert results["pre_whole"]
    config = from_mapping(TrainConfig, {"data_dir": "d", "output_dir": str(root / "pre_whole")})
    place = json.loads((root / "pre_whole" / PLACE).read_text())
    check_place(config, place)
    with pytest.raises(UserError, match="samples 20, here 24"):
        check_place(config, place | {"samples": 24})


def weights_of(folder):
    """Name -> float64 tensor of all files of a model."""
    return {name: tensor.double() for path in Path(folder).glob("*.safetensors") for name, tensor in load_file(path).items()}


def test_the_mean_of_checkpoints_is_that_of_their_exports_in_float64(results, root):
    """Two ranks that share each matrix; each checkpoint is exported by a process of its own, and the mean taken by hand."""
    steps = (2, 4, 5)
    parts = [weights_of(results[f"mean_{step}"]["folder"]) for step in steps]
    mean, last = (weights_of(root / "pre_mean" / name) for name in ("model_averaged", "model"))
    assert set(mean) == set(last) == set(parts[0]) and all(torch.equal(parts[-1][name], last[name]) for name in last)
    for name in mean:
        assert torch.equal(mean[name].float(), ((parts[0][name] + parts[1][name] + parts[2][name]) / 3).float()), name
    assert any(not torch.equal(mean[name], last[name]) for name in mean if name.endswith("e_score_correction_bias"))


def test_the_mean_is_looked_at_and_the_run_still_ends_with_its_own_model(results, root):
    folder = root / "pre_mean"
    after, mean = (json.loads((folder / f"evaluation_{name}.json").read_text()) for name in ("after", "averaged"))
    assert mean["averaged"] == [2, 4, 5] and mean["step"] == 5
    rows = held_out_samples(DocumentsManifest.load(f"{root}/documents"), DatasetSection(LENGTH, valid_samples=2))
    model = model_in_float64(folder / "model_averaged").eval()
    with torch.no_grad():
        nll = [F.cross_entropy(model(torch.from_numpy(row.tokens)[None].long(), use_cache=False).logits[0], torch.from_numpy(row.labels).long(), reduction="none") for row in rows]
    truth = torch.cat(nll).mean().item()
    assert mean["loss_token"] == pytest.approx(truth, rel=1e-5) and abs(after["loss_token"] / truth - 1) > 1e-4
    assert results.lines("pre_mean", "valid")[-1]["loss_token"] == pytest.approx(after["loss_token"], rel=1e-5)


def test_a_training_goes_on_from_the_mean(results, root):
    model, x = model_in_float64(root / "pre_mean" / "model_averaged"), samples_of(root, 0)
    loss = F.cross_entropy(model(x[:, :-1], use_cache=False).logits.flatten(0, 1), x[:, 1:].flatten()).item()
    assert results.curve("pre_mean_on")[0][0] == pytest.approx(loss, rel=1e-5) and abs(results.curve("pre")[0][0] / loss - 1) > 1e-3


def test_the_recipe_of_super_pretrains(results, root):
    half, full = results.curve("pre_super"), results.curve("pre")
    assert half[0][0] != full[0][0] and half[0][0] == pytest.approx(full[0][0], rel=1e-3)


@pytest.mark.long
def test_further_predictions_are_pretrained(results, root):
    assert results.curve("pre_mtp")[0][1] > 0
    assert any(name.startswith("mtp.") for name in audit(root / "model_mtp", root / "pre_mtp" / "model").differing)


@pytest.mark.long
def test_a_model_that_is_named_begins_at_random(results, root):
    """Its sizes count, and its weights do not."""
    loss, other = results.curve("pre_random")[0][0], results.curve("pre")[0][0]
    assert abs(loss - other) > 1e-3 and abs(loss - math.log(4096)) < 0.5
    assert not audit(root / "model", root / "pre_random" / "model").missing
