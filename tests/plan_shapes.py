"""Small models that the planner is tried on: every kind of layer, latent experts; one with multi-token prediction as well."""

from dataclasses import replace

from nemotron_nb.megatron.parameters import Shape

SMALL = Shape(
    "ME*M", 128, heads=4, kv_heads=2, head_dim=32, mamba_heads=4, mamba_head_dim=32, groups=2, state=16, experts=8,
    experts_per_token=2, expert_size=96, shared_size=192, latent=64, vocab=512,
)  # fmt: skip
MID = replace(
    SMALL, pattern="MEM*EME", hidden=256, mamba_heads=8, heads=8, expert_size=160, shared_size=320, latent=128, vocab=1024,
    mtp_pattern="*E", mtp_depths=2,
)  # fmt: skip
