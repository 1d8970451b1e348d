"""The tiny model: Nano's traits, its counts, its random start, and what is refused."""

import json

import numpy as np
import pytest
import torch
from precision import logits_error, near, sum_error
from transformers import NemotronHForCausalLM

from nemotron_nb.core import UserError
from nemotron_nb.loss.two_stage import Denominators
from nemotron_nb.train.batches import Row, collate, share_of_loss
from nemotron_nb.train.model import active_parameters, build_model, count_parameters, family_config, tiny_config
from nemotron_nb.train.scan import ChunkedMixer
from nemotron_nb.train.settings import NANO, SUPER, ModelConfig

SMALL = ModelConfig(hidden_size=32, mamba_heads=2, expert_size=16, experts=4, attention_heads=2)


def layer_count(d, kind, shape):
    """Parameters of one layer, from the published numbers and the equations of its mixer."""
    inner, conv = shape["mamba_num_heads"] * shape["mamba_head_dim"], shape["mamba_num_heads"] * shape["mamba_head_dim"] + 2 * shape["n_groups"] * shape["ssm_state_size"]
    if kind == "M":
        return d * (inner + conv + shape["mamba_num_heads"]) + conv * 5 + 3 * shape["mamba_num_heads"] + inner + inner * d + d
    if kind == "*":
        return 2 * d * shape["num_attention_heads"] * shape["head_dim"] + 2 * d * shape["num_key_value_heads"] * shape["head_dim"] + d
    latent = shape.get("moe_latent_size")
    routed = 2 * (latent or d) * shape["moe_intermediate_size"] * shape["n_routed_experts"]
    return routed + (2 * d * latent if latent else 0) + d * shape["n_routed_experts"] + 2 * d * shape["moe_shared_expert_intermediate_size"] + d


@pytest.mark.parametrize("shape, published", [(NANO, 31.6e9), (SUPER, 120.6e9)])
def test_counts_equal_the_arithmetic_and_the_published_size(shape, published):
    d = shape["hidden_size"]
    by_hand = 2 * 131_072 * d + d + sum(layer_count(d, kind, shape) for kind in shape["hybrid_override_pattern"])
    total = sum(count_parameters(family_config(shape)).values())
    assert total == by_hand and abs(total - published) < 0.1e9


def test_active_parameters_leave_out_the_experts_a_token_does_not_meet():
    nano = family_config(NANO)
    idle = count_parameters(nano)["routed experts"] * 122 // 128
    assert active_parameters(nano) == 31_577_937_344 - 2 * 131_072 * 2688 - idle


def test_pattern_and_layers():
    config = tiny_config(100, SMALL)
    assert config.layers_block_type == ["mamba", "moe", "mamba", "attention", "moe", "mamba", "moe"]
    assert (config.routed_scaling_factor, config.norm_topk_prob, config.mlp_hidden_act, config.num_key_value_heads) == (2.5, True, "relu2", 2)
    assert config.moe_shared_expert_intermediate_size == 2 * config.moe_intermediate_size and not config.tie_word_embeddings


def test_the_seed_alone_decides_and_no_global_state_moves():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = build_model(SMALL, 64, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    second, third = build_model(SMALL, 64, seed=3), build_model(SMALL, 64, seed=4)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters()))
    random_parts = [n for n, p in first.named_parameters() if p.ndim > 1 or "dt_bias" in n]
    others = dict(third.named_parameters())
    assert all(not torch.equal(p, others[n]) for n, p in first.named_parameters() if n in random_parts)


def test_nothing_is_said_about_missing_kernels(capfd, caplog):
    build_model(SMALL, 64)
    said = capfd.readouterr()
    assert "fast path" not in said.err + said.out + caplog.text


def test_router_takes_the_best_and_bias_moves_choice_not_weight():
    moe = build_model(SMALL, 64).model.layers[1].mixer
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    moe.gate.e_score_correction_bias[2] = 0.3
    chosen, weights = moe.route_tokens_to_experts(logits)
    scores = logits.sigmoid()
    best = (scores + torch.tensor([0, 0, 0.3, 0])).topk(2).indices
    assert torch.equal(chosen.sort(1).values, best.sort(1).values)
    taken = scores.gather(1, chosen)
    torch.testing.assert_close(weights, 2.5 * taken / taken.sum(1, keepdim=True), rtol=sum_error(4), atol=0)


def test_folder_round_trip(tmp_path):
    model = build_model(SMALL, 64, seed=1)
    model.save_pretrained(tmp_path)
    again = build_model(ModelConfig(name=str(tmp_path)), 64)
    tokens = torch.randint(0, 64, (2, 70), generator=torch.Generator().manual_seed(0))
    assert isinstance(again, NemotronHForCausalLM) and isinstance(again.model.layers[0].mixer, ChunkedMixer)
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_a_vocabulary_too_small_is_refused(tmp_path):
    build_model(SMALL, 64).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="knows 64 tokens, the tokenizer 65"):
        build_model(ModelConfig(name=str(tmp_path)), 65)


def test_unknown_hub_name_offline_is_refused_at_once():
    with pytest.raises(UserError, match="hf download some/where"):
        build_model(ModelConfig(name="some/where"), 64)


def test_folders_that_are_no_checkpoint_are_refused(tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        build_model(ModelConfig(name=str(tmp_path)), 64)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="the weights cannot be read"):
        build_model(ModelConfig(name=str(tmp_path)), 64)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(UserError, match="no causal language model"):
        build_model(ModelConfig(name=str(tmp_path)), 64)


SIZES = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.2}


@pytest.mark.parametrize("kind, extra, message", [
    ("Llama", {}, None),
    ("GPT2", {}, None),
    ("BertLMHead", {}, "looks ahead"),
    ("Granite", {"logits_scaling": 8.0}, "more than hidden states times a matrix"),
])
def test_other_causal_models_are_welcome_and_models_with_other_manners_are_not(tmp_path, kind, extra, message):
    import transformers

    sizes = {"vocab_size": 90, "n_embd": 32, "n_layer": 2, "n_head": 2} if kind == "GPT2" else SIZES
    config = getattr(transformers, f"{kind.removesuffix('LMHead')}Config")(**sizes, **extra)
    name = {"BertLMHead": "BertLMHeadModel", "GPT2": "GPT2LMHeadModel"}.get(kind, f"{kind}ForCausalLM")
    torch.manual_seed(0)
    getattr(transformers, name)(config).save_pretrained(tmp_path)
    if message:
        with pytest.raises(UserError, match=message):
            build_model(ModelConfig(name=str(tmp_path)), 90)
        return
    model = build_model(ModelConfig(name=str(tmp_path)), 90).eval()
    micro = collate([Row(np.arange(1, 20), np.arange(2, 21), np.arange(19) > 4, "one"), Row(np.arange(30, 37), np.arange(31, 38), np.arange(7) > 2, "two")])
    loss, nll = share_of_loss(model, micro, "token", Denominators(18, 2))
    alone = torch.nn.functional.cross_entropy(model(micro.tokens[1:, :7]).logits[0], micro.labels[1, :7], reduction="none")
    assert near(nll[1, 3:7], alone[3:], logits_error(model, micro.tokens))
    assert loss.item() == pytest.approx(nll.sum().item() / 18, rel=sum_error(18))


@pytest.mark.parametrize("config, message", [
    (ModelConfig(name="a/b", hidden_size=64), "hidden_size set beside"),
    (ModelConfig(pattern="*E"), "layer pattern"),
    (ModelConfig(pattern="MX"), "layer pattern"),
    (ModelConfig(experts=2, experts_per_token=3), "3 of 2 experts"),
    (ModelConfig(mamba_heads=3), "mamba_heads"),
    (ModelConfig(attention_heads=3), "attention_heads"),
])
def test_settings_that_cannot_be_meant_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        build_model(config, 64)
