"""Which parts a GPT layer is made of."""

from __future__ import annotations

import importlib
from typing import Any

from megatron.core import device
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.kernels import registry
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_layer_norm import WrappedTorchLayerNorm
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

#: In distributed checkpoints norms carry the names they have when fused into the next linear layer.
FUSED_NORM_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def get_gpt_layer_local_spec(
    num_experts: int | None = None, moe_grouped_gemm: bool = False, qk_layernorm: bool = False
) -> ModuleSpec:
    """A GPT layer of this library's own modules, with a dense MLP or, given `num_experts`, a mixture of
    experts.
    """
    head_norm = WrappedTorchLayerNorm if qk_layernorm else IdentityOp
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=WrappedTorchLayerNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=DotProductAttention,
                    linear_proj=RowParallelLinear,
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=WrappedTorchLayerNorm,
            mlp=_mlp_spec(num_experts, moe_grouped_gemm),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=dict(FUSED_NORM_NAMES),
        ),
    )


def get_gpt_layer_with_transformer_engine_spec(
    num_experts: int | None = None,
    moe_grouped_gemm: bool = False,
    qk_layernorm: bool = False,
    fp8: str | None = None,
) -> ModuleSpec:
    """A GPT layer for `--transformer-impl transformer_engine`: of that package's modules where it is installed and can run
    (a CUDA device), else of our own.

    Both compute the same and share distributed checkpoints. Which of the two it is stands in the kernel table. `fp8` is
    read from the configuration; the argument remains for callers that pass it.
    """
    build = registry.select("gpt_layer", registry.Spec(device.kind()))
    return build(num_experts, moe_grouped_gemm, qk_layernorm)


@registry.register("gpt_layer", "local", rank=0)
def _load_local() -> Any:
    return get_gpt_layer_local_spec


@registry.register(
    "gpt_layer",
    "transformer_engine",
    rank=10,
    needs=registry.Needs(cuda=True, packages={"transformer_engine": "1.0"}),
)
def _load_transformer_engine() -> Any:
    return importlib.import_module("megatron.core.extensions.transformer_engine.layer").gpt_layer_spec


def _mlp_spec(num_experts: int | None, moe_grouped_gemm: bool) -> ModuleSpec:
    dense = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    if num_experts is None:
        return ModuleSpec(module=MLP, submodules=dense)
    return ModuleSpec(module=MoELayer, submodules=None if moe_grouped_gemm else dense)


def _get_mlp_module_spec(
    use_te: bool | None = True,
    num_experts: int | None = None,
    moe_grouped_gemm: bool = False,
    fp8: str | None = None,
) -> ModuleSpec:
    """The MLP of a GPT layer; layer specs of users' own ask for it by v0.9's name. `fp8` is the configuration's matter."""
    layer = get_gpt_layer_with_transformer_engine_spec if use_te else get_gpt_layer_local_spec
    return layer(num_experts, moe_grouped_gemm).submodules.mlp
