"""Smaller checkpoints: our rounding against PyTorch and ModelOpt, the rule against the module names of a real model, an export read back."""

import fnmatch
import json
import warnings
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_nb.compress.distil import distillation_loss
from nemotron_nb.compress.formats import E2M1, E4M3, fp8, nvfp4, rounded
from nemotron_nb.compress.precision import RULES, modelopt_config, precisions
from nemotron_nb.compress.prune import channel_importance, pruned
from nemotron_nb.compress.quantise import dequantised, export_quantised, mended, quantise, read_quantised, stored_tensors
from nemotron_nb.core import UserError
from nemotron_nb.train.model import build_model
from nemotron_nb.train.settings import ModelConfig

SIZES = {"hidden_size": 64, "attention_heads": 2, "mamba_heads": 2, "experts": 4, "expert_size": 32}
patterns = st.text("ME*", min_size=1, max_size=30)


def tool(name):
    """A module of ModelOpt, or the test is skipped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(f"modelopt.torch.{name}")


def draws(seed, *shape, size=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-500, 500, width=32), min_size=1, max_size=64))
def test_eight_bits_are_pytorchs(numbers):
    """Nearest, ties to even, saturated: the same as the cast for every number in its range."""
    x = torch.tensor(numbers).clamp(-448, 448)
    assert torch.equal(rounded(x, E4M3), x.to(torch.float8_e4m3fn).double())


def test_ties_fall_on_the_even_pattern():
    """Every middle between two neighbours, of both signs."""
    middles = (E4M3[1:] + E4M3[:-1]).float() / 2
    for x in (middles, -middles):
        assert torch.equal(rounded(x, E4M3), x.to(torch.float8_e4m3fn).double())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-7, 7, width=32), min_size=1, max_size=64))
def test_four_bits_are_the_nearest(numbers):
    """By the definition: no number of the grid is nearer, and of two equally near ones the even pattern is taken."""
    grid = torch.cat([-E2M1.flip(0), E2M1])
    x = torch.tensor(numbers, dtype=torch.float64).clamp(-6, 6)
    got = rounded(x, E2M1)
    assert torch.equal((got - x).abs(), (grid - x[:, None]).abs().min(-1).values)
    tie = [i for i, v in enumerate(x.abs().tolist()) if any(v == (a + b) / 2 for a, b in zip(E2M1[:-1].tolist(), E2M1[1:].tolist()))]
    assert all(E2M1.tolist().index(abs(got[i].item())) % 2 == 0 for i in tie)


@pytest.mark.parametrize("size", [1e-4, 1.0, 300.0])
def test_fp8_is_modelopts(size):
    """The same codes; in float32 the tool may fall to the other side of a middle, one step of eight bits away, rarely."""
    nn, config = tool("quantization.nn"), tool("quantization.config")
    x = draws(3, 64, 64, size=size)
    quantizer = nn.TensorQuantizer(config.QuantizerAttributeConfig(num_bits=(4, 3), axis=None))
    quantizer.amax = x.abs().max()
    theirs, ours = quantizer(x).double(), fp8(x)
    differ = (theirs - ours).abs() > 1e-5 * ours.abs()
    assert differ.float().mean() < 1e-3
    assert ((theirs - ours).abs() <= x.abs() / 8 + 1e-5 * ours.abs()).all()


@pytest.mark.parametrize("size", [1e-3, 1.0, 50.0])
def test_nvfp4_is_modelopts(size):
    """Packed and unpacked by the tool on a CPU, with the same two levels of scales."""
    qtensor = tool("quantization.qtensor.nvfp4_tensor").NVFP4QTensor
    x = draws(4, 32, 64, size=size)
    packed, scale, whole = qtensor.quantize(x, 16)
    theirs = packed.dequantize(scale=scale, double_scale=whole, block_sizes={-1: 16}).double()
    differ = (theirs - nvfp4(x)).abs() > 1e-5 * x.abs().max()
    assert differ.float().mean() < 1e-3


@settings(max_examples=100, deadline=None)
@given(patterns)
def test_the_rule_of_nano(pattern):
    """By the sentence that was published, said with indices."""
    for layer, (letter, parts) in enumerate(zip(pattern, precisions(RULES["nano_fp8"], pattern), strict=True)):
        feeds = letter == "M" and pattern[layer + 1 : layer + 2] == "*"
        if letter == "M":
            assert parts == {"projections": "BF16" if feeds else "FP8", "conv1d": "BF16"}
        elif letter == "*":
            assert parts == {"attention": "BF16", "cache": "FP8"}
        else:
            assert parts["experts"] == parts["shared expert"] == "FP8" and parts["router"] == "BF16"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(model that was quantised, its logits before and after, batches, folder)."""
    tool("quantization")
    model = build_model(ModelConfig(pattern="MEM*E", **SIZES), 256, seed=1).eval()
    batches = [torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    with torch.no_grad():
        before = model(batches[0]).logits
        found = quantise(model, RULES["nano_fp8"], batches)
        after = model(batches[0]).logits
    folder = tmp_path_factory.mktemp("compressed") / "model"
    count = export_quantised(model, folder)
    return found, before, after, batches, folder, count


@pytest.mark.parametrize("rule", RULES)
def test_every_pattern_that_is_told_fits_a_quantizer(rule):
    """A pattern that fits nothing leaves a part in full precision without a word."""
    tool("quantization")
    pattern = "MEM*EM"
    model = build_model(ModelConfig(pattern=pattern, **SIZES), 64, seed=1)
    names = [n for n, _ in model.named_parameters()]
    for row in modelopt_config(RULES[rule], pattern)["quant_cfg"][1:]:
        stem = row["quantizer_name"].removesuffix("*weight_quantizer*").removesuffix("*input_quantizer*")
        if not stem.endswith("bmm_quantizer"):
            assert any(fnmatch.fnmatch(name, f"{stem}*") for name in names), row


def test_what_is_exported_is_what_was_measured(exported):
    """The read model differs from the measured one by far less than one rounding to eight bits moved it."""
    found, before, after, batches, folder, _ = exported
    with torch.no_grad():
        served = read_quantised(folder)(batches[0]).logits
    moved = (after - before).pow(2).mean().sqrt()
    assert (served - after).pow(2).mean().sqrt() < 0.01 * moved
    assert (found.weights, found.inputs, found.caches) == (22, 10, 2)


def test_the_folder_keeps_what_the_rule_spares(exported):
    stored = stored_tensors(exported[4])
    low = {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn}
    assert not [name for name in low if ".layers.2." in name or ".layers.3." in name or "conv1d" in name or "gate." in name]
    assert Counter(name.split(".layers.")[1][0] for name in low) == {"0": 2, "1": 10, "4": 10}
    assert {n.rpartition(".")[2] for n in stored if ".layers.3." in n and n.endswith("_scale")} == {"k_scale", "v_scale"}


def test_the_list_of_what_was_left_alone_can_be_read(exported):
    folder, count = exported[4:]
    said = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    whole = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert "lm_head" in said["exclude_modules"] and "lm_head" in whole["ignore"] and count >= 0
    assert "\x00" not in json.dumps([said, whole]) and "\\u0000" not in json.dumps([said, whole])
    assert mended(["a.b", "x.\x00y", "c.\x00z*"]) == (["a.b", "x", "c*"], 2)


def test_a_scale_that_is_missing_is_named(exported):
    stored = stored_tensors(exported[4])
    name = next(n for n, t in stored.items() if t.dtype == torch.float8_e4m3fn)
    del stored[f"{name}_scale"]
    with pytest.raises(UserError, match=name):
        dequantised(stored)


def test_a_folder_that_is_no_fp8_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no FP8 checkpoint"):
        read_quantised(tmp_path)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_distillation_loss_is_modelopts(temperature):
    """Position by position; the weights and the denominator are ours."""
    losses = tool("distill.losses")
    student, teacher, weights = draws(5, 12, 50), draws(6, 12, 50, size=2.0), draws(7, 12).abs()
    theirs = losses.LogitsDistillationLoss(temperature, reduction="none")(student, teacher)
    theirs = theirs.sum(-1) if theirs.ndim == 2 else theirs
    loss, each = distillation_loss(student, teacher, weights, temperature)
    assert torch.allclose(each, theirs, rtol=1e-5, atol=1e-6) and torch.allclose(loss, (theirs * weights).sum(), rtol=1e-5)


def test_the_least_active_channels_are_taken():
    """A channel that is made silent is the first to go, and the model says the same without it."""
    model = build_model(ModelConfig(pattern="M*E", **SIZES), 64, seed=3).eval()
    experts = model.model.layers[2].mixer.experts
    with torch.no_grad():
        experts.up_proj[:, ::4] = 0  # relu2 of nothing is nothing
    batches = [torch.randint(64, (4, 64), generator=torch.Generator().manual_seed(0))]
    importance = channel_importance(model, batches)
    assert all((score[:, ::4] == 0).all() for score in importance.values())
    narrow = pruned(model, importance, 24)
    with torch.no_grad():
        assert torch.allclose(narrow(batches[0]).logits, model(batches[0]).logits, atol=1e-5)
    assert narrow.config.moe_intermediate_size == 24 and model.config.moe_intermediate_size == 32
