"""One layer: attention, optionally cross-attention, and an MLP, each with its norm and residual."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron.core import device
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import apply_prefix_mapping
from megatron.core.fusions.fused_bias_dropout import choose_bias_dropout_add, get_bias_dropout_add
from megatron.core.inference_params import InferenceParams
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.layer_split import layers_here
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig

#: A module to build, or a function that is used as it is.
Part = ModuleSpec | type | Callable[..., Any]


@dataclass
class TransformerLayerSubmodules:
    """The parts of a layer; what is not named does nothing.

    `sharded_state_dict_keys_map` renames parts in distributed checkpoints, so that layers built from
    different parts can read each other's files.
    """

    input_layernorm: Part = IdentityOp
    self_attention: Part = IdentityOp
    self_attn_bda: Part = IdentityFuncOp

    pre_cross_attn_layernorm: Part = IdentityOp
    cross_attention: Part = IdentityOp
    cross_attn_bda: Part = IdentityFuncOp

    pre_mlp_layernorm: Part = IdentityOp
    mlp: Part = IdentityOp
    mlp_bda: Part = IdentityFuncOp

    sharded_state_dict_keys_map: dict[str, str] = field(default_factory=dict)


def build_joint(part: Part, config: TransformerConfig) -> Any:
    """What adds a part's result to the stream: `get_bias_dropout_add` with its kernel chosen here, or the spec's own."""
    if part is get_bias_dropout_add and config.bias_dropout_fusion:
        return choose_bias_dropout_add(device.kind(), config.params_dtype)
    return build_module(part)


class BaseTransformerLayer(ABC):  # noqa: B024  (a marker: what a block may stack)
    """Anything a TransformerBlock can stack as a layer."""


class TransformerLayer(MegatronModule, BaseTransformerLayer):
    """A pre-norm layer: each part reads the normalised stream and adds its result to the stream.

    With `apply_residual_connection_post_layernorm` the normalised input itself is carried on, which (with the
    block's final norm) is the post-norm arrangement of the original transformer and of BERT.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        hidden_dropout: float | None = None,
        *,
        pg_collection: Any = None,
    ) -> None:
        """layer_number: 1-based within this stage's chunk; the attribute of that name counts over the
        whole model.
        """
        super().__init__(config)
        self.submodules_config = submodules
        self.layer_number = layer_number + layers_here(config, pg_collection).start
        self.hidden_dropout = config.hidden_dropout if hidden_dropout is None else hidden_dropout
        self.residual_is_normed = config.apply_residual_connection_post_layernorm
        norm = {
            "config": config,
            "hidden_size": config.hidden_size,
            "eps": config.layernorm_epsilon,
        }
        part = {"config": config, "pg_collection": pg_collection}

        self.input_layernorm = build_module(submodules.input_layernorm, **norm)
        self.self_attention = build_module(submodules.self_attention, layer_number=self.layer_number, **part)
        self.self_attn_bda = build_joint(submodules.self_attn_bda, config)

        self.pre_cross_attn_layernorm = build_module(submodules.pre_cross_attn_layernorm, **norm)
        self.cross_attention = build_module(
            submodules.cross_attention, layer_number=self.layer_number, **part
        )
        self.cross_attn_bda = build_joint(submodules.cross_attn_bda, config)
        self.has_cross_attention = not isinstance(self.cross_attention, IdentityOp)

        self.pre_mlp_layernorm = build_module(submodules.pre_mlp_layernorm, **norm)
        self.mlp = build_module(submodules.mlp, **part)
        if hasattr(self.mlp, "set_layer_number"):
            self.mlp.set_layer_number(self.layer_number)
        self.mlp_bda = build_joint(submodules.mlp_bda, config)
        # Around the joints in forward passes that users' subclasses took over from v0.9.
        self.bias_dropout_add_exec_handler = torch.enable_grad

    @staticmethod
    def _get_layer_offset(config: TransformerConfig) -> int:
        """Layers of the model that come before this rank's current chunk."""
        return layers_here(config).start

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s/sp, b, h], masks bool [b or 1, 1, sq, sk] (True = hidden) or None, context
        [sk/sp, b, h] -> hidden_states [s/sp, b, h] and the context (which a cross-attention may replace).
        """
        fused = self.config.bias_dropout_fusion
        training = self.training

        normed = self.input_layernorm(hidden_states)
        residual = normed if self.residual_is_normed else hidden_states
        attended = self.self_attention(
            normed,
            attention_mask=attention_mask,
            inference_params=inference_params,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
        )
        hidden_states = self.self_attn_bda(training, fused)(attended, residual, self.hidden_dropout)

        if self.has_cross_attention:
            normed = self.pre_cross_attn_layernorm(hidden_states)
            residual = normed if self.residual_is_normed else hidden_states
            attended = self.cross_attention(
                normed,
                attention_mask=context_mask,
                key_value_states=context,
                inference_params=inference_params,
            )
            if isinstance(attended, dict) and "context" in attended:
                context = attended["context"]
            hidden_states = self.cross_attn_bda(training, fused)(attended, residual, self.hidden_dropout)

        normed = self.pre_mlp_layernorm(hidden_states)
        residual = normed if self.residual_is_normed else hidden_states
        hidden_states = self.mlp_bda(training, fused)(self.mlp(normed), residual, self.hidden_dropout)
        return hidden_states, context

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """As every module's, with the parts renamed by `sharded_state_dict_keys_map`."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        renamed = {
            f"{prefix}{old}": f"{prefix}{new}"
            for old, new in self.submodules_config.sharded_state_dict_keys_map.items()
        }
        if renamed:
            apply_prefix_mapping(sharded, renamed)
        return sharded
