"""The real Megatron-Bridge on a CPU: its reader, its training with our step, and what goes wrong without our fixes."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from transformers import NemotronHForCausalLM

from nemotron_nb.data.shards import read_packs
from nemotron_nb.loss.schedule import Phase
from nemotron_nb.loss.two_stage import loss_by_hand
from nemotron_nb.train.batches import global_batch, rows_of
from nemotron_nb.train.evaluate import held_out_loss
from nemotron_nb.train.megatron_data import bridge_batch
from nemotron_nb.train.megatron_models import audit
from nemotron_nb.train.settings import LossSection, OptimizerSection, TrainConfig, TrainSection
from nemotron_nb.train.torch_engine import make_optimizer, train_step

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


@cache
def by_the_pytorch_engine(root, stage):
    """(loss, gradient norm) of two steps."""
    config = TrainConfig("", "", train=TrainSection(train_iters=2, global_batch_size=10), optimizer=OptimizerSection(lr=1e-3, weight_decay=0.0), loss=LossSection([Phase(stage)]))
    model = hugging_face_model(f"{root}/model")
    optimizer, batch = make_optimizer(model, config.optimizer), global_batch(read_packs(f"{root}/plain/splits/train"))
    lines = [train_step(model, optimizer, batch, step, config) for step in range(2)]
    return [(line["loss"], line["grad_norm"]) for line in lines], held_out_loss(model, read_packs(f"{root}/plain/splits/valid"), 8192, "sequence")


@pytest.mark.parametrize("stage", ["token", "sample"])
def test_one_process_agrees_with_float64_on_unpacked_conversations(results, root, stage):
    loss, norm = results.curve(f"{stage}_still")[0]
    assert (loss, norm) == pytest.approx(by_hand(root, stage), rel=2e-6)


@pytest.mark.parametrize("stage", ["token", "sample"])
def test_both_engines_take_the_same_steps(results, root, stage):
    ours, held_out = by_the_pytorch_engine(root, stage)
    assert np.array(results.curve(f"{stage}_still")) == pytest.approx(np.array(ours), rel=1e-5)
    (valid,) = results.lines(f"{stage}_still", "valid")
    assert (valid["loss_token"], valid["loss_sample"]) == pytest.approx((held_out.loss_token, held_out.loss_sample), rel=1e-5)


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


def test_a_resumed_run_is_the_same_run(results):
    exact = [[{n: v for n, v in line.items() if n != "seconds"} for line in results.lines(job)] for job in ("whole", "rest")]
    assert exact[0] == exact[1]
    assert [line["step"] for line in results.lines("part")] == [1, 2]


def test_a_checkpoint_passes_through_autobridge(results, root):
    assert results["round_trip"]["logit_gap"] < 1e-5 * results["round_trip"]["scale"]
    found = audit(root / "model", root / "exported")
    assert found.ok and found.equal > 40, found


def test_a_trained_model_says_the_same_in_transformers(results, root):
    found, (valid,) = held_out_loss(hugging_face_model(results["export"]["folder"]), read_packs(root / "plain" / "splits" / "valid"), 8192, "sequence"), results.lines("sample_still", "valid")
    assert (found.loss_token, found.loss_sample) == pytest.approx((valid["loss_token"], valid["loss_sample"]), rel=1e-5)
    change = audit(root / "model", root / "trained")
    assert not change.missing and not change.extra and len(change.differing) > 30


def test_lora_begins_as_the_model_it_is_put_on(results):
    (loss, norm), _ = results.curve("lora")
    assert loss == pytest.approx(results.curve("sample")[0][0], rel=1e-6) and 0 < norm < results.curve("sample")[0][1]


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
    (loss, norm), (right_loss, right_norm) = results.curve("mtp_cp")[0], results.curve("mtp")[0]
    assert loss == pytest.approx(right_loss, rel=5e-6) and norm == pytest.approx(right_norm, rel=2e-3)


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
