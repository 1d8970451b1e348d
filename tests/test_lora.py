"""LoRA: the pairs against ten plain lines, where they go, how they begin, what stays frozen, how they are written, and what is refused."""

import copy
import math
import re
import sys

import pytest
import torch
from checkpoint_worker import SIZES
from peft import PeftModel
from precision import EXACT, FACTOR, largest
from torch import nn
from transformers import AutoModelForCausalLM

from nemotron_nb.core import UserError, from_mapping
from nemotron_nb.train.lora import (
    RECIPES,
    SUPER_TARGETS,
    NaiveLora,
    _pairs,
    apply_lora,
    export_merged,
    load_adapter,
    lora_picture,
    lora_recipe,
    lora_targets,
    megatron_name,
    megatron_peft,
    merged,
    merged_state,
    parameter_table,
    save_adapter,
)
from nemotron_nb.train.scan import use_chunked_scan
from nemotron_nb.train.model import build_model
from nemotron_nb.train.settings import PeftSection, TrainConfig

TOKENS = torch.arange(2, 34)[None]
ALL = PeftSection(dim=3, alpha=6, target_modules=SUPER_TARGETS)


@pytest.fixture(scope="module")
def base():
    """A tiny model; tests change copies."""
    return build_model(SIZES, 300, 0)


def with_pairs(base: nn.Module, peft: PeftSection = ALL, double: bool = False) -> nn.Module:
    """Pairs that do something: B is not zero."""
    model = apply_lora(copy.deepcopy(base).double() if double else copy.deepcopy(base), peft)
    for number, pair in enumerate(_pairs(model).values()):
        nn.init.normal_(pair.lora_B["default"].weight, std=0.05, generator=torch.Generator().manual_seed(number))
    return model


def logits(model: nn.Module) -> torch.Tensor:
    """Of a fixed text, without dropout."""
    with torch.no_grad():
        return model.eval()(TOKENS, use_cache=False).logits


def naive_copy(base: nn.Module, model: nn.Module) -> nn.Module:
    """The base with ten plain lines in place of each pair."""
    plain = copy.deepcopy(base).double().requires_grad_(False)
    for name, pair in _pairs(model).items():
        name = name.removeprefix("base_model.model.")
        lora = NaiveLora(plain.get_submodule(name), ALL.dim, ALL.alpha)
        lora.A.data, lora.B.data = pair.lora_A["default"].weight.data.clone(), pair.lora_B["default"].weight.data.clone()
        plain.set_submodule(name, lora)
    return plain


def test_every_pair_is_the_ten_lines(base):
    """Logits and gradients in float64, all layers at once."""
    model = with_pairs(base, double=True)
    plain = naive_copy(base, model)
    found, expected = model(TOKENS, use_cache=False).logits, plain(TOKENS, use_cache=False).logits
    assert (found - logits(base.double())).abs().max() > 1e-3, "the pairs do something"
    base.float()
    assert torch.allclose(found, expected, atol=8 * EXACT, rtol=0)
    for output in (found, expected):
        output.square().mean().backward()
    for name, pair in _pairs(model).items():
        lora = plain.get_submodule(name.removeprefix("base_model.model."))
        assert torch.allclose(pair.lora_A["default"].weight.grad, lora.A.grad, atol=8 * EXACT, rtol=8 * EXACT) and lora.A.grad.abs().max() > 0
        assert torch.allclose(pair.lora_B["default"].weight.grad, lora.B.grad, atol=8 * EXACT, rtol=8 * EXACT)


def test_it_begins_as_the_base_and_moves_only_the_pairs(base):
    model = apply_lora(copy.deepcopy(base), ALL)
    assert torch.equal(logits(model), logits(base))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model.train()(TOKENS, use_cache=False).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = {n.replace(".base_layer", "").removeprefix("base_model.model."): t for n, t in model.state_dict().items() if ".lora_" not in n}
    assert kept.keys() == base.state_dict().keys() and all(torch.equal(t, base.state_dict()[n]) for n, t in kept.items())
    assert not torch.equal(logits(model), logits(base))


@pytest.mark.parametrize("how", ["xavier", "uniform"])
def test_the_start(base, how):
    """The two distributions, by the seed, with no one else's random numbers touched."""
    before = torch.get_rng_state()
    one, same, other = (apply_lora(copy.deepcopy(base), PeftSection(dim=32, lora_A_init=how), seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    for name, pair in _pairs(one).items():
        A = pair.lora_A["default"].weight
        assert torch.equal(A, _pairs(same)[name].lora_A["default"].weight) and not torch.equal(A, _pairs(other)[name].lora_A["default"].weight)
        limit = 1 / math.sqrt(pair.in_features)
        spread = math.sqrt(2 / (pair.in_features + 32)) if how == "xavier" else limit / math.sqrt(3)
        assert abs(A.std().item() / spread - 1) < 0.15 and (A.abs().max() > limit) == (how == "xavier")
        assert not pair.lora_B["default"].weight.any()


@pytest.mark.parametrize("position", ["pre", "post"])
def test_where_dropout_sits(base, position):
    """Late dropout zeroes entries of what the pair says; early dropout never does, since each entry is a sum over what is left."""
    model = with_pairs(base, PeftSection(dim=4, dropout=0.5, dropout_position=position, target_modules=("in_proj",)))
    pair = next(iter(_pairs(model).values()))
    x = torch.randn(100, pair.in_features, generator=torch.Generator().manual_seed(0))
    said = {mode: (pair.train(mode)(x) - pair.base_layer(x)).detach() for mode in (True, False)}
    assert not torch.allclose(said[True], said[False], atol=1e-3), "it drops in training"
    unit = torch.finfo(torch.float32).eps * largest(pair.base_layer(x))  # what is left when equal numbers are taken from each other
    zero = (said[True].abs() < FACTOR * unit).float().mean()
    assert abs(zero - 0.5) < 0.05 if position == "post" else zero < 0.01
    if position == "post":
        left = said[True].abs() > FACTOR * unit
        assert torch.allclose(said[True][left], 2 * said[False][left], atol=FACTOR * unit, rtol=0), "what is not dropped is scaled up, and nothing else is dropped"
    assert torch.equal(said[False], (pair.train(False)(x) - pair.base_layer(x)).detach())


def test_number_format(base):
    model = apply_lora(copy.deepcopy(base), PeftSection(dim=2, lora_dtype="bfloat16"))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16} and logits(model).dtype == torch.float32
    half = apply_lora(copy.deepcopy(base).bfloat16(), PeftSection(dim=2))
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.bfloat16}, "without a word, that of the weights"


# -- which layers ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "layers"),
    [
        (("linear_qkv",), {"2.q_proj", "2.k_proj", "2.v_proj"}),
        (("linear_proj", "linear_fc1"), {"2.o_proj", "1.shared_experts.up_proj"}),
        (("*.layers.0.*",), {"0.in_proj", "0.out_proj"}),
        (("decoder.layers.2.self_attention.linear_qkv",), {"2.q_proj", "2.k_proj", "2.v_proj"}),
        (("*.shared_experts.linear_fc*",), {"1.shared_experts.up_proj", "1.shared_experts.down_proj"}),
        (("model.layers.3.mixer.in_proj", "v_proj"), {"3.in_proj", "2.v_proj"}),
    ],
)
def test_both_languages_mean_the_same_layers(base, targets, layers):
    found = lora_targets(base, PeftSection(target_modules=targets))
    assert {n.removeprefix("model.layers.").replace(".mixer", "") for n in found} == layers
    model = apply_lora(copy.deepcopy(base), PeftSection(dim=2, target_modules=targets))
    assert {n.removeprefix("base_model.model.") for n in _pairs(model)} == set(found), "and peft puts pairs there, and nowhere else"


def test_all_but_some(base):
    every = lora_targets(base, PeftSection())
    assert len(every) == 10 and not any("lm_head" in n for n in every) and every == lora_targets(base, PeftSection(match_all_linear=True))
    assert set(every) - set(lora_targets(base, PeftSection(exclude_modules=("*out_proj*", "linear_qkv", "*lm_head*")))) == {n for n in every if n.rsplit(".", 1)[1] in ("out_proj", "q_proj", "k_proj", "v_proj")}


@pytest.mark.parametrize(
    ("peft", "said"),
    [
        ({"target_modules": ("linear_qvk",)}, "did you mean 'linear_qkv'"),
        ({"target_modules": ("*.layers.9.*.q_proj",)}, r"there are model\.layers\.2\.mixer\.q_proj"),
        ({"target_modules": ("q_proj", "lm_head")}, "output layer"),
        ({"target_modules": ("*.experts.*_proj",)}, "routed experts"),
        ({"exclude_modules": ("linear_quv",)}, "means no linear layer"),
        ({"exclude_modules": ("*",)}, "every linear layer is excluded"),
        ({"a2a_experimental": True}, "Megatron's ranks"),
    ],
)
def test_what_a_model_refuses(base, peft, said):
    with pytest.raises(UserError, match=said):
        apply_lora(copy.deepcopy(base), PeftSection(**peft))


@pytest.mark.parametrize(
    ("peft", "said"),
    [
        ({"target_modules": ["q_proj"], "exclude_modules": ["*out_proj*"]}, "exclude_modules with target_modules"),
        ({"target_modules": ["q_proj"], "match_all_linear": True}, "match_all_linear is true"),
        ({"lora_A_init": "xaver"}, "did you mean 'xavier'"),
        ({"lora_B_init": "xavier"}, "B begins at zero"),
        ({"dropout_position": "before"}, "unknown value"),
        ({"lora_dtype": "bf16"}, "unknown value"),
        ({"dim": 0}, r"peft\.dim: 0 is not positive"),
        ({"alpha": 0}, "not positive"),
        ({"dropout": 1.0}, r"peft\.dropout: 1\.0 is not in \[0, 1\)"),
        ({"enabled": True, "use_triton": True}, "4 tensor-parallel ranks"),
        ({"enabled": True, "a2a_experimental": True}, "engine is torch"),
    ],
)
def test_what_the_settings_refuse(peft, said):
    with pytest.raises(UserError, match=said):
        from_mapping(TrainConfig, {"data_dir": "d", "output_dir": "o", "peft": peft, "megatron": {"model.tensor_model_parallel_size": 4}})


def test_the_kernel_that_passes_over_a_pair(base):
    """With the fused Mamba kernel on, out_proj is refused, and all else is not."""
    model = copy.deepcopy(base)
    model.config.use_mamba_kernels = True
    with pytest.raises(UserError, match="never calls the layer"):
        apply_lora(model, PeftSection())
    apply_lora(model, PeftSection(exclude_modules=("*out_proj*",)))


def test_triton_is_answered_in_words(base, capsys):
    apply_lora(copy.deepcopy(base), PeftSection(dim=2, use_triton=True))
    said = capsys.readouterr().out
    assert "no kernel of NeMo RL here" in said and "routed experts stay frozen" in said


def test_without_peft(base, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install .*lora"):
        apply_lora(copy.deepcopy(base), ALL)


# -- files, sums, Megatron ------------------------------------------------------


def test_an_adapter_is_read_by_peft(tmp_path, base):
    model = with_pairs(base, PeftSection(dim=3, exclude_modules=("*out_proj*",)))
    save_adapter(model, tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    for loaded in (PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter"), load_adapter(copy.deepcopy(base), tmp_path / "adapter", trainable=True)):
        assert torch.equal(logits(loaded), logits(model))
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {n for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(UserError, match="exists already"):
        save_adapter(model, tmp_path / "adapter")
    with pytest.raises(UserError, match="no adapter here"):
        load_adapter(copy.deepcopy(base), tmp_path)
    with pytest.raises(UserError, match="call apply_lora first"):
        save_adapter(base, tmp_path / "none")


def test_pairs_beside_out_proj_travel_too(tmp_path, base, capsys):
    model = with_pairs(base)
    save_adapter(model, tmp_path / "adapter")
    assert "refuses to load them" in capsys.readouterr().out
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    fresh = copy.deepcopy(base)
    assert torch.equal(logits(load_adapter(fresh, tmp_path / "adapter")), logits(model)) and fresh.config.model_type == "nemotron_h"


def test_an_adapter_is_loaded_as_the_end_of_a_run_says(tmp_path, base):
    """Exported weights ask for the fused kernel; the plain scan takes it out of play, also for the pairs beside out_proj."""
    model = with_pairs(base)
    save_adapter(model, tmp_path / "adapter")
    exported = copy.deepcopy(base)
    exported.config.use_mamba_kernels = True
    assert torch.equal(logits(load_adapter(use_chunked_scan(exported), tmp_path / "adapter")), logits(model))


def test_the_sum_is_the_same_model(tmp_path, base):
    exact = with_pairs(base, double=True)
    plain = merged(exact)
    assert torch.allclose(logits(plain), logits(exact), atol=8 * EXACT, rtol=0) and not _pairs(plain) and _pairs(exact)
    state = merged_state(exact)
    assert all(torch.allclose(state[f"base_model.model.{n}"], t, atol=EXACT, rtol=EXACT) for n, t in plain.state_dict().items())
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    assert export_merged(exact, tmp_path / "tokenizer", tmp_path / "out").ok
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out", use_mamba_kernels=False, dtype=torch.float64)
    assert all(torch.equal(t, state[f"base_model.model.{n}"]) for n, t in whole.state_dict().items())


def test_tables_and_pictures(base):
    text = lora_picture(base, PeftSection(target_modules=("linear_qkv", "in_proj"))).text
    assert text.splitlines()[0].endswith("in_proj #  #") and "q_proj   # " in text and "experts.up_proj  e  " in text
    rows = parameter_table(apply_lora(copy.deepcopy(base), ALL)).text.splitlines()
    total = int(rows[-1].split()[1].replace(",", ""))
    assert total == sum(p.numel() for p in base.parameters())


def test_recipes_by_name(base):
    for name in RECIPES:
        assert lora_targets(base, lora_recipe(name).peft) and megatron_peft(lora_recipe(name).peft)
    assert (lora_recipe("super").lr, lora_recipe("super").peft.dim, lora_recipe("nano_rl").peft.alpha) == (1e-4, 32, 512)
    with pytest.raises(UserError, match="did you mean 'super'"):
        lora_recipe("supr")


def test_the_arguments_of_bridge(base):
    """Its patterns, matched by its rule on its names, mean the layers that ours mean."""

    def bridge(pattern: str, name: str) -> bool:
        """Its rule: the last name, or the whole one with wildcards."""
        return name.rpartition(".")[2] == pattern or re.match("^" + pattern.replace("*", "(.*)") + "$", name) is not None

    names = lora_targets(base, PeftSection())
    for targets in (("linear_qkv",), ("linear_fc*", "in_*"), ("*out_proj*",), ("q_proj", "k_proj", "v_proj"), ("*.layers.2.*.o_proj", "in_proj"), ("model.layers.1.mixer.shared_experts.up_proj",), ("*.mixer.shared_experts.*",)):
        peft = PeftSection(target_modules=targets)
        theirs = megatron_peft(peft)["target_modules"]
        expected = {megatron_name(n) for n in lora_targets(base, peft)}
        assert {m for m in map(megatron_name, names) if any(bridge(t, m) for t in theirs)} == expected
    assert megatron_peft(PeftSection())["exclude_modules"] == ["output_layer"] and megatron_peft(PeftSection())["target_modules"] == []
    assert (megatron_peft(PeftSection(lora_A_init="uniform"))["lora_A_init_method"], megatron_peft(PeftSection(lora_dtype="bfloat16"))["lora_dtype"]) == ("kaiming", torch.bfloat16)
    for wrong, said in ((PeftSection(target_modules=("q_proj",)), "one matrix"), (PeftSection(use_triton=True), "no such kernel")):
        with pytest.raises(UserError, match=said):
            megatron_peft(wrong)
