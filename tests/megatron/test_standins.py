"""What stands in for kernels that need a GPU, against plain PyTorch. None of this needs Megatron."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from precision import rounding

from nemotron_nb.megatron.data import context_slices
from nemotron_nb.megatron.kernels import GroupedRMSNorm, packed_attention, partitioned_indices, split_conv_scan

BORDERS = [0, 4, 12, 13, 24]


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def scan_one_token_at_a_time(zxbcdt, weight, bias, dt_bias, a, d, head_size, groups):
    """Convolution and selective scan of one sequence [L,C] as a recurrence in float64, the definition."""
    heads, inner = len(dt_bias), len(dt_bias) * head_size
    state_size = (len(weight) - inner) // (2 * groups)
    z, mixed, dt = zxbcdt.double().split([inner, inner + 2 * groups * state_size, heads], -1)
    width, state, out = weight.shape[1], torch.zeros(heads, head_size, state_size, dtype=torch.float64), []
    for t in range(len(zxbcdt)):
        seen = [mixed[t - k] * weight[:, width - 1 - k].double() for k in range(min(width, t + 1))]
        x, b, c = F.silu(bias.double() + sum(seen)).split([inner, groups * state_size, groups * state_size])
        step = F.softplus(dt[t] + dt_bias.double())
        for h in range(heads):
            g = h * groups // heads
            x_h, b_h, c_h = x.view(heads, -1)[h], b.view(groups, -1)[g], c.view(groups, -1)[g]
            state[h] = state[h] * torch.exp(step[h] * a[h].double()) + step[h] * torch.outer(x_h, b_h)
            out.append(state[h] @ c_h + d[h].double() * x_h)
    return torch.stack(out).view(len(zxbcdt), inner) * F.silu(z)


def test_the_scan_starts_anew_at_each_border():
    heads, size, groups, state = 4, 3, 2, 5
    inner = heads * size
    channels = inner + 2 * groups * state
    weight, bias, dt_bias, a, d = rand(channels, 4, seed=1), rand(channels, seed=2), rand(heads, seed=3), -rand(heads, seed=4).exp(), rand(heads, seed=5)
    row = rand(1, 24, inner + channels + heads)
    seq = torch.from_numpy(np.searchsorted(BORDERS[1:], np.arange(24), "right"))[None].int()
    scan = lambda *given: split_conv_scan(*given, 8, seq_idx=seq, headdim=size, ngroups=groups)[0]  # noqa: E731
    inputs = row, weight, bias, dt_bias, a, d
    whole = scan(*inputs)
    alone = [scan_one_token_at_a_time(row[0, i:j], weight, bias, dt_bias, a, d, size, groups) for i, j in zip(BORDERS, BORDERS[1:])]
    assert (whole - torch.cat(alone)).abs().max() <= rounding(scan, *inputs)
    leaking = split_conv_scan(row, weight, bias, dt_bias, a, d, 8, headdim=size, ngroups=groups)[0]
    assert (leaking - whole)[BORDERS[1] :].abs().max() > 1e-2


def test_attention_sees_its_own_sequence_and_nothing_later():
    q, k, v = rand(24, 4, 8), rand(24, 2, 8, seed=1), rand(24, 2, 8, seed=2)
    whole = packed_attention(q, k, v, torch.arange(24), torch.tensor(BORDERS))
    for i, j in zip(BORDERS, BORDERS[1:]):
        for t in range(i, j):
            for head in range(4):
                by_hand = lambda query, keys, values: torch.softmax(keys @ query / 8**0.5, 0) @ values  # noqa: E731
                given = q[t, head], k[i : t + 1, head // 2], v[i : t + 1, head // 2]
                assert (whole[t].view(4, 8)[head] - by_hand(*given)).abs().max() <= rounding(by_hand, *given)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_context_slices_are_attended_as_the_whole(ranks):
    borders = [0, 12, 36, 36, 48]
    q, k, v = rand(48, 2, 4), rand(48, 2, 4, seed=1), rand(48, 2, 4, seed=2)
    attend = lambda q, k, v: packed_attention(q, k, v, torch.arange(48), torch.tensor(borders))  # noqa: E731
    whole, allowed = attend(q, k, v), rounding(attend, q, k, v)
    for rank in range(ranks):
        mine = partitioned_indices(torch.tensor(borders), 48, ranks, rank)
        assert mine.tolist() == context_slices(borders, ranks, rank).tolist()
        assert (packed_attention(q[mine], k, v, mine, torch.tensor(borders)) - whole[mine]).abs().max() <= allowed


def test_the_gated_norm_is_a_norm_of_groups():
    norm = GroupedRMSNorm(12, eps=1e-5, group_size=4)
    norm.weight.data = rand(12, seed=1)
    x = rand(3, 12)
    by_hand = lambda x, weight: torch.cat([F.rms_norm(part, (4,), eps=1e-5) for part in x.split(4, -1)], -1) * weight  # noqa: E731
    assert (norm(x) - by_hand(x, norm.weight)).abs().max() <= rounding(by_hand, x, norm.weight)
