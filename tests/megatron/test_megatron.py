"""The real Megatron-Bridge on a CPU: its reader, its training with our step, and what goes wrong without our fixes."""

import json
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import jobs
from precision import EXACT, FACTOR, assert_same_curve, curve_units, exact, float_errors, in_double, logits_error, mean_loss_gap
from transformers import NemotronHForCausalLM

from nemotron_nb.core import from_mapping
from nemotron_nb.data.shards import read_packs
from nemotron_nb.loss.two_stage import loss_by_hand
from nemotron_nb.train.batches import global_batch, rows_of
from nemotron_nb.train.evaluate import held_out_loss
from nemotron_nb.megatron.data import bridge_batch
from nemotron_nb.train.release import audit, shapes
from nemotron_nb.megatron.names import ASSET
from nemotron_nb.train.scan import use_chunked_scan
from nemotron_nb.train.settings import TrainConfig
from nemotron_nb.train.torch_engine import train

PARALLEL = ("dp", "tp_sp", "pp", "ep", "padded", "cp")
NUMBERS = ("loss", "loss_token", "loss_sample", "grad_norm")  # of a step, that rounding decides


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


def by_hand(model, root, stage):
    """Loss and gradient norm of the first step: each conversation alone in plain PyTorch, the loop over conversations."""
    nll, mask, owner = [], [], []
    for row in (r for p in read_packs(f"{root}/plain/splits/train") for r in rows_of(p)):
        logits = model(input_ids=torch.from_numpy(row.tokens)[None], use_cache=False).logits[0]
        nll.append(torch.nn.functional.cross_entropy(logits, torch.from_numpy(row.labels), reduction="none"))
        mask.append(torch.from_numpy(row.mask)), owner.append(torch.full((len(row),), len(owner)))
    loss = loss_by_hand(torch.cat(nll), torch.cat(mask), torch.cat(owner), stage)
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [loss, torch.stack([g.norm() for g in found if g is not None]).norm()]


@pytest.fixture(scope="module")
def by_the_pytorch_engine(root):
    """The metrics of the PyTorch engine with the settings of a job, in float32 or in float64."""

    @cache
    def train_as(name, double):
        job = next(job for job in jobs(root) if job["name"] == name)
        shared = {"data_dir": job["data_dir"], "output_dir": f"{root}/torch_{name}{'_double' * double}", "model": {"name": job["model"]}, "train": {"train_iters": job["steps"], "global_batch_size": job["batch"]}}
        shared |= {"optimizer": {"lr": 1e-3, "weight_decay": 0.0}, "loss": {"stages": job["stages"]}, "evaluation": {"num_generations": 0}}
        for section, values in job.get("shared", {}).items():
            shared[section] = shared.get(section, {}) | values
        with in_double() if double else nullcontext():
            train(from_mapping(TrainConfig, shared, name))
        return [json.loads(line) for line in Path(shared["output_dir"], "metrics.jsonl").read_text().splitlines()]

    return lambda name, double=False: train_as(name, double)


@pytest.fixture(scope="module")
def units(by_the_pytorch_engine):
    """How far, relative, float32 strays from float64 in the numbers of a job, on this machine and in the PyTorch engine."""

    @cache
    def units_of(name, kind="train", numbers=NUMBERS):
        plain, truth = ([line for line in by_the_pytorch_engine(name, double) if line["kind"] == kind] for double in (False, True))
        return curve_units(truth, [plain], numbers)

    return units_of


def clearly(right, unit):
    """What differs from this by more than ten times what rounding allows is another number."""
    return pytest.approx(right, rel=10 * FACTOR * unit)


def lines_of(metrics, kind="train"):
    return [line for line in metrics if line["kind"] == kind]


def of_kind(metrics, kind, *names):
    return np.array([[line[n] for n in names] for line in metrics if line["kind"] == kind])


@pytest.mark.parametrize("stage", ["token", "sample"])
def test_one_process_agrees_with_float64_on_unpacked_conversations(results, root, stage):
    with exact():
        model = use_chunked_scan(hugging_face_model(f"{root}/model"))
        allowed = float_errors(lambda m: by_hand(m, root, stage), model)
        right = by_hand(model.double(), root, stage)
    for got, want, unit in zip(results.curve(f"{stage}_still")[0], right, allowed, strict=True):
        assert got == pytest.approx(want.item(), abs=FACTOR * unit)


@pytest.mark.parametrize("job", ["token_still", "sample_still", "whole", "mtp_token"])
def test_both_engines_take_the_same_steps(results, by_the_pytorch_engine, units, job):
    ours, theirs = by_the_pytorch_engine(job), results[job]["metrics"]
    assert_same_curve(lines_of(theirs), lines_of(ours), units(job))
    assert of_kind(theirs, "train", "lr") == pytest.approx(of_kind(ours, "train", "lr"), rel=EXACT)
    counts = ("step", "trained_tokens", "conversations", "tokens", "epoch")
    assert of_kind(theirs, "train", *counts).tolist() == of_kind(ours, "train", *counts).tolist()
    last = [lines_of(metrics, "valid")[-1:] for metrics in (theirs, ours)]
    assert_same_curve(*last, units(job, "valid", NUMBERS[1:3]))
    assert last[0][0]["step"] == last[1][0]["step"]


def test_the_tiny_model_begins_as_in_the_pytorch_engine(results, by_the_pytorch_engine, units, root):
    ours = by_the_pytorch_engine("tiny")
    assert_same_curve(results.lines("tiny"), lines_of(ours), units("tiny"))
    starts = [next(line for line in metrics if line["kind"] == "start") for metrics in (ours, results["tiny"]["metrics"])]
    assert starts[0]["parameters"] == starts[1]["parameters"]
    assert "stand-ins" in starts[1]["engine"]


def test_routers_are_balanced_as_the_recipe_says(results):
    assert results.curve("sample")[0] == results.curve("sample_still")[0]
    assert results.curve("sample")[1] != results.curve("sample_still")[1]


@pytest.mark.parametrize("job", PARALLEL)
def test_parallel_layouts_take_the_same_steps(results, units, job):
    assert_same_curve(results.lines(job), results.lines("sample"), units("sample"))
    names = ("trained_tokens", "conversations", "lr")
    assert [[line[n] for n in names] for line in results.lines(job)] == [[line[n] for n in names] for line in results.lines("sample")]


def test_four_processes(results, units):
    assert_same_curve(results.lines("dp_tp_sp"), results.lines("sample")[:1], units("sample"))


def test_stages_switch_where_the_schedule_says(results, units):
    lines = results.lines("whole")
    assert [line["stage"] for line in lines] == ["token"] * 3 + ["sample"] * 2
    assert all(line["loss"] == line[f"loss_{line['stage']}"] for line in lines)
    assert all(line["loss_token"] != clearly(line["loss_sample"], units("whole")["loss"]) for line in lines)


def test_a_stopped_run_goes_on_as_the_same_run(results, root):
    exact = [[{n: v for n, v in line.items() if n != "seconds"} for line in results.lines(job)] for job in ("whole", "rest")]
    assert exact[0] == exact[1]
    assert [(line["kind"], line.get("step")) for line in results["part"]["metrics"]] == [("start", None), ("valid", 0), ("train", 1), ("train", 2), ("paused", 2)]
    seam = [(line["kind"], line.get("step"), line.get("attempt")) for line in results["rest"]["metrics"]]
    assert seam[4:7] == [("paused", 2, None), ("resume", 2, 2), ("train", 3, None)]
    assert [kind for kind, *_ in seam[7:]] == ["train", "train", "valid", "end"]
    assert audit(root / "whole" / "model", root / "resumed" / "model").ok


def test_the_model_is_looked_at_before_and_after(results, root, units):
    before, after = (json.loads((root / "whole" / f"evaluation_{name}.json").read_text()) for name in ("before", "after"))
    assert (before["step"], after["step"], after["num_generations"]) == (0, 5, 2)
    first, last = results.lines("whole", "valid")
    assert_same_curve((before, after), (first, last), units("whole", "valid", NUMBERS[1:3]))
    assert [line["step"] for line in (first, last)] == [0, 5]


@pytest.fixture(scope="module")
def weights_unit(by_the_pytorch_engine, root):
    """How far the weights of a training in float32 stray from those of the same in float64."""
    assert by_the_pytorch_engine("sample") and by_the_pytorch_engine("sample", True)
    return max(audit(root / "torch_sample" / "model", root / "torch_sample_double" / "model").differing.values())


@pytest.mark.parametrize("job", PARALLEL)
def test_every_layout_writes_the_same_model(results, root, weights_unit, job):
    assert results.lines(job)
    found = audit(root / "sample" / "model", root / job / "model")
    assert not found.missing and not found.extra and max(found.differing.values(), default=0) <= FACTOR * weights_unit, found


def test_names_are_those_of_the_installed_version(results):
    assert results["names"]["text"] == ASSET.read_text(), "write the list anew with nemotron_nb.megatron.names.write_names"


def test_the_recipe_of_super_trains_in_bfloat16(results):
    (half,), (full, _) = results.lines("super_bf16"), results.lines("sample_still")
    assert half["loss"] != full["loss"] and half["loss"] == pytest.approx(full["loss"], rel=torch.finfo(torch.bfloat16).eps)


def test_a_checkpoint_passes_through_autobridge(results, root):
    gaps = results["round_trip"]  # of logits, from those of the checkpoint in float64
    assert gaps["megatron"] <= FACTOR * gaps["transformers"] and gaps["megatron in float64"] <= gaps["transformers"], gaps
    found = audit(root / "model", root / "exported")
    assert found.ok and found.equal > 40, found


def test_a_trained_model_says_the_same_in_transformers(results, root):
    model, packs = hugging_face_model(results["export"]["folder"]), read_packs(root / "plain" / "splits" / "valid")
    found, (valid,) = held_out_loss(model, packs, 8192, "sequence"), results.lines("sample_still", "valid")
    assert (found.loss_token, found.loss_sample) == pytest.approx((valid["loss_token"], valid["loss_sample"]), abs=mean_loss_gap(model, packs))
    change = audit(root / "model", root / "trained")
    assert not change.missing and not change.extra and len(change.differing) > 30


def test_lora_begins_as_the_model_it_is_put_on(results, units):
    for job in ("lora", "lora_by_recipe"):
        loss, norm = results.curve(job)[0]
        assert loss == pytest.approx(results.curve("sample")[0][0], rel=FACTOR * units("sample")["loss"]) and 0 < norm < results.curve("sample")[0][1]


def test_adapters_leave_in_the_form_of_peft(results, root):
    ids, peft = torch.arange(20, 90)[None], pytest.importorskip("peft")
    with torch.no_grad():
        base, merged = (hugging_face_model(root / folder)(ids, use_cache=False).logits for folder in ("model", "lora/model"))
        adapted = peft.PeftModel.from_pretrained(hugging_face_model(root / "model"), root / "lora" / "adapter")(ids, use_cache=False).logits
    allowed = FACTOR * logits_error(hugging_face_model(root / "lora" / "model"), ids)
    assert (adapted - merged).abs().max() <= allowed < 1e-2 * (adapted - base).abs().max()


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


def test_state_leaks_if_mamba_layers_are_not_told_of_borders(results, units):
    assert results.curve("leak")[0][0] != clearly(results.curve("sample")[0][0], units("sample")["loss"])


def test_a_row_that_every_context_rank_counts_halves_the_loss(results, units):
    (_, norm), (_, right) = results.curve("counted_twice")[0], results.curve("sample")[0]
    assert norm == pytest.approx(right / 2, rel=FACTOR * units("sample")["grad_norm"])


def test_balancing_loss_is_not_inflated_in_the_sample_stage(results):
    without, balanced, inflated = (results.curve(job)[0][1] for job in ("sample", "aux", "aux_one"))
    assert abs(inflated - without) > 20 * abs(balanced - without) > 0


@pytest.mark.parametrize("job", ["mtp_dp", "mtp_tp_sp"])
def test_further_predictions_do_not_depend_on_the_layout(results, units, job):
    assert_same_curve(results.lines(job), results.lines("mtp"), units("mtp"))


def test_further_predictions_under_context_parallelism_differ_by_megatrons_own_scale_only(results, units):
    """Megatron multiplies a depth by (tokens before rolling) / (after), counted in the slice of a rank."""
    (loss, norm), (right_loss, right_norm) = results.curve("mtp_cp")[0], results.curve("mtp")[0]
    assert loss == pytest.approx(right_loss, rel=FACTOR * units("mtp")["loss"]) and norm == pytest.approx(right_norm, rel=2e-3)
    assert_same_curve(results.lines("mtp_unscaled_cp"), results.lines("mtp_unscaled"), units("mtp"))


def test_prompts_are_not_trained_by_further_predictions(results):
    assert results.curve("mtp_poisoned") == results.curve("mtp")
    stock, poisoned = results.curve("mtp_stock")[0], results.curve("mtp_stock_poisoned")[0]
    assert stock[0] == poisoned[0] == results.curve("mtp")[0][0]
    assert abs(stock[1] - poisoned[1]) > 1e-2 < abs(stock[1] - results.curve("mtp")[0][1])


def test_targets_of_further_predictions_lie_where_the_tokens_lie(results, units):
    assert_same_curve(results.lines("mtp_ended_claimed"), results.lines("mtp_ended"), units("mtp"))
    assert results.curve("mtp_ended_logical")[0][1] != clearly(results.curve("mtp_ended")[0][1], units("mtp")["grad_norm"])


def test_the_report_can_read_the_metrics(results):
    for kind, names in {"start": ("packs", "rows_per_step", "plan"), "train": ("step", "stage", "loss", "loss_token", "loss_sample", "lr", "grad_norm", "tokens", "trained_tokens", "conversations", "seconds"), "valid": ("step", "loss_token", "loss_sample"), "end": ("steps", "seconds")}.items():
        (first, *_) = results.lines("sample", kind)
        assert set(names) <= set(first)
