"""Plain PyTorch in place of the kernels of mamba_ssm and causal_conv1d. `install_mamba_reference` comes before megatron.core is imported."""

import sys

import torch
import torch.nn.functional as F
from cpu_import import module


def causal_convolution(x_BLC, weight_CW, bias_C, seq_BL):
    """Depthwise convolution that looks back only, and not across a change of `seq_BL`."""
    length, width = x_BLC.shape[1], weight_CW.shape[1]
    out = bias_C.expand_as(x_BLC) if bias_C is not None else torch.zeros_like(x_BLC)
    for k in range(width):
        back = width - 1 - k
        moved = F.pad(x_BLC, (0, 0, back, 0))[:, :length]
        same = F.pad(seq_BL, (back, 0), value=-1)[:, :length] == seq_BL
        out = out + moved * same.unsqueeze(-1) * weight_CW[:, k]
    return out


def mamba_split_conv1d_scan_combined(
    zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, initial_states=None, seq_idx=None, dt_limit=(0.0, float("inf")), return_final_states=False,
    activation="silu", rmsnorm_weight=None, rmsnorm_eps=1e-6, outproj_weight=None, outproj_bias=None, headdim=None, ngroups=1, norm_before_gate=True, state_dtype=None,
):
    """Convolution, selective scan and gate as one function, by the quadratic form of the scan. The signature of the kernel it replaces."""
    assert rmsnorm_weight is None and outproj_weight is None and initial_states is None and not return_final_states
    batch, length, _ = zxbcdt.shape
    heads, size = dt_bias.shape[0], headdim
    inner = heads * size
    state = (conv1d_weight.shape[0] - inner) // (2 * ngroups)
    z, mixed, dt = zxbcdt.split([inner, inner + 2 * ngroups * state, heads], -1)
    seq = seq_idx if seq_idx is not None else torch.zeros(batch, length, dtype=torch.int32)
    x, b, c = F.silu(causal_convolution(mixed, conv1d_weight, conv1d_bias, seq)).split([inner, ngroups * state, ngroups * state], -1)
    x = x.view(batch, length, heads, size).float()
    b, c = (t.view(batch, length, ngroups, state).repeat_interleave(heads // ngroups, 2).float() for t in (b, c))
    dt = F.softplus(dt.float() + dt_bias.float()).clamp(*dt_limit)
    decay = torch.cumsum(dt * A.float(), 1)
    between = decay[:, :, None] - decay[:, None]  # [B, to, from, heads]
    keep = torch.ones(length, length, dtype=torch.bool).tril() & (seq[:, :, None] == seq[:, None])
    weight = torch.einsum("bthn,bshn->btsh", c, b) * torch.exp(between.masked_fill(~keep.unsqueeze(-1), float("-inf"))) * dt[:, None]
    y = torch.einsum("btsh,bshp->bthp", weight, x) + x * (D.float()[:, None] if D.dim() == 1 else D.float())
    return (y.reshape(batch, length, inner) * F.silu(z.float())).to(zxbcdt.dtype)


class RMSNormGated(torch.nn.Module):
    """RMSNorm over groups of channels; the gate was applied before."""

    def __init__(self, hidden_size, eps=1e-5, group_size=None, norm_before_gate=True, device=None, dtype=None):
        super().__init__()
        self.eps, self.group_size = eps, group_size or hidden_size
        self.weight, self.bias = torch.nn.Parameter(torch.ones(hidden_size, dtype=dtype)), None

    def forward(self, x, z=None):
        assert z is None
        grouped = x.float().unflatten(-1, (-1, self.group_size))
        grouped = grouped * torch.rsqrt(grouped.pow(2).mean(-1, keepdim=True) + self.eps)
        return (grouped.flatten(-2) * self.weight.float()).to(x.dtype)


def install_mamba_reference():
    """Put the functions above where Megatron-Core looks for the kernels."""

    def refuse(*arguments, **options):
        raise RuntimeError("this kernel has no stand-in")

    def chunk_scan(x, dt, A, B, C, chunk_size, state_dtype=None, **options):
        refuse()

    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        module(name, __version__="2.3.0")
    module("mamba_ssm.ops.triton.layernorm_gated", RMSNorm=RMSNormGated)
    module("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=chunk_scan, mamba_split_conv1d_scan_combined=mamba_split_conv1d_scan_combined)
    module("causal_conv1d", __version__="1.6.0", causal_conv1d_fn=refuse)
    module("causal_conv1d.causal_conv1d_varlen", causal_conv1d_varlen_states=refuse)
    assert "mamba_ssm" in sys.modules
