"""Which parts T5's encoder and decoder layers are made of."""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.gpt.gpt_layer_specs import FUSED_NORM_NAMES
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import (
    CrossAttention,
    CrossAttentionSubmodules,
    SelfAttention,
    SelfAttentionSubmodules,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_layer_norm import WrappedTorchLayerNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules


def encoder_model_with_local_spec() -> ModuleSpec:
    """An encoder layer of this library's own modules: bidirectional, under a padding mask, as BERT's."""
    return bert_layer_local_spec


def decoder_model_with_local_spec() -> ModuleSpec:
    """A decoder layer of this library's own modules: causal self-attention, then attention to the
    encoder's output.
    """
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
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_cross_attn_layernorm=WrappedTorchLayerNorm,
            cross_attention=ModuleSpec(
                module=CrossAttention,
                params={"attn_mask_type": AttnMaskType.padding},
                submodules=CrossAttentionSubmodules(
                    linear_q=ColumnParallelLinear,
                    linear_kv=ColumnParallelLinear,
                    core_attention=DotProductAttention,
                    linear_proj=RowParallelLinear,
                ),
            ),
            cross_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=WrappedTorchLayerNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=dict(FUSED_NORM_NAMES),
        ),
    )


def encoder_model_with_transformer_engine_default_spec() -> ModuleSpec:
    """The encoder layer for `--transformer-impl transformer_engine`; without that package the local one."""
    return encoder_model_with_local_spec()


def decoder_model_with_transformer_engine_default_spec() -> ModuleSpec:
    """The decoder layer for `--transformer-impl transformer_engine`; without that package the local one."""
    return decoder_model_with_local_spec()


def get_t5_encoder_with_local_block_spec(num_layers: int) -> TransformerBlockSubmodules:
    """An encoder block of `num_layers` local layers on this stage."""
    return TransformerBlockSubmodules([encoder_model_with_local_spec()] * num_layers, WrappedTorchLayerNorm)


def get_t5_decoder_with_local_block_spec(num_layers: int) -> TransformerBlockSubmodules:
    """A decoder block of `num_layers` local layers on this stage."""
    return TransformerBlockSubmodules([decoder_model_with_local_spec()] * num_layers, WrappedTorchLayerNorm)


def get_t5_encoder_with_transformer_engine_block_spec(num_layers: int) -> TransformerBlockSubmodules:
    """An encoder block of `num_layers` layers for `--transformer-impl transformer_engine`."""
    layer = encoder_model_with_transformer_engine_default_spec()
    return TransformerBlockSubmodules([layer] * num_layers, WrappedTorchLayerNorm)


def get_t5_decoder_with_transformer_engine_block_spec(num_layers: int) -> TransformerBlockSubmodules:
    """A decoder block of `num_layers` layers for `--transformer-impl transformer_engine`."""
    layer = decoder_model_with_transformer_engine_default_spec()
    return TransformerBlockSubmodules([layer] * num_layers, WrappedTorchLayerNorm)
