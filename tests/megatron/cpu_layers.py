"""Layers of a hybrid model for a CPU, given to Megatron-Core through its own ModuleSpec: parallel layers are Megatron's, kernels plain PyTorch.

Parameter names are those of Transformer Engine's layers, so that Megatron-Bridge maps checkpoints onto them.
"""

import types
from functools import partial

import torch
import torch.nn.functional as F
from cpu_import import module


class _GatherSequence(torch.autograd.Function):
    """The parts of a sequence from all ranks of a group, one behind the other; gradients go back to their rank."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        torch.distributed.all_gather(parts, x, group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient.chunk(ctx.group.size())[ctx.group.rank()].contiguous(), None


def partitioned_indices(cu_seqlens, total_tokens, cp_size, cp_rank):
    """The places of a row that a context-parallel rank gets, as Transformer Engine's kernel gives them: parts r and 2*cp-1-r of each sequence."""
    out = []
    for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()):
        part = (b - a) // (2 * cp_size)
        assert part * 2 * cp_size == b - a, "a sequence must be a multiple of 2*cp"
        out += [torch.arange(a + j * part, a + (j + 1) * part) for j in (cp_rank, 2 * cp_size - 1 - cp_rank)]
    return torch.cat(out)


def block_causal_attention(query, key, value, query_places, borders, scale=None):
    """Attention inside the sequences of a row. query [t,n,h], key and value [s,k,h], query_places [t]: where the queries lie in the row."""
    owner = lambda places: torch.bucketize(places, borders.to(torch.int64), right=True)
    key_places = torch.arange(key.shape[0])
    mask = (owner(query_places)[:, None] == owner(key_places)[None]) & (query_places[:, None] >= key_places[None])
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.squeeze(0).transpose(0, 1).flatten(1)


def make_layers():
    """The classes that derive from Megatron-Core's; imported late, in the process that is patched."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

    class PackedAttention(MegatronModule):
        """Core attention for packed rows; under context parallelism keys and values are gathered from all ranks."""

        def __init__(self, config, layer_number, attn_mask_type, attention_type, attention_dropout=None, softmax_scale=None, cp_comm_type=None, pg_collection=None, **options):
            super().__init__(config=config)
            self.softmax_scale, self.cp = softmax_scale, getattr(pg_collection, "cp", None)

        def forward(self, query, key, value, attention_mask, attn_mask_type=None, attention_bias=None, packed_seq_params=None):
            if packed_seq_params is None:  # [s,b,n,h]: one sequence a row
                s, b = query.shape[:2]
                rows = [block_causal_attention(query[:, i], key[:, i], value[:, i], torch.arange(s), torch.tensor([0, s]), self.softmax_scale) for i in range(b)]
                return torch.stack(rows, 1)
            q, k, v = (x.squeeze(1) if x.dim() == 4 else x for x in (query, key, value))
            p = packed_seq_params
            borders = p.cu_seqlens_q if p.cu_seqlens_q_padded is None else p.cu_seqlens_q_padded
            places, ranks = torch.arange(q.shape[0]), self.cp.size() if self.cp is not None else 1
            if ranks > 1:
                parts = [partitioned_indices(borders, q.shape[0] * ranks, ranks, r) for r in range(ranks)]
                back = torch.argsort(torch.cat(parts))
                k, v = (_GatherSequence.apply(x.contiguous(), self.cp)[back] for x in (k, v))
                places = parts[self.cp.rank()]
            return block_causal_attention(q, k, v, places, borders, self.softmax_scale)

    class Norm(torch.nn.Module):
        """RMSNorm in float32."""

        def __init__(self, config, hidden_size, eps=1e-5, **options):
            super().__init__()
            self.eps, self.weight = eps, torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
            self.weight.sequence_parallel = config.sequence_parallel

        def forward(self, x):
            return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)

    class LayerNormColumnParallelLinear(ColumnParallelLinear):
        """RMSNorm and Megatron's column-parallel layer in one, as Transformer Engine has it. Megatron-Bridge goes by the name."""

        def __init__(self, input_size, output_size, *, config, **options):
            options.pop("tp_comm_buffer_name", None)
            super().__init__(input_size, output_size, config=config, **options)
            self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
            self.layer_norm_weight.sequence_parallel = config.sequence_parallel
            self.eps, self.tp_size = config.layernorm_epsilon, self.tp_group.size()

        def forward(self, x, *arguments, **options):
            x = F.rms_norm(x.float(), (x.shape[-1],), self.layer_norm_weight.float(), self.eps).to(x.dtype)
            return super().forward(x, *arguments, **options)

        def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
            state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
            group = (metadata or {}).get("dp_cp_group")
            return state | make_sharded_tensors_for_checkpoint({"layer_norm_weight": self.layer_norm_weight}, prefix, {}, sharded_offsets, tp_group=self.tp_group, dp_cp_group=group)

    class Row(RowParallelLinear):
        """Megatron's row-parallel layer without an argument of Transformer Engine's."""

        def __init__(self, *arguments, **options):
            options.pop("tp_comm_buffer_name", None)
            super().__init__(*arguments, **options)
            self.tp_size = self.tp_group.size()

    class Column(ColumnParallelLinear):
        """Megatron's column-parallel layer without an argument of Transformer Engine's."""

        def __init__(self, *arguments, **options):
            options.pop("tp_comm_buffer_name", None)
            super().__init__(*arguments, **options)
            self.tp_size = self.tp_group.size()

    return types.SimpleNamespace(PackedAttention=PackedAttention, Norm=Norm, NormColumn=LayerNormColumnParallelLinear, Row=Row, Column=Column)


LAYERS = None  # filled by install


def install():
    """Make the layers, and tell Megatron-Core and Megatron-Bridge of those that a spec cannot name."""
    global LAYERS
    import megatron.core.models.hybrid.hybrid_block as hybrid_block
    import megatron.core.ssm.mamba_context_parallel as mamba_cp
    import megatron.core.utils as core_utils
    from megatron.bridge.models.conversion.param_mapping import AutoMapping

    LAYERS = make_layers()
    hybrid_stack_spec.__module__ = "megatron.core.models.hybrid.cpu_stack"  # checkpoints name it, and are read with names of Megatron only
    module(hybrid_stack_spec.__module__, hybrid_stack_spec=hybrid_stack_spec)
    hybrid_block.TENorm = LAYERS.Norm  # the last norm is not in the spec
    for kind, how in (("Row", "row"), ("Column", "column")):
        AutoMapping.register_module_type(kind, how)
    core_utils.tex = mamba_cp.tex = types.SimpleNamespace(thd_get_partitioned_indices=partitioned_indices)
    mamba_cp.HAVE_TEX, mamba_cp.is_te_min_version = True, lambda *arguments, **options: True


def hybrid_stack_spec(config=None):
    """The layers of a Nemotron 3 model, from Megatron's own modules and the layers above."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer import multi_token_prediction as mtp
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer, TransformerLayerSubmodules

    own, add = LAYERS, get_bias_dropout_add
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(linear_qkv=own.NormColumn, core_attention=own.PackedAttention, linear_proj=own.Row),
    )
    depth = ModuleSpec(
        module=mtp.MultiTokenPredictionLayer,
        submodules=mtp.MultiTokenPredictionLayerSubmodules(enorm=own.Norm, hnorm=own.Norm, eh_proj=own.Column, mtp_model_layer=None, layer_norm=own.Norm),
    )
    mixer = ModuleSpec(module=MambaMixer, submodules=MambaMixerSubmodules(in_proj=own.NormColumn, out_proj=own.Row))
    dense = partial(MLP.as_mlp_submodule, submodules=MLPSubmodules(linear_fc1=own.NormColumn, linear_fc2=own.Row))
    experts = get_moe_module_spec(use_te=False, num_experts=8, moe_grouped_gemm=False)
    return ModuleSpec(
        module=HybridStack,
        params={"post_layer_norm": True},
        submodules=HybridStackSubmodules(
            mamba_layer=ModuleSpec(module=MambaLayer, submodules=MambaLayerSubmodules(mixer=mixer, mamba_bda=add)),
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=TransformerLayerSubmodules(self_attention=attention, self_attn_bda=add)),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=TransformerLayerSubmodules(mlp=dense, mlp_bda=add)),
            moe_layer=ModuleSpec(module=MoETransformerLayer, submodules=TransformerLayerSubmodules(pre_mlp_layernorm=own.Norm, mlp=experts, mlp_bda=add)),
            mtp_block_spec=ModuleSpec(module=mtp.MultiTokenPredictionBlock, submodules=mtp.MultiTokenPredictionBlockSubmodules(layer_specs=[depth])),
        ),
    )


# What a CPU asks to be changed in a recipe for GPUs: kernels and overlaps off, float32, gloo. None of it changes what is computed.
CPU_PROFILE = {
    "mixed_precision": None,
    **{f"model.{name}": "float32" for name in ("params_dtype", "pipeline_dtype")},
    **{
        f"model.{name}": False
        for name in (
            "bf16", "moe_grouped_gemm", "moe_permute_fusion", "moe_shared_expert_overlap", "use_fused_weighted_squared_relu", "gradient_accumulation_fusion", "persist_layer_norm",
            "masked_softmax_fusion", "bias_dropout_fusion", "cross_entropy_loss_fusion", "apply_rope_fusion", "sequence_parallel", "use_te_rng_tracker",
        )
    },
    "model.hybrid_stack_spec": hybrid_stack_spec,
    "model.transformer_impl": "local",
    "model.attention_backend": "auto",
    "model.moe_token_dispatcher_type": "alltoall",
    "model.moe_flex_dispatcher_backend": None,
    "model.use_cpu_initialization": True,
    "model.tensor_model_parallel_size": 1,
    "model.expert_model_parallel_size": 1,
    "model.moe_aux_loss_coeff": 0.0,
    **{f"ddp.{name}": False for name in ("overlap_grad_reduce", "overlap_param_gather")},
    "optimizer.bf16": False,
    "optimizer.params_dtype": "float32",
    "optimizer.overlap_param_gather": False,
    "optimizer.use_precision_aware_optimizer": False,
    **{f"optimizer.{name}": "float32" for name in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")},
    "dataset.num_workers": 0,
    "dataset.pin_memory": False,
    "checkpoint.async_save": False,
    "checkpoint.fully_parallel_save": False,
    "dist.distributed_backend": "gloo",
    "dist.use_gloo_process_groups": True,
    "scheduler.override_opt_param_scheduler": True,
    "comm_overlap": None,
    "env_vars": {},
}
