"""The engine: one step against a hand-made one, stages, determinism, files, export, refusals."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemotron_nb.core import UserError, from_mapping
from nemotron_nb.data.pack import make_pack
from nemotron_nb.data.prep import PrepConfig, prepare, read_packs
from nemotron_nb.loss.two_stage import loss_by_hand
from nemotron_nb.train.__main__ import main, read_config
from nemotron_nb.train.batches import global_batch, packs_of_step
from nemotron_nb.train.model import build_model
from nemotron_nb.train.scan import use_chunked_scan
from nemotron_nb.train.settings import ModelConfig, OptimizerSection, TrainConfig
from nemotron_nb.train.torch_engine import MetricsFile, export_model, learning_rate, make_optimizer, train, train_step

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


@pytest.mark.parametrize("stage", ["token", "sample"])
@pytest.mark.parametrize("cap", [50, 5000])
def test_a_step_moves_the_weights_as_a_step_made_by_hand(stage, cap):
    packs, made = random_packs()
    config = config_of(train={"micro_batch_tokens": cap}, optimizer={"lr": 1e-3, "clip_grad": 0.7, "adam_eps": 1e-3}, loss={"stages": [{"stage": stage}]})
    ours, by_hand = (build_model(config.model, 60, seed=0).double() for _ in range(2))
    line = train_step(ours, make_optimizer(ours, config.optimizer), global_batch(packs), 0, config)

    nll = [F.cross_entropy(by_hand(torch.from_numpy(i[:-1])[None]).logits[0].double(), torch.from_numpy(i[1:]), reduction="none") for i, _ in made]
    owner = torch.cat([torch.full((len(n),), k) for k, n in enumerate(nll)])
    mask = torch.cat([torch.from_numpy(m[1:]) for _, m in made])
    means = {s: loss_by_hand(torch.cat(nll), mask, owner, s) for s in ("token", "sample")}
    means[stage].backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in by_hand.parameters() if p.grad is not None))
    for p in by_hand.parameters():
        if p.grad is None:
            continue
        g = p.grad * min(1.0, 0.7 / (norm + 1e-6))
        decay = 0.1 if p.ndim >= 2 else 0.0
        # First step of AdamW: both moments are bias-corrected to g and g^2.
        p.data = p.data * (1 - 1e-3 * decay) - 1e-3 * g / (g.abs() + 1e-3)

    assert line["loss"] == pytest.approx(means[stage].item(), abs=1e-6)
    assert line["loss_token"] == pytest.approx(means["token"].item(), abs=1e-6) and line["loss_sample"] == pytest.approx(means["sample"].item(), abs=1e-6)
    assert abs(line["loss_token"] - line["loss_sample"]) > 1e-3
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-5) and norm > 0.7, "the gradient is really clipped"
    assert (line["tokens"], line["trained_tokens"], line["conversations"], line["stage"], line["step"]) == (146, 49, 4, stage, 1)
    for (name, p), q in zip(ours.named_parameters(), by_hand.parameters()):
        torch.testing.assert_close(p, q, atol=2e-6, rtol=0, msg=name)


def test_a_second_step_starts_from_a_clean_gradient():
    packs, _ = random_packs()
    config = config_of(optimizer={"lr": 1e-3})
    model = build_model(config.model, 60, seed=0)
    optimizer = make_optimizer(model, config.optimizer)
    train_step(model, optimizer, global_batch(packs), 0, config)
    fresh = build_model(config.model, 60, seed=1)
    fresh.load_state_dict(model.state_dict())
    again = [train_step(m, o, global_batch(packs), 1, config)["grad_norm"] for m, o in ((model, optimizer), (fresh, make_optimizer(fresh, config.optimizer)))]
    assert again[0] == pytest.approx(again[1], rel=1e-6)


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
    assert sorted(p.name for p in trained.iterdir()) == ["evaluation_after.json", "evaluation_before.json", "metrics.jsonl", "model"]
    lines = lines_of(trained)
    assert [line["kind"] for line in lines] == ["start", "valid", *["train"] * 4, "valid", *["train"] * 4, "valid", "train", "valid", "end"]
    steps = [line for line in lines if line["kind"] == "train"]
    assert [s["step"] for s in steps] == list(range(1, 10))
    assert [s["stage"] for s in steps] == ["token"] * 5 + ["sample"] * 4
    assert all(s["loss"] == pytest.approx(s[f"loss_{s['stage']}"], abs=1e-5) for s in steps)
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
        torch.testing.assert_close(plain(tokens).logits, model(tokens).logits, atol=1e-3, rtol=1e-3)
    assert model.config.use_mamba_kernels is False
    with pytest.raises(UserError, match="exists already"):
        export_model(model, tmp_path / "tokenizer", tmp_path / "model")


# ---- what is refused


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


def test_data_without_held_out_packs_is_refused(tmp_path):
    prepare(PrepConfig(output_dir=str(tmp_path / "data"), sample=6, train_ratio=1.0, valid_ratio=0.0, test_ratio=0.0))
    with pytest.raises(UserError, match="no held-out packs"):
        train(config_of(tmp_path / "data", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


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
