"""The real Megatron-Bridge on a CPU: its reader, its training with our step, and what goes wrong without our fixes."""

import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import jobs
from transformers import NemotronHForCausalLM

from nemotron_nb.core import from_mapping
from nemotron_nb.data.shards import read_packs
from nemotron_nb.loss.two_stage import loss_by_hand
from nemotron_nb.train.batches import global_batch, rows_of
from nemotron_nb.train.evaluate import held_out_loss
from nemotron_nb.megatron.data import bridge_batch
from nemotron_nb.train.release import audit, shapes
from nemotron_nb.megatron.names import ASSET
from nemotron_nb.train.settings import TrainConfig
from nemotron_nb.train.torch_engine import train

PARALLEL = ("dp", "tp_sp", "pp", "ep", "padded", "cp")


def hugging_face_model(folder):
    return NemotronHForCausalLM.from_pretrained(folder, dtype=torch.float32, use_mamba_kernels=False, experts_implementation="eager")


@pytest.mark.parametrize(
    "job, data, options",
    [
        ("collate", "plain", {"pad_seq_to_mult": 1}),
        ("collate_short", "plain", {"pad_seq_to_mult": 1, "pad_to_max_length": False}),
        ("collate_padded", "padded", {"pad_seq_to_mult": 4}),
        ("collate_ended", "padded", {"pad_seq_to_mult": 4}),
    ],
)
def test_the_real_reader_gives_what_we_predict(results, root, job, data, options):
    packs, found = read_packs(root / data / "splits" / "train"), results[job]
    assert len(found["batches"]) == len(packs) - 1
    for batch, chosen in zip(found["batches"], [packs[:2], *([p] for p in packs[2:])], strict=True):
        ours = bridge_batch(chosen, pack_size=256, eos_id=found["eos_id"], **options)
        for name in ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens_q", "max_seqlen_q", "cu_seqlens_q_padded"):
            predicted = getattr(ours, name)
            assert (None if predicted is None else predicted.tolist()) == batch.get(name), name
        assert batch["token_count"] == list(ours.token_count)
        assert batch["cu_seqlens_kv"] == batch["cu_seqlens_q"] and batch["max_seqlen_kv"] == batch["max_seqlen_q"]


def test_the_reader_truncates_weights_and_strikes_out_predictions(results, root):
    assert results["collate"]["sum_of_float_mask"] == 0
    trained = sum(int(p.loss_mask.sum()) for p in read_packs(root / "padded" / "splits" / "train"))
    kept = {job: int(sum(np.sum(b["loss_mask"]) for b in results[job]["batches"])) for job in ("collate_padded", "collate_ended")}
    assert kept["collate_padded"] == trained > kept["collate_ended"]


@cache
def by_hand(root, stage):
    """Loss and gradient norm of the first step in float64: each conversation alone in plain PyTorch, the loop over conversations."""
    model, nll, mask, owner = hugging_face_model(f"{root}/model").double(), [], [], []
    for row in (r for p in read_packs(f"{root}/plain/splits/train") for r in rows_of(p)):
        logits = model(input_ids=torch.from_numpy(row.tokens)[None], use_cache=False).logits[0]
        nll.append(torch.nn.functional.cross_entropy(logits, torch.from_numpy(row.labels), reduction="none"))
        mask.append(torch.from_numpy(row.mask)), owner.append(torch.full((len(row),), len(owner)))
    loss = loss_by_hand(torch.cat(nll), torch.cat(mask), torch.cat(owner), stage)
    loss.backward()
    return loss.item(), math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None))


@pytest.fixture(scope="module")
def by_the_pytorch_engine(root):
    """The metrics of the PyTorch engine with the settings of a job."""

    @cache
    def train_as(name):
        job = next(job for job in jobs(root) if job["name"] == name)
        shared = {"data_dir": job["data_dir"], "output_dir": f"{root}/torch_{name}", "model": {"name": job["model"]}, "train": {"train_iters": job["steps"], "global_batch_size": job["batch"]}}
        shared |= {"optimizer": {"lr": 1e-3, "weight_decay": 0.0}, "loss": {"stages": job["stages"]}, "evaluation": {"num_generations": 0}}
        for section, values in job.get("shared", {}).items():
            shared[section] = shared.get(section, {}) | values
        train(from_mapping(TrainConfig, shared, name))
        return [json.loads(line) for line in Path(shared["output_dir"], "metrics.jsonl").read_text().splitlines()]

    return train_as


def of_kind(metrics, kind, *names):
    return np.array([[line[n] for n in names] for line in metrics if line["kind"] == kind])


@pytest.mark.parametrize("stage", ["token", "sample"])
def test_one_process_agrees_with_float64_on_unpacked_conversations(results, root, stage):
    loss, norm = results.curve(f"{stage}_still")[0]
    assert (loss, norm) == pytest.approx(by_hand(root, stage), rel=2e-6)


@pytest.mark.parametrize("job", ["token_still", "sample_still", "whole", "mtp_token"])
def test_both_engines_take_the_same_steps(results, by_the_pytorch_engine, job):
    ours, theirs = by_the_pytorch_engine(job), results[job]["metrics"]
    numbers = ("loss", "loss_token", "loss_sample", "lr", "grad_norm")
    assert of_kind(theirs, "train", *numbers) == pytest.approx(of_kind(ours, "train", *numbers), rel=1e-5)
    counts = ("step", "trained_tokens", "conversations", "tokens", "epoch")
    assert of_kind(theirs, "train", *counts).tolist() == of_kind(ours, "train", *counts).tolist()
    last = [of_kind(metrics, "valid", "step", "loss_token", "loss_sample")[-1] for metrics in (theirs, ours)]
    assert last[0] == pytest.approx(last[1], rel=1e-5)


def test_the_tiny_model_begins_as_in_the_pytorch_engine(results, by_the_pytorch_engine, root):
    ours = by_the_pytorch_engine("tiny")
    assert of_kind(results["tiny"]["metrics"], "train", "loss", "grad_norm") == pytest.approx(of_kind(ours, "train", "loss", "grad_norm"), rel=1e-5)
    starts = [next(line for line in metrics if line["kind"] == "start") for metrics in (ours, results["tiny"]["metrics"])]
    assert starts[0]["parameters"] == starts[1]["parameters"]
    assert "stand-ins" in starts[1]["engine"]


def test_routers_are_balanced_as_the_recipe_says(results):
    assert results.curve("sample")[0] == results.curve("sample_still")[0]
    assert results.curve("sample")[1] != results.curve("sample_still")[1]


@pytest.mark.parametrize("job", PARALLEL)
def test_parallel_layouts_take_the_same_steps(results, job):
    assert np.array(results.curve(job)) == pytest.approx(np.array(results.curve("sample")), rel=5e-6)
    names = ("trained_tokens", "conversations", "lr")
    assert [[line[n] for n in names] for line in results.lines(job)] == [[line[n] for n in names] for line in results.lines("sample")]


def test_four_processes(results):
    assert results.curve("dp_tp_sp")[0] == pytest.approx(results.curve("sample")[0], rel=5e-6)


def test_stages_switch_where_the_schedule_says(results):
    lines = results.lines("whole")
    assert [line["stage"] for line in lines] == ["token"] * 3 + ["sample"] * 2
    assert all(line["loss"] == line[f"loss_{line['stage']}"] for line in lines)
    assert all(abs(line["loss_token"] - line["loss_sample"]) > 1e-6 for line in lines)


def test_a_stopped_run_goes_on_as_the_same_run(results, root):
    exact = [[{n: v for n, v in line.items() if n != "seconds"} for line in results.lines(job)] for job in ("whole", "rest")]
    assert exact[0] == exact[1]
    assert [(line["kind"], line.get("step")) for line in results["part"]["metrics"]] == [("start", None), ("valid", 0), ("train", 1), ("train", 2), ("paused", 2)]
    seam = [(line["kind"], line.get("step"), line.get("attempt")) for line in results["rest"]["metrics"]]
    assert seam[4:7] == [("paused", 2, None), ("resume", 2, 2), ("train", 3, None)]
    assert [kind for kind, *_ in seam[7:]] == ["train", "train", "valid", "end"]
    assert audit(root / "whole" / "model", root / "resumed" / "model").ok


def test_the_model_is_looked_at_before_and_after(results, root):
    before, after = (json.loads((root / "whole" / f"evaluation_{name}.json").read_text()) for name in ("before", "after"))
    assert (before["step"], after["step"], after["num_generations"]) == (0, 5, 2)
    first, last = results.lines("whole", "valid")
    for line, found in ((first, before), (last, after)):
        assert (line["step"], line["loss_token"], line["loss_sample"]) == (found["step"], pytest.approx(found["loss_token"], rel=1e-5), pytest.approx(found["loss_sample"], rel=1e-5))


@pytest.mark.parametrize("job", PARALLEL)
def test_every_layout_writes_the_same_model(results, root, job):
    assert results.lines(job)
    found = audit(root / "sample" / "model", root / job / "model")
    assert not found.missing and not found.extra and max(found.differing.values(), default=0) < 1e-4, found


def test_names_are_those_of_the_installed_version(results):
    assert results["names"]["text"] == ASSET.read_text(), "write the list anew with nemotron_nb.megatron.names.write_names"


def test_the_recipe_of_super_trains_in_bfloat16(results):
    (half,), (full, _) = results.lines("super_bf16"), results.lines("sample_still")
    assert half["loss"] != full["loss"] and half["loss"] == pytest.approx(full["loss"], rel=1e-3)


def test_a_checkpoint_passes_through_autobridge(results, root):
    gaps = results["round_trip"]  # of logits, from those of the checkpoint in float64
    assert gaps["megatron"] < 1e-6 * gaps["scale"] and gaps["megatron in float64"] < 5e-7 * gaps["scale"]
    found = audit(root / "model", root / "exported")
    assert found.ok and found.equal > 40, found


def test_a_trained_model_says_the_same_in_transformers(results, root):
    found, (valid,) = held_out_loss(hugging_face_model(results["export"]["folder"]), read_packs(root / "plain" / "splits" / "valid"), 8192, "sequence"), results.lines("sample_still", "valid")
    assert (found.loss_token, found.loss_sample) == pytest.approx((valid["loss_token"], valid["loss_sample"]), rel=1e-5)
    change = audit(root / "model", root / "trained")
    assert not change.missing and not change.extra and len(change.differing) > 30


def test_lora_begins_as_the_model_it_is_put_on(results):
    for job in ("lora", "lora_by_recipe"):
        loss, norm = results.curve(job)[0]
        assert loss == pytest.approx(results.curve("sample")[0][0], rel=1e-6) and 0 < norm < results.curve("sample")[0][1]


def test_adapters_leave_in_the_form_of_peft(results, root):
    ids, peft = torch.arange(20, 90)[None], pytest.importorskip("peft")
    with torch.no_grad():
        base, merged = (hugging_face_model(root / folder)(ids, use_cache=False).logits for folder in ("model", "lora/model"))
        adapted = peft.PeftModel.from_pretrained(hugging_face_model(root / "model"), root / "lora" / "adapter")(ids, use_cache=False).logits
    assert (adapted - merged).abs().max() < 1e-5 < 1e-3 < (adapted - base).abs().max()


def test_further_predictions_pass_through_the_bridge(results, root):
    change = audit(root / "model_mtp", root / "mtp" / "model")
    assert shapes(root / "model_mtp") == shapes(root / "mtp" / "model")
    assert sum(name.startswith("mtp.") for name in change.differing) > 10


def test_counts_are_those_of_the_data(results, root):
    packs = read_packs(root / "plain" / "splits" / "train")
    batch = global_batch(packs)
    line = results.lines("sample")[0]
    assert (line["trained_tokens"], line["conversations"]) == (batch.denominators.tokens, batch.denominators.conversations)
    assert line["tokens"] == sum(len(r) for p in packs for r in rows_of(p))


def test_state_leaks_if_mamba_layers_are_not_told_of_borders(results):
    assert abs(results.curve("leak")[0][0] - results.curve("sample")[0][0]) > 1e-4


def test_a_row_that_every_context_rank_counts_halves_the_loss(results):
    (_, norm), (_, right) = results.curve("counted_twice")[0], results.curve("sample")[0]
    assert norm == pytest.approx(right / 2, rel=1e-5)


def test_balancing_loss_is_not_inflated_in_the_sample_stage(results):
    without, balanced, inflated = (results.curve(job)[0][1] for job in ("sample", "aux", "aux_one"))
    assert abs(inflated - without) > 20 * abs(balanced - without) > 0


@pytest.mark.parametrize("job", ["mtp_dp", "mtp_tp_sp"])
def test_further_predictions_do_not_depend_on_the_layout(results, job):
    assert results.curve(job)[0] == pytest.approx(results.curve("mtp")[0], rel=5e-6)


def test_further_predictions_under_context_parallelism_differ_by_megatrons_own_scale_only(results):
    """Megatron multiplies a depth by (tokens before rolling) / (after), counted in the slice of a rank."""
    (loss, norm), (right_loss, right_norm) = results.curve("mtp_cp")[0], results.curve("mtp")[0]
    assert loss == pytest.approx(right_loss, rel=5e-6) and norm == pytest.approx(right_norm, rel=2e-3)
    assert results.curve("mtp_unscaled_cp")[0] == pytest.approx(results.curve("mtp_unscaled")[0], rel=5e-6)


def test_prompts_are_not_trained_by_further_predictions(results):
    assert results.curve("mtp_poisoned") == results.curve("mtp")
    stock, poisoned = results.curve("mtp_stock")[0], results.curve("mtp_stock_poisoned")[0]
    assert stock[0] == poisoned[0] == results.curve("mtp")[0][0]
    assert abs(stock[1] - poisoned[1]) > 1e-2 < abs(stock[1] - results.curve("mtp")[0][1])


def test_targets_of_further_predictions_lie_where_the_tokens_lie(results):
    assert results.curve("mtp_ended_claimed")[0] == pytest.approx(results.curve("mtp_ended")[0], rel=1e-6)
    assert abs(results.curve("mtp_ended_logical")[0][1] - results.curve("mtp_ended")[0][1]) > 1e-4


def test_the_report_can_read_the_metrics(results):
    for kind, names in {"start": ("packs", "rows_per_step", "plan"), "train": ("step", "stage", "loss", "loss_token", "loss_sample", "lr", "grad_norm", "tokens", "trained_tokens", "conversations", "seconds"), "valid": ("step", "loss_token", "loss_sample"), "end": ("steps", "seconds")}.items():
        (first, *_) = results.lines("sample", kind)
        assert set(names) <= set(first)
