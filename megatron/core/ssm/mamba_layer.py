"""A state-space layer: norm, mixer, residual."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import apply_prefix_mapping
from megatron.core.inference_params import InferenceParams
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import Part, build_joint


@dataclass
class MambaLayerSubmodules:
    """The parts of a layer; what is not named does nothing.

    `sharded_state_dict_keys_map` renames parts in distributed checkpoints, as in TransformerLayerSubmodules.
    """

    norm: Part = IdentityOp
    mixer: Part = IdentityOp
    mamba_bda: Part = IdentityOp

    sharded_state_dict_keys_map: dict[str, str] = field(default_factory=dict)


class MambaLayer(MegatronModule):
    """Adds mixer(norm(x)) to the stream x. `layer_number` counts from 1 over the whole model.

    residual_in_fp32: the stream is widened to fp32 here, whatever it comes in.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MambaLayerSubmodules,
        mamba_ssm_ngroups: int = 8,
        layer_number: int = 1,
        residual_in_fp32: bool = False,
        *,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config)
        self.submodules_config = submodules
        self.layer_number = layer_number
        self.residual_in_fp32 = residual_in_fp32
        self.hidden_dropout = config.hidden_dropout
        self.norm = build_module(
            submodules.norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )
        self.mixer = build_module(
            submodules.mixer,
            config=config,
            d_model=config.hidden_size,
            ngroups=mamba_ssm_ngroups,
            layer_number=layer_number,
            pg_collection=pg_collection,
        )
        self.mamba_bda = build_joint(submodules.mamba_bda, config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        inference_params: InferenceParams | None = None,
        rotary_pos_emb: Tensor | None = None,
    ) -> Tensor:
        """hidden_states [s/sp, b, h] -> the same. Mask and rotary angles are those of the attention layers beside it."""
        del attention_mask, rotary_pos_emb
        residual = hidden_states.to(torch.float32) if self.residual_in_fp32 else hidden_states
        mixed = self.mixer(self.norm(hidden_states), inference_params=inference_params)
        join = self.mamba_bda(self.training, self.config.bias_dropout_fusion)
        return join(mixed, residual, self.hidden_dropout)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """The mixer's empty states for a batch."""
        return self.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """As every module's, with the parts renamed by `sharded_state_dict_keys_map`."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        names = self.submodules_config.sharded_state_dict_keys_map
        if names:
            apply_prefix_mapping(sharded, {f"{prefix}{old}": f"{prefix}{new}" for old, new in names.items()})
        return sharded
