"""The engine: one step against a hand-made one, stages, determinism, files, export, refusals."""

import copy
import dataclasses
import json
import math
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from forked import Forked
from precision import FACTOR, assert_as_exact, float_error, float_errors, logits_error, mean_loss_gap, near, sum_error
from precision import norm as norm_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemotron_nb.core import UserError, from_mapping
from nemotron_nb.data.pack import make_pack
from nemotron_nb.data.prep import PrepConfig, prepare, read_packs
from nemotron_nb.loss.mtp import mtp_loss_by_hand
from nemotron_nb.loss.schedule import Phase
from nemotron_nb.loss.two_stage import loss_by_hand
from nemotron_nb.train import preflight as checks, torch_engine
from nemotron_nb.train.__main__ import main, read_config
from nemotron_nb.train.router_balance import imbalance, move_biases
from nemotron_nb.train.batches import collate, global_batch, grouped, packs_of_step
from nemotron_nb.train.ending import StopSignals, lock_holder
from nemotron_nb.train.evaluate import held_out_loss
from nemotron_nb.train.anomalies import Guard
from nemotron_nb.train.objective import Learner, compile_layers, load_mtp, make_mtp
from nemotron_nb.train.lora import load_adapter
from nemotron_nb.train.model import build_model
from nemotron_nb.train.scan import use_chunked_scan
from nemotron_nb.train.settings import RANGES, CheckpointSection, DatasetSection, EvaluationSection, LossSection, ModelConfig, OptimizerSection, PeftSection, SchedulerSection, TrainConfig, TrainSection
from nemotron_nb.train.lr import learning_rate
from nemotron_nb.train.torch_engine import (
    MetricsFile,
    export_model,
    make_gradient,
    make_optimizer,
    metric_lines,
    train,
    train_step,
)

SMALL = {"hidden_size": 32, "mamba_heads": 2, "expert_size": 16, "experts": 4, "attention_heads": 2}


def config_of(data_dir="data", output_dir="out", **sections):
    return from_mapping(TrainConfig, {"data_dir": str(data_dir), "output_dir": str(output_dir), "model": SMALL} | sections)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "prepared"
    prepare(PrepConfig(output_dir=str(folder), sample=40, pack_size=1024, train_ratio=0.8, valid_ratio=0.1, test_ratio=0.1))
    return folder


def random_packs(seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for length, trained in ((30, 5), (70, 40), (41, 1), (9, 3)):
        mask = np.zeros(length, np.uint8)
        mask[-trained:] = 1
        made.append((rng.integers(1, 60, length), mask))
    return [make_pack([i for i, _ in made], [m for _, m in made], list("abcd"))], made


# ---- one step


def losses_by_hand(model, made):
    """Both means of unpacked conversations, one by one, from full logits."""
    nll = [F.cross_entropy(model(torch.from_numpy(i[:-1])[None]).logits[0].double(), torch.from_numpy(i[1:]), reduction="none") for i, _ in made]
    owner = torch.cat([torch.full((len(n),), k) for k, n in enumerate(nll)])
    mask = torch.cat([torch.from_numpy(m[1:]) for _, m in made])
    return {s: loss_by_hand(torch.cat(nll), mask, owner, s) for s in ("token", "sample")}


def gradient_by_hand(model, loss):
    """The gradients of all parameters in one row; zero where there is none."""
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(model.parameters(), found)])


@pytest.mark.parametrize("stage", ["token", "sample"])
@pytest.mark.parametrize("cap", [50, 5000])
def test_a_step_moves_the_weights_as_a_step_made_by_hand(stage, cap):
    packs, made = random_packs()
    config = config_of(train={"micro_batch_tokens": cap}, optimizer={"lr": 1e-3, "clip_grad": 0.7, "adam_eps": 1e-3}, loss={"stages": [{"stage": stage}]})
    ours, by_hand = (build_model(config.model, 60, seed=0).double() for _ in range(2))
    line = train_step(ours, make_optimizer(ours, config.optimizer), global_batch(packs), 0, config)

    means = losses_by_hand(by_hand, made)
    plain = build_model(config.model, 60, seed=0)  # norms of the library compute in float32, whatever the model's type: that sets the tolerance
    loss_unit = max(float_errors(lambda m: list(losses_by_hand(m, made).values()), plain))
    gradient_unit = float_error(lambda m: gradient_by_hand(m, losses_by_hand(m, made)[stage]), plain, measure=norm_of)
    means[stage].backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in by_hand.parameters() if p.grad is not None))
    for p in by_hand.parameters():
        if p.grad is None:
            continue
        g = p.grad * min(1.0, 0.7 / (norm + 1e-6))
        decay = 0.1 if p.ndim >= 2 else 0.0
        # First step of AdamW: both moments are bias-corrected to g and g^2.
        p.data = p.data * (1 - 1e-3 * decay) - 1e-3 * g / (g.abs() + 1e-3)

    assert line["loss"] == pytest.approx(means[stage].item(), abs=FACTOR * loss_unit)
    assert line["loss_token"] == pytest.approx(means["token"].item(), abs=FACTOR * loss_unit) and line["loss_sample"] == pytest.approx(means["sample"].item(), abs=FACTOR * loss_unit)
    assert abs(line["loss_token"] - line["loss_sample"]) > 1e-3
    assert line["grad_norm"] == pytest.approx(norm, abs=FACTOR * gradient_unit) and norm > 0.7, "the gradient is really clipped"
    assert (line["tokens"], line["trained_tokens"], line["conversations"], line["stage"], line["step"]) == (146, 49, 4, stage, 1)
    for (name, p), q in zip(ours.named_parameters(), by_hand.parameters()):
        assert near(p, q, gradient_unit), name  # lr over adam_eps is 1: a weight moves no further apart than its gradient


def test_a_second_step_starts_from_a_clean_gradient():
    packs, made = random_packs()
    config = config_of(optimizer={"lr": 1e-3})
    model = build_model(config.model, 60, seed=0)
    gradient_unit = float_error(lambda m: gradient_by_hand(m, losses_by_hand(m, made)["token"]), model, measure=norm_of)
    optimizer = make_optimizer(model, config.optimizer)
    train_step(model, optimizer, global_batch(packs), 0, config)
    fresh = build_model(config.model, 60, seed=1)
    fresh.load_state_dict(model.state_dict())
    again = [train_step(m, o, global_batch(packs), 1, config)["grad_norm"] for m, o in ((model, optimizer), (fresh, make_optimizer(fresh, config.optimizer)))]
    assert again[0] == pytest.approx(again[1], abs=FACTOR * gradient_unit)


def test_no_decay_on_norms_biases_and_scan_parameters():
    model = build_model(ModelConfig(**SMALL), 60)
    optimizer = make_optimizer(model, OptimizerSection(weight_decay=0.3))
    of = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(of) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        spared = any(part in name for part in ("norm", "bias", "A_log", ".D"))
        assert of[id(p)] == (0.0 if spared else 0.3), name


def test_learning_rate_by_hand():
    cosine = config_of(train={"train_iters": 20}, optimizer={"lr": 2.0}, scheduler={"lr_warmup_iters": 4, "lr_decay_style": "cosine", "min_lr": 0.5})
    expected = [0.5, 1.0, 1.5, *(0.5 + 1.5 * 0.5 * (1 + math.cos(math.pi * max(0, s - 4) / 16)) for s in range(3, 20))]
    assert [learning_rate(s, cosine) for s in range(20)] == pytest.approx(expected)
    samples = config_of(train={"global_batch_size": 64}, optimizer={"lr": 1e-5}, scheduler={"lr_warmup_samples": 30_000})
    assert learning_rate(233, samples) == pytest.approx(1e-5 * 234 / 468.75)
    assert learning_rate(468, samples) == learning_rate(99_999, samples) == 1e-5
    assert learning_rate(0, config_of(optimizer={"lr": 3e-4})) == 3e-4
    wsd = config_of(train={"train_iters": 10}, optimizer={"lr": 1.0}, scheduler={"lr_warmup_iters": 2, "lr_decay_style": "WSD", "lr_wsd_decay_iters": 4, "min_lr": 0.2})
    assert [learning_rate(s, wsd) for s in range(10)] == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4])


def test_a_loss_that_is_no_number_names_its_conversation_and_leaves_the_weights():
    model = build_model(ModelConfig(**SMALL), 60)
    optimizer = make_optimizer(model, OptimizerSection())
    ids = np.array([1, 2, 3, 4, 5, 6])
    packs = [make_pack([ids, ids + 10, ids + 20], [np.array([0, 0, 0, 0, 1, 1], np.uint8)] * 3, ["fine", "bad", "fine too"])]
    model.model.embeddings.weight.data[11] = math.nan  # read by the second conversation alone
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(UserError, match=r"conversations bad: the loss is nan in step 5"):
        train_step(model, optimizer, global_batch(packs), 4, config_of())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name], equal_nan=True, msg=name)


# ---- a training


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def training(data_dir, output_dir, **sections):
    common = {
        "train": {"train_iters": 9, "global_batch_size": 2, "micro_batch_tokens": 2048, "eval_interval": 4, "log_interval": 3},
        "optimizer": {"lr": 5e-3},
        "scheduler": {"lr_warmup_iters": 2},
        "loss": {"stages": [{"stage": "token", "steps": 5}, {"stage": "sample"}]},
        "evaluation": {"num_generations": 3, "max_new_tokens": 8},
    }
    return config_of(data_dir, output_dir, **(common | sections))


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    train(training(data_dir, output))
    return output


def test_what_is_written(trained, data_dir):
    assert sorted(p.name for p in trained.iterdir()) == ["checkpoints", "evaluation_after.json", "evaluation_before.json", "metrics.jsonl", "model"]
    lines = lines_of(trained)
    assert [line["kind"] for line in lines] == ["start", "valid", *["train"] * 4, "valid", *["train"] * 4, "valid", "train", "valid", "end"]
    steps = [line for line in lines if line["kind"] == "train"]
    assert [s["step"] for s in steps] == list(range(1, 10))
    assert [s["stage"] for s in steps] == ["token"] * 5 + ["sample"] * 4
    assert all(s["loss"] == pytest.approx(s[f"loss_{s['stage']}"], rel=sum_error(s["trained_tokens"])) for s in steps)
    assert [v["step"] for v in lines if v["kind"] == "valid"] == [0, 4, 8, 9]
    assert set(steps[0]) == {"kind", "step", "stage", "loss", "loss_token", "loss_sample", "lr", "grad_norm", "tokens", "trained_tokens", "conversations", "epoch", "seconds"}
    packs = read_packs(data_dir / "splits" / "train")
    start = lines[0]
    assert start["packs"] == len(packs) and start["tokens"] == sum(map(len, packs)) and start["steps_per_epoch"] == len(packs) / 2
    assert start["rows"] == sum(len(p.seq_start_id) for p in packs) and start["plan"] == [["token", 5], ["sample", 4]]
    for s in steps:
        chosen = packs_of_step(s["step"] - 1, len(packs), 2, 1234)
        assert s["trained_tokens"] == sum(int(packs[i].loss_mask.sum()) for i in chosen)
        assert s["epoch"] == pytest.approx(s["step"] * 2 / len(packs))


def test_it_learns(trained):
    before, after = (json.loads((trained / f"evaluation_{name}.json").read_text()) for name in ("before", "after"))
    assert before["loss_token"] == pytest.approx(math.log(4096), abs=0.3) and after["loss_token"] < before["loss_token"] - 1
    valid = [line for line in lines_of(trained) if line["kind"] == "valid"]
    assert (valid[0]["loss_token"], valid[-1]["loss_token"]) == (before["loss_token"], after["loss_token"])
    assert (before["step"], after["step"]) == (0, 9)


def test_the_same_settings_give_the_same_numbers_and_weights(trained, data_dir, tmp_path):
    train(training(data_dir, tmp_path / "again"))
    timeless = [[{k: v for k, v in line.items() if k != "seconds"} for line in lines_of(folder)] for folder in (trained, tmp_path / "again")]
    assert timeless[0] == timeless[1]
    for name in ("model/model.safetensors", "evaluation_after.json"):
        assert (trained / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_the_export_is_the_model(trained, data_dir):
    model = use_chunked_scan(AutoModelForCausalLM.from_pretrained(trained / "model", use_mamba_kernels=False, experts_implementation="eager"))
    ours = build_model(ModelConfig(name=str(trained / "model")), 4096)
    row = read_packs(data_dir / "splits" / "valid")[0].input_ids.astype(np.int64)
    with torch.no_grad():
        assert torch.equal(model(torch.from_numpy(row)[None]).logits, ours(torch.from_numpy(row)[None]).logits)
    saved = json.loads((trained / "model" / "config.json").read_text())
    assert saved["architectures"] == ["NemotronHForCausalLM"] and saved["use_mamba_kernels"] is True
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True).endswith("Hi<|im_end|>\n<|im_start|>assistant\n<think>\n")


def test_the_exported_weights_are_those_in_memory(tmp_path):
    model = build_model(ModelConfig(**SMALL), 64)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    export_model(model, tmp_path / "tokenizer", tmp_path / "model")
    # Within one chunk the library's own plain pass is right too: no scan of ours is involved here.
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", use_mamba_kernels=False, experts_implementation="eager")
    tokens = torch.randint(0, 64, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert near(plain(tokens).logits, model(tokens).logits, logits_error(model, tokens))
    assert model.config.use_mamba_kernels is False
    with pytest.raises(UserError, match="exists already"):
        export_model(model, tmp_path / "tokenizer", tmp_path / "model")


# ---- stopped, killed, and gone on


def seamless(folder):
    """The lines without times, and without the lines that mark a seam."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines_of(folder) if line["kind"] not in ("resume", "paused")]


def same_training(ours, theirs):
    assert seamless(ours) == seamless(theirs)
    for name in ("model/model.safetensors", "evaluation_before.json", "evaluation_after.json"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def test_killed_and_gone_on_it_is_the_same_training_to_the_last_bit(trained, data_dir, tmp_path):
    config = training(data_dir, tmp_path / "out", checkpoint={"save_interval": 2})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    process = Forked(main, ["--config", str(tmp_path / "recipe.yaml")])
    deadline = time.monotonic() + 900  # only against a wait without end: the machine may be busy
    while not any(line.get("step", 0) >= 3 for _, line in metric_lines(tmp_path / "out" / "metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "out" / "model").exists()
    with open(tmp_path / "out" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 99, "lo')  # as a kill in the middle of a line leaves it
    train(config)
    same_training(trained, tmp_path / "out")
    (seam,) = [line for line in lines_of(tmp_path / "out") if line["kind"] == "resume"]
    assert seam["attempt"] == 2 and seam["step"] >= 2 and seam["step"] % 2 == 0
    with pytest.raises(UserError, match="there are metrics already"):
        train(config)


def test_killed_before_its_first_checkpoint_it_begins_again(trained, data_dir, tmp_path):
    (tmp_path / "out").mkdir()
    kept = [line for line in (trained / "metrics.jsonl").read_text().splitlines(keepends=True)][:4]
    (tmp_path / "out" / "metrics.jsonl").write_text("".join(kept))
    train(training(data_dir, tmp_path / "out"))
    same_training(trained, tmp_path / "out")
    assert [line for line in lines_of(tmp_path / "out") if line["kind"] == "resume"] == [{"kind": "resume", "step": 0, "attempt": 2}]


EVERYTHING = SMALL | {"mtp_num_layers": 2, "moe_aux_loss_coeff": 0.02, "moe_router_bias_update_rate": 0.001}


def stops_at(monkeypatch, folder, *steps):
    """Someone puts a STOP file into the folder when these steps have been written."""
    write = MetricsFile.write

    def watched(self, line):
        write(self, line)
        if line["kind"] == "train" and line["step"] in steps:
            (folder / "STOP").touch()

    monkeypatch.setattr(MetricsFile, "write", watched)


def test_stopped_twice_with_everything_on_it_is_the_same_training(data_dir, tmp_path, monkeypatch):
    settings = {"model": EVERYTHING, "train": {"train_iters": 7, "global_batch_size": 2, "micro_batch_tokens": 2048, "eval_interval": 3, "recompute": True, "spike_factor": 50.0}}
    judge, remembered = Guard.judge, []
    monkeypatch.setattr(Guard, "judge", lambda self, loss, norm: remembered.append([*self.norms]) or judge(self, loss, norm))
    train(training(data_dir, tmp_path / "whole", **settings))
    stops_at(monkeypatch, tmp_path / "out", 4, 6)
    config = training(data_dir, tmp_path / "out", **settings, checkpoint={"keep_top_k": 1})
    for attempt, step in ((1, 4), (2, 6)):
        train(config)
        assert lines_of(tmp_path / "out")[-1] == {"kind": "paused", "step": step} and (tmp_path / "out" / "STOP").exists()
    train(config)
    assert [line for line in lines_of(tmp_path / "out") if line["kind"] == "resume"] == [{"kind": "resume", "step": s, "attempt": a} for s, a in ((4, 2), (6, 3))]
    assert not (tmp_path / "out" / "STOP").exists()
    same_training(tmp_path / "whole", tmp_path / "out")
    assert remembered[:7] == remembered[7:] and len(remembered[6]) == 6, "what is usual is remembered across the seams"
    steps = [line for line in lines_of(tmp_path / "out") if line["kind"] == "train"]
    assert steps[-1]["loss_mtp_1"] < steps[0]["loss_mtp_1"] and steps[0]["expert_imbalance"] >= 1
    assert steps[0]["loss"] == pytest.approx(steps[0]["loss_token"], rel=sum_error(steps[0]["trained_tokens"])), "loss is the main loss alone"


def test_another_batch_or_other_data_does_not_go_on(data_dir, tmp_path, monkeypatch):
    stops_at(monkeypatch, tmp_path / "out", 1)
    train(training(data_dir, tmp_path / "out"))
    with pytest.raises(UserError, match="packs_in_step 2, here 3"):
        train(training(data_dir, tmp_path / "out", train={"train_iters": 9, "global_batch_size": 3}))
    with pytest.raises(UserError, match="another model"):
        train(training(data_dir, tmp_path / "out", model=SMALL | {"mtp_num_layers": 1}))


def test_weights_to_begin_with_come_from_checkpoints_or_from_an_export(trained, data_dir, tmp_path, capsys):
    short = {"train": {"train_iters": 1, "global_batch_size": 1}, "loss": {}, "scheduler": {}, "evaluation": {"num_generations": 1, "max_new_tokens": 2}}
    for name, folder in (("a", trained / "checkpoints"), ("b", trained / "model")):
        model = SMALL if name == "a" else {}
        train(training(data_dir, tmp_path / name, model=model, checkpoint={"pretrained_checkpoint": str(folder)}, **short))
    first, second = ([line for line in lines_of(tmp_path / name) if line["kind"] == "valid"][0] for name in "ab")
    after = json.loads((trained / "evaluation_after.json").read_text())
    allowed = mean_loss_gap(build_model(ModelConfig(name=str(trained / "model")), 4096), read_packs(data_dir / "splits" / "valid"))
    assert first["loss_token"] == after["loss_token"] and second["loss_token"] == pytest.approx(after["loss_token"], abs=allowed)
    assert seamless(tmp_path / "a")[2]["step"] == 1
    with pytest.raises(UserError, match="no checkpoint here"):
        train(training(data_dir, tmp_path / "c", checkpoint={"load": str(tmp_path)}, **short))


# ---- further depths, balance, precision


def test_depths_equal_the_loops_and_are_exported_and_read_again(tmp_path):
    packs, _ = random_packs()
    batch, config = global_batch(packs), ModelConfig(**SMALL, mtp_num_layers=2, mtp_loss_scaling_factor=0.3)
    model = build_model(config, 60)
    learner = Learner(model, config, make_mtp(model)).double()
    whole = collate(batch.rows)
    share = learner(batch=whole, stage="sample", denominators=batch.denominators, targets=batch.targets(2))
    owner = torch.arange(len(batch.rows))[:, None].expand_as(whole.tokens).flatten()
    by_hand = mtp_loss_by_hand(share.nll.flatten(1), whole.mask.flatten(), owner, "sample")
    assert share.loss.item() == pytest.approx(by_hand.item(), rel=torch.finfo(torch.float32).eps)  # the main weights 1/|O_c| are float32
    found = make_gradient(learner, batch, "sample", 50)
    assert found.record(batch.denominators, batch.targets(2), False)["loss_mtp_2"] == pytest.approx(share.nll[2].sum().item() / batch.targets(2)[1], rel=sum_error(batch.targets(2)[1]))
    assert all(p.grad is not None and p.grad.any() for p in learner.mtp.parameters())
    (tmp_path / "tokenizer").mkdir()
    learner.float()
    export_model(learner, tmp_path / "tokenizer", tmp_path / "model")
    again = make_mtp(model, seed=5)
    assert load_mtp(again, tmp_path / "model")
    for (name, p), q in zip(again.state_dict().items(), learner.mtp.state_dict().values()):
        assert torch.equal(p, q), name
    assert torch.equal(build_model(ModelConfig(name=str(tmp_path / "model")), 60)(whole.tokens).logits, model(whole.tokens).logits)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["num_nextn_predict_layers"] == 2


@pytest.mark.parametrize("stage", ["token", "sample"])
def test_balance_does_not_depend_on_the_cut_nor_on_the_stage(stage):
    packs, _ = random_packs()
    batch, config = global_batch(packs), ModelConfig(**SMALL, moe_aux_loss_coeff=1.0)
    model = build_model(config, 60)

    def balance(model, cap):
        """The balancing loss, its gradient in the routers, tokens of each expert, and the imbalance. The main loss has a gradient in the routers too: it cancels in the difference."""
        learner = Learner(copy.deepcopy(model), config)
        parts = [learner(batch=collate(g), stage=stage, denominators=batch.denominators, rows=len(batch.rows)) for g in grouped(batch.rows, cap)]
        loss = sum(p.loss - p.main for p in parts)
        gates = torch.autograd.grad(loss, [m.gate.weight for m in learner.watch.layers])
        return loss.detach(), torch.cat([g.flatten() for g in gates]), sum(p.counts for p in parts), sum(p.imbalance for p in parts).item()

    units = float_errors(lambda m: balance(m, 10_000)[:2], model, measure=norm_of)
    found = {cap: balance(model, cap) for cap in (1, 80, 10_000)}
    for cap in (80, 10_000):
        assert_as_exact(found[cap][:2], found[1][:2], units, norm_of)
        assert torch.equal(found[cap][2], found[1][2])
    layers = sum("E" == kind for kind in config.pattern)
    assert found[1][0].item() == pytest.approx(found[1][3] * layers, abs=FACTOR * units[0]) and 1 <= found[1][3] < 2, "the mean over rows, in both stages"


def test_imbalance_by_hand():
    r = torch.Generator().manual_seed(0)
    scores, real = torch.rand(3, 7, 5, generator=r), torch.arange(7) < torch.tensor([[7], [4], [1]])
    chosen = scores.topk(2).indices
    found, counts = imbalance(scores, chosen, real)
    unit = float_error(lambda s: imbalance(s, chosen, real)[0], scores)
    for row in range(3):
        tokens, total = int(real[row].sum()), 0.0
        for e in range(5):
            taken = sum(e in chosen[row, t].tolist() for t in range(tokens))
            mean = sum((scores[row, t, e] / scores[row, t].sum()).item() for t in range(tokens)) / tokens
            total, _ = total + 5 / 2 * taken / tokens * mean, counts[row, e] == taken or pytest.fail("miscounted")
        assert found[row].item() == pytest.approx(total, abs=FACTOR * unit)


def test_biases_move_by_the_sign_of_the_whole_batch():
    layers = [m.mixer for m in build_model(ModelConfig(**SMALL), 60).model.layers if m.block_type == "moe"]
    move_biases(layers, torch.tensor([[5, 1, 3, 3], [0, 0, 0, 8], [2, 2, 2, 2]])[: len(layers)], 0.01)
    expected = torch.tensor([[-0.01, 0.01, 0, 0], [0.01, 0.01, 0.01, -0.01], [0, 0, 0, 0]])
    for layer, bias in zip(layers, expected):
        assert torch.equal(layer.gate.e_score_correction_bias, bias)


def test_narrow_numbers_give_nearly_the_same_step():
    packs, _ = random_packs()
    lines = {}
    for precision in ("fp32", "bf16", "bf16_pure"):
        learner = Learner(build_model(ModelConfig(**SMALL), 60), precision=precision)
        lines[precision] = train_step(learner, make_optimizer(learner, OptimizerSection()), global_batch(packs), 0, config_of())
        kinds = {p.dtype for p in learner.parameters()}
        assert kinds == ({torch.bfloat16} if precision == "bf16_pure" else {torch.float32})
    for precision in ("bf16", "bf16_pure"):
        assert lines[precision]["loss"] != lines["fp32"]["loss"] and lines[precision]["loss"] == pytest.approx(lines["fp32"]["loss"], rel=torch.finfo(torch.bfloat16).eps)
        assert lines[precision]["grad_norm"] == pytest.approx(lines["fp32"]["grad_norm"], rel=FACTOR * torch.finfo(torch.bfloat16).eps)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler of PyTorch needs one for C++")
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="the C++ that PyTorch generates does not compile without vector instructions")
def test_compiled_layers_give_the_same_loss():
    packs, _ = random_packs()
    found = []
    for compiled in (False, True):
        learner = Learner(build_model(ModelConfig(**SMALL | {"pattern": "M*"}), 60))
        assert not compiled or compile_layers(learner) == 1
        found.append(make_gradient(learner, global_batch(packs), "token", 5000).sums[0].item())
    assert found[0] == pytest.approx(found[1], rel=sum_error(49))


# ---- bad steps


def test_a_bad_step_is_left_out_and_training_goes_on(data_dir, tmp_path, monkeypatch, capsys):
    judge = Guard.judge
    monkeypatch.setattr(Guard, "judge", lambda self, loss, norm: judge(self, loss, norm) or ("the gradient norm leaps" if len(self.norms) == 3 else ""))
    train(training(data_dir, tmp_path / "out", train={"train_iters": 5, "global_batch_size": 2, "bad_step": "skip"}))
    lines = [line for line in lines_of(tmp_path / "out") if "step" in line and line["kind"] != "valid"]
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 1), ("train", 2), ("skipped", 3), ("train", 4), ("train", 5)]
    rows = json.loads((tmp_path / "out" / "bad_batch_step_3.json").read_text())["rows"]
    stored = np.load(tmp_path / "out" / "bad_batch_step_3.npz")
    assert len(rows) == len(stored["offsets"]) - 1 and lines[2]["problem"] == "the gradient norm leaps" and lines[2]["conversations"]
    assert "left out: the gradient norm leaps" in capsys.readouterr().out


def test_a_leap_is_measured_against_what_is_usual():
    guard = Guard(spike_factor=5)
    assert [guard.judge(1.0, 2.0) for _ in range(10)] == [""] * 10
    assert "6 times the median" in guard.judge(1.0, 12.0) and guard.judge(1.0, 9.9) == ""
    assert guard.judge(math.inf, 1.0) == "the loss is inf" and guard.judge(1.0, math.nan) == "the gradient norm is nan"


# ---- LoRA


def test_adapters_are_trained_saved_and_merged(data_dir, tmp_path):
    pytest.importorskip("peft")
    short = {"train": {"train_iters": 3, "global_batch_size": 1}, "loss": {}, "scheduler": {}, "evaluation": {"num_generations": 1, "max_new_tokens": 2}}
    train(training(data_dir, tmp_path / "out", peft={"enabled": True, "dim": 4, "merge": True}, model=SMALL | {"moe_router_bias_update_rate": 0.01}, **short))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["adapter", "checkpoints", "evaluation_after.json", "evaluation_before.json", "metrics.jsonl", "model"]
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
    before, merged = build_model(ModelConfig(**SMALL), 4096, seed=1234), build_model(ModelConfig(name=str(tmp_path / "out" / "model")), 4096)
    moved = {n for (n, p), q in zip(before.named_parameters(), merged.parameters()) if not torch.equal(p, q)}
    assert moved and all("proj" in n for n in moved), "the pairs stand beside linear layers, and nothing else has moved"
    assert all(torch.equal(p, q) for p, q in zip(before.buffers(), merged.buffers(), strict=True)), "an adapter has no place for the routers' bias"
    with pytest.raises(UserError, match="adapters and multi-token prediction"):
        train(training(data_dir, tmp_path / "b", peft={"enabled": True}, model=SMALL | {"mtp_num_layers": 1}, **short))


# ---- what is refused


def test_a_step_without_a_trained_token_is_refused_before_the_first(data_dir, tmp_path, monkeypatch):
    found = torch_engine.inventory
    monkeypatch.setattr(torch_engine, "inventory", lambda packs: dataclasses.replace(found(packs), trained=np.r_[0, found(packs).trained[1:]]))
    with pytest.raises(UserError, match=r"nothing is trained in step \d+: packs 0 have no trained token"):
        train(training(data_dir, tmp_path / "out", train={"train_iters": 20, "global_batch_size": 1}, loss={}))
    assert not (tmp_path / "out").exists()


def test_packs_longer_than_the_context_and_another_tokenizer_are_refused(trained, data_dir, tmp_path):
    folder = shutil.copytree(trained / "model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    start = {"model": {"name": str(folder)}}
    with pytest.raises(UserError, match="packs of 1,024 tokens, and a model for 512"):
        train(training(data_dir, tmp_path / "out", **start))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with pytest.raises(UserError, match="different chat templates"):
        train(training(data_dir, tmp_path / "out", **start))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="the same id would be another piece of text"):
        train(training(data_dir, tmp_path / "out", **start))
    assert not (tmp_path / "out").exists()


def test_metrics_are_flushed_and_never_overwritten(tmp_path):
    with MetricsFile(tmp_path / "deep" / "metrics.jsonl") as metrics:
        metrics.write({"kind": "start"})
        assert (tmp_path / "deep" / "metrics.jsonl").read_text() == '{"kind": "start"}\n'
        with pytest.raises(ValueError):
            metrics.write({"loss": math.nan})
    with pytest.raises(UserError, match="there are metrics already"):
        MetricsFile(tmp_path / "deep" / "metrics.jsonl")


def test_a_second_training_into_the_same_folder_is_refused(trained, data_dir):
    before = (trained / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="there are metrics already"):
        train(training(data_dir, trained))
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_a_folder_without_a_manifest_is_refused_at_once(tmp_path):
    with pytest.raises(UserError, match="no manifest.json"):
        train(config_of(tmp_path, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_data_without_held_out_packs_trains_and_says_so(tmp_path, capsys):
    prepare(PrepConfig(output_dir=str(tmp_path / "data"), sample=6, pack_size=512, train_ratio=1.0, valid_ratio=0.0, test_ratio=0.0))
    train(training(tmp_path / "data", tmp_path / "out", train={"train_iters": 2, "global_batch_size": 1, "eval_interval": 1}, loss={}))
    assert [line["kind"] for line in lines_of(tmp_path / "out")] == ["start", "train", "train", "end"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["checkpoints", "metrics.jsonl", "model"]
    assert "no held-out packs" in capsys.readouterr().out


SHORT = {"loss": {}, "scheduler": {}, "evaluation": {"num_generations": 1, "max_new_tokens": 3}}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_pure"])
def test_every_precision_trains_generates_resumes_and_is_read_again(data_dir, tmp_path, precision):
    """Two steps at once, and one step, a checkpoint and another step, are the same training; what is exported loads, and generates the same."""
    sections = SHORT | {"optimizer": {"lr": 5e-3}}
    steps = lambda n: {"train_iters": n, "global_batch_size": 1, "precision": precision}
    train(training(data_dir, tmp_path / "whole", train=steps(2), **sections))
    for n in (1, 2):
        train(training(data_dir, tmp_path / "parts", train=steps(n), **sections))
    losses = [[line["loss"] for line in lines_of(tmp_path / name) if line["kind"] == "train"] for name in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    after = [json.loads((tmp_path / name / "evaluation_after.json").read_text()) for name in ("whole", "parts")]
    assert after[0] == after[1] and after[0]["num_generations"] == 1 and after[0]["generations"][0]["generated"]
    exported = build_model(ModelConfig(name=str(tmp_path / "whole" / "model")), 4096)
    packs = read_packs(data_dir / "splits" / "valid")
    loss = held_out_loss(exported, packs).loss_token
    assert loss == pytest.approx(after[0]["loss_token"], abs=mean_loss_gap(exported, packs, torch.float32 if precision == "fp32" else torch.bfloat16))


def test_a_training_that_only_leaves_out_steps_ends(data_dir, tmp_path):
    """A rate beyond all measure: three steps are left out, then it ends in words. What is kept was written before."""
    config = training(data_dir, tmp_path / "out", train={"train_iters": 9, "global_batch_size": 1, "bad_step": "skip"}, optimizer={"lr": 1e25, "clip_grad": 0.0}, checkpoint={"save_interval": 1}, **SHORT)
    with pytest.raises(UserError, match=r"(?s)in step 4, as in the 2 before it|is not finite after step"):
        train(config)
    kinds = [line["kind"] for line in lines_of(tmp_path / "out")]
    assert kinds.count("skipped") <= 3 and kinds[-1] != "end" and len(list((tmp_path / "out").glob("bad_batch_*"))) <= 6
    assert all(folder.name <= "step_00000001" for folder in (tmp_path / "out" / "checkpoints").glob("step_*"))


def test_three_steps_left_out_in_a_row_end_a_training(data_dir, tmp_path, monkeypatch):
    judge = Guard.judge
    monkeypatch.setattr(Guard, "judge", lambda self, loss, norm: judge(self, loss, math.nan if self.norms else norm))
    with pytest.raises(UserError, match="the gradient norm is nan in step 4, as in the 2 before it"):
        train(training(data_dir, tmp_path / "out", train={"train_iters": 9, "global_batch_size": 1, "bad_step": "skip"}, **SHORT))
    lines = [(line["kind"], line["step"]) for line in lines_of(tmp_path / "out") if line["kind"] in ("train", "skipped")]
    assert lines == [("train", 1), ("skipped", 2), ("skipped", 3), ("skipped", 4)]


def test_lost_weights_are_never_a_checkpoint(data_dir, tmp_path, monkeypatch):
    """A weight becomes infinite behind the back of loss and gradient."""
    def step(model, optimizer, *given, **named):
        line = train_step(model, optimizer, *given, **named)
        model.model.lm_head.weight.data[5, 0] = math.inf
        return line

    monkeypatch.setattr(torch_engine, "train_step", step)
    with pytest.raises(UserError, match=r"(?s)lm_head.weight is not finite after step 1.*begin again"):
        train(training(data_dir, tmp_path / "out", train={"train_iters": 3, "global_batch_size": 1}, checkpoint={"save_interval": 1}, **SHORT))
    assert not list((tmp_path / "out" / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_ends_the_step_and_writes_a_checkpoint(data_dir, tmp_path, name, capfd):
    """In a process of its own: exit code 0, the last line says paused, and no second training may work there meanwhile."""
    config = training(data_dir, tmp_path / "out", train={"train_iters": 5000, "global_batch_size": 1}, **SHORT)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    words = ["--config", str(tmp_path / "recipe.yaml")]
    process = Forked(main, words)
    deadline = time.monotonic() + 900
    while not any(line["kind"] == "train" for _, line in metric_lines(tmp_path / "out" / "metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    assert lock_holder(tmp_path / "out")["pid"] == process.pid
    if name == "SIGTERM":
        before = (tmp_path / "out" / "metrics.jsonl").read_bytes()
        with pytest.raises(UserError, match="another training works in this folder"):
            train(config)
        assert (tmp_path / "out" / "metrics.jsonl").read_bytes().startswith(before)
    process.send_signal(getattr(signal, name))
    assert process.wait(900) == 0 and lock_holder(tmp_path / "out") == {}
    last = lines_of(tmp_path / "out")[-1]
    assert last["kind"] == "paused" and [p.name for p in (tmp_path / "out" / "checkpoints").glob("step_*")] == [f"step_{last['step']:08d}"]
    assert f"{name}: paused after step {last['step']}" in capfd.readouterr().out


def test_a_signal_before_the_first_step_ends_it_without_one(data_dir, tmp_path):
    stop = StopSignals()
    stop(signal.SIGTERM, None)
    config = training(data_dir, tmp_path / "out", train={"train_iters": 2, "global_batch_size": 1}, **SHORT)
    train(config, stop)
    assert [line["kind"] for line in lines_of(tmp_path / "out")] == ["start", "valid", "paused"]
    train(config)
    assert [line["step"] for line in lines_of(tmp_path / "out") if line["kind"] == "train"] == [1, 2]


def test_other_settings_are_said_when_a_training_goes_on(data_dir, tmp_path, capsys):
    of = lambda **sections: training(data_dir, tmp_path / "out", **(SHORT | sections))
    train(of(train={"train_iters": 1, "global_batch_size": 1}, optimizer={"lr": 5e-3}))
    with pytest.raises(UserError, match=r"(?s)come to its end after 1 steps.*more than 1 steps"):
        train(of(train={"train_iters": 1, "global_batch_size": 1}, optimizer={"lr": 5e-3}))
    changed = of(train={"train_iters": 2, "global_batch_size": 1}, optimizer={"lr": 1e-3}, loss={"stages": [{"stage": "sample"}]}, scheduler={"lr_decay_style": "cosine"})
    train(changed)
    (seam,) = [line for line in lines_of(tmp_path / "out") if line["kind"] == "resume"]
    assert set(seam["changed"]) == {"train.train_iters", "optimizer.lr", "loss.stages", "scheduler.lr_decay_style"} and seam["changed"]["optimizer.lr"] == [5e-3, 1e-3]
    assert "optimizer.lr was 0.005 and is 0.001 from here on" in capsys.readouterr().out
    assert [line["kind"] for line in lines_of(tmp_path / "out")].count("end") == 1
    with pytest.raises(UserError, match=r"(?s)is as long as this training.*more than 2 steps"):
        train(training(data_dir, tmp_path / "other", checkpoint={"load": str(tmp_path / "out" / "checkpoints")}, train={"train_iters": 2, "global_batch_size": 1}, **SHORT))
    assert not (tmp_path / "other").exists()


def test_a_length_in_epochs(data_dir, tmp_path):
    """Each pack is seen once in an epoch: as many steps as that takes."""
    train(training(data_dir, tmp_path / "out", train={"epochs": 1.0, "global_batch_size": 4}, **SHORT))
    start, packs = lines_of(tmp_path / "out")[0], len(read_packs(data_dir / "splits" / "train"))
    steps = [line for line in lines_of(tmp_path / "out") if line["kind"] == "train"]
    assert start["train_iters"] == len(steps) == math.ceil(packs / 4) and steps[-1]["epoch"] >= 1 > steps[-2]["epoch"]


def test_token_ids_of_another_tokenizer(data_dir, tmp_path):
    def with_token(pack, token):
        ids = pack.input_ids.astype(np.int64)
        ids[3] = token
        return dataclasses.replace(pack, input_ids=ids)

    packs = read_packs(data_dir / "splits" / "train")
    for wrong, said in ((4096, "token id 4096"), (-1, "token id -1")):
        packs[1] = with_token(packs[1], wrong)
        found = checks.inventory(packs)
        with pytest.raises(UserError, match=f"pack 1 has the {said}, and the tokenizer 4,096 tokens"):
            checks.check_tokens(found, checks.inventory([]), 4096, data_dir)
    packs[1] = with_token(packs[1], 4095)
    checks.check_tokens(checks.inventory(packs), checks.inventory([]), 4096, data_dir)


@pytest.mark.parametrize("section", [{"checkpoint": {"load": "/no/such"}}, {"checkpoint": {"pretrained_checkpoint": "/no/such"}}, {"model": {"name": "/no/such"}}])
def test_what_is_not_there_is_refused_before_a_folder_is_made(tmp_path, capsys, section):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"data_dir": "nowhere", "output_dir": str(tmp_path / "out")} | section))
    assert main(["--config", str(tmp_path / "recipe.yaml")]) == 1 and "there is no folder /no/such" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- settings: ranges and kinds, at the constructor

SECTIONS = {"dataset": DatasetSection, "model": ModelConfig, "train": TrainSection, "optimizer": OptimizerSection, "scheduler": SchedulerSection, "loss": LossSection, "evaluation": EvaluationSection, "checkpoint": CheckpointSection, "peft": PeftSection}


def test_every_number_has_a_range():
    """None is forgotten, so that a new one must be given a range."""
    numbers = {f"{name}.{f.name}" for name, kind in SECTIONS.items() for f in dataclasses.fields(kind) if f.type in (int, float, int | None)}
    assert numbers == set(RANGES)


@pytest.mark.parametrize("name", sorted(RANGES))
def test_numbers_outside_of_their_range_and_other_kinds_are_refused_by_name(name):
    section, field = name.split(".")
    low, high = map(float, RANGES[name][0][1:-1].split(","))
    wrong = [math.inf, -math.inf, math.nan, low - 1, "1e-3", True, [1]]
    wrong += [low] if RANGES[name][0][0] == "(" else []
    wrong += [] if math.isinf(high) else [high] if RANGES[name][0][-1] == ")" else [high + 1]
    for value in wrong:
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            SECTIONS[section](**{field: value})


@pytest.mark.parametrize(("act", "said"), [
    (lambda: LossSection(stages=["token"]), r"loss\.stages\[0\]: expected a stage"),
    (lambda: LossSection(stages="token"), r"loss\.stages: expected a list"),
    (lambda: LossSection(stages=[Phase("token", "5")]), r"loss\.stages\[0\]\.steps"),
    (lambda: TrainSection(train_iters=0), r"train\.train_iters: 0 is not positive"),
    (lambda: TrainSection(train_iters=5, epochs=1), r"train\.epochs: 1 epochs and 5 steps"),
    (lambda: TrainConfig("a", "b", train={"train_iters": 5}), r"train: expected a TrainSection, got a dict"),
    (lambda: TrainConfig(None, "b"), r"data_dir: expected a text"),
    (lambda: TrainConfig("a", "b", optimizer=OptimizerSection(lr=1e-3), scheduler=SchedulerSection(lr_decay_style="cosine", min_lr=1.0)), r"scheduler\.min_lr: 1\.0 is above"),
    (lambda: PeftSection(target_modules="q_proj"), r"peft\.target_modules: expected a list of texts"),
])
def test_values_that_cannot_be_meant_are_refused_at_the_constructor(act, said):
    with pytest.raises(UserError, match=said):
        act()


def test_a_rate_that_explodes_stops_the_training_and_keeps_what_was_measured(data_dir, tmp_path):
    config = training(data_dir, tmp_path / "out", optimizer={"lr": 1e30, "clip_grad": 0.0}, scheduler={}, evaluation={"num_generations": 1, "max_new_tokens": 2})
    with pytest.raises(UserError, match=r"the loss is (nan|inf) in step"):
        train(config)
    assert lines_of(tmp_path / "out")[-1]["kind"] == "train" and not (tmp_path / "out" / "model").exists()


# ---- the command


def test_the_command_reads_the_same_settings(tmp_path, data_dir, monkeypatch):
    config = training(data_dir, tmp_path / "out")
    path = tmp_path / "recipe.yaml"
    text = yaml.safe_dump(dataclasses.asdict(config)).replace(str(data_dir), "${oc.env:DATA_FOR_TEST}")
    path.write_text(text)
    monkeypatch.setenv("DATA_FOR_TEST", str(data_dir))
    assert read_config(path) == config


@pytest.mark.parametrize("text, message", [
    ("data_dir: a\noutput_dir: b\ntrain: {train_itres: 3}\n", "did you mean 'train_iters'"),
    ("data_dir: a\n", "no output_dir"),
    ("- a\n", "no data_dir and no output_dir"),
    ("", "no data_dir and no output_dir"),
    ("a: [\n", "not valid YAML"),
    ("data_dir: ${nowhere}\noutput_dir: b\n", "not valid YAML"),
    ("data_dir: nowhere\noutput_dir: b\n", "no manifest.json"),
])
def test_mistakes_are_one_message_and_status_1(tmp_path, capsys, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    assert main(["--config", str(tmp_path / "recipe.yaml")]) == 1
    said = capsys.readouterr()
    assert message in said.err and "Traceback" not in said.err


def test_as_a_process(tmp_path, data_dir):
    config = training(data_dir, tmp_path / "out", train={"train_iters": 2, "global_batch_size": 1, "log_interval": 1}, loss={}, evaluation={"num_generations": 1, "max_new_tokens": 2})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    done = subprocess.run([sys.executable, "-m", "nemotron_nb.train", "--config", str(tmp_path / "recipe.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stdout and "held-out loss" in done.stdout and "Traceback" not in done.stderr
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()


def test_a_misused_command_line_ends_with_status_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2 and "--config" in capsys.readouterr().err


# ---- adapters and their base


def test_an_adapter_of_a_random_base_is_loaded_on_the_base_beside_it(data_dir, tmp_path, capsys):
    """The folder of the run is enough: the base that nobody else has lies in it, and the adapter names it."""
    pytest.importorskip("peft")
    config = training(data_dir, tmp_path / "out", train={"train_iters": 2, "global_batch_size": 1}, optimizer={"lr": 5e-3}, peft={"enabled": True, "dim": 2, "exclude_modules": ["*out_proj*"]}, **SHORT)
    train(config)
    about = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(tmp_path / "out" / "base") and not (tmp_path / "out" / "model").exists()
    assert f"of the base {tmp_path / 'out' / 'base'}" in capsys.readouterr().out
    base = build_model(ModelConfig(name=about["base_model_name_or_path"]), 4096)
    packs = read_packs(data_dir / "splits" / "valid")
    before, after = (json.loads((tmp_path / "out" / f"evaluation_{name}.json").read_text())["loss_token"] for name in ("before", "after"))
    near = mean_loss_gap(base, packs)
    assert held_out_loss(base, packs).loss_token == pytest.approx(before, abs=near) and abs(after - before) > 4 * near
    assert held_out_loss(load_adapter(base, tmp_path / "out" / "adapter"), packs).loss_token == pytest.approx(after, abs=near)
