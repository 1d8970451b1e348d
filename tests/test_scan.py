"""The chunked scan against the recurrence, in values, gradients and carried state."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import NemotronHConfig, NemotronHForCausalLM
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from precision import EXACT, logits_error, near

from nemotron_nb.train.scan import ChunkedMixer, causal_conv, chunked_scan, scan_by_hand, use_chunked_scan


def draw(seed, R, T, H, P, G, N):
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    return normal(R, T, H, P), F.softplus(normal(R, T, H)), -normal(H).exp(), normal(R, T, G, N), normal(R, T, G, N)


def small_model(pattern="M*EM", dtype=torch.float64):
    config = NemotronHConfig(
        vocab_size=40, hidden_size=16, hybrid_override_pattern=pattern, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        ssm_state_size=4, mamba_num_heads=4, mamba_head_dim=8, n_groups=2, chunk_size=64, use_mamba_kernels=False, initializer_range=0.2,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, moe_shared_expert_intermediate_size=16, time_step_min=1e-6, experts_implementation="eager",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = NemotronHForCausalLM(config).to(dtype)
        for name, p in model.named_parameters():
            if name.endswith("conv1d.bias"):  # zero at the start, which would hide what padding does behind the convolution
                torch.nn.init.normal_(p)
        return model


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), T=st.integers(1, 50), chunk=st.integers(1, 64), heads=st.sampled_from([(1, 1), (4, 2), (4, 1), (3, 3)]), cut=st.floats(0, 1))
def test_values_and_state_equal_the_recurrence_for_any_chunk_and_any_cut(seed, T, chunk, heads, cut):
    inputs = draw(seed, 2, T, heads[0], 3, heads[1], 5)
    y, state = scan_by_hand(*inputs)
    at = int(cut * T)
    if 0 < at < T:
        part = lambda a, b: [t[:, a:b] if t.ndim > 1 else t for t in inputs]
        first, between = chunked_scan(*part(0, at), chunk=chunk)
        second, last = chunked_scan(*part(at, T), between, chunk=chunk)
        found = torch.cat([first, second], dim=1)
    else:
        found, last = chunked_scan(*inputs, chunk=chunk)
    torch.testing.assert_close(found, y, atol=8 * EXACT, rtol=0)
    torch.testing.assert_close(last, state, atol=8 * EXACT, rtol=0)


def test_gradients_equal_those_of_the_recurrence():
    inputs = [t.requires_grad_() for t in draw(1, 2, 21, 4, 3, 2, 5)]
    weight = torch.randn(2, 21, 4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = []
    for scan in (scan_by_hand, lambda *t: chunked_scan(*t, chunk=8)):
        y, state = scan(*inputs)
        gradients.append(torch.autograd.grad((y * weight).sum() + state.square().sum(), inputs))
    for by_hand, chunked in zip(*gradients):
        torch.testing.assert_close(chunked, by_hand, atol=8 * EXACT, rtol=8 * EXACT)


def test_large_steps_do_not_overflow():
    x, dt, a, b, c = draw(0, 1, 64, 2, 3, 1, 4)
    y, _ = chunked_scan(x, dt * 1e4, a, b, c)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y, scan_by_hand(x, dt * 1e4, a, b, c)[0], rtol=EXACT, atol=EXACT)


def test_convolution_is_causal_and_resumes():
    g = torch.Generator().manual_seed(0)
    x, w, bias = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((2, 9, 5), (5, 4), (5,)))
    y, _ = causal_conv(x, w, bias)
    padded = F.pad(x, (0, 0, 3, 0))
    by_hand = torch.stack([(padded[:, t : t + 4] * w.T).sum(1) + bias for t in range(9)], dim=1)
    torch.testing.assert_close(y, by_hand, rtol=EXACT, atol=EXACT)
    for at in range(1, 9):
        start, last = causal_conv(x[:, :at], w, bias)
        rest, _ = causal_conv(x[:, at:], w, bias, last[:, 1:])
        torch.testing.assert_close(torch.cat([start, rest], dim=1), y, rtol=EXACT, atol=EXACT)


def test_within_a_chunk_the_library_agrees_and_parameters_stay():
    library = small_model()
    ours = use_chunked_scan(copy.deepcopy(library))
    assert {type(m) for m in ours.modules()} >= {ChunkedMixer} and NemotronHMamba2Mixer not in {type(m) for m in ours.modules()}
    assert list(library.state_dict()) == list(ours.state_dict())
    tokens = torch.randint(0, 40, (3, 50), generator=torch.Generator().manual_seed(0))
    assert near(ours(tokens).logits, library(tokens).logits, logits_error(library, tokens))


@pytest.mark.parametrize("first", [1, 2, 3, 17])
def test_a_row_at_once_equals_its_parts_from_stored_state(first):
    model = use_chunked_scan(small_model())
    tokens = torch.randint(0, 40, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = model(tokens).logits
        step = model(tokens[:, :first], use_cache=True)
        parts = [step.logits]
        for t in range(first, 40):
            step = model(tokens[:, t : t + 1], past_key_values=step.past_key_values, use_cache=True)
            parts.append(step.logits)
    assert near(torch.cat(parts, dim=1), whole, logits_error(model, tokens))


def test_padding_on_the_left_is_silent_under_a_mask_only():
    model = use_chunked_scan(small_model())
    row = torch.randint(1, 40, (1, 33), generator=torch.Generator().manual_seed(0))
    padded = torch.cat([torch.full((1, 7), 5), row], dim=1)
    mask = torch.tensor([[0] * 7 + [1] * 33])
    with torch.no_grad():
        alone = model(row).logits
        assert near(model(padded, attention_mask=mask).logits[:, 7:], alone, logits_error(model, row))
        assert (model(padded).logits[:, 7:] - alone).abs().max() > 1e-2
