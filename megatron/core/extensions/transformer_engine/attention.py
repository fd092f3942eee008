"""TransformerEngine's DotProductAttention as a core attention module."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
import transformer_engine as te
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

if TYPE_CHECKING:
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig


class TEDotProductAttention(te.pytorch.DotProductAttention):
    """softmax(q k^T) v by whichever backend TransformerEngine picks (cuDNN, flash-attn or its own)."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
    ) -> None:
        if config.apply_query_key_layer_scaling:
            raise ValueError(
                "TransformerEngine attention has no query-key layer scaling; use --transformer-impl local"
            )
        self.config = config
        self.qkv_format = "sbhd"
        options: dict[str, Any] = {}
        if config.context_parallel_size > 1:
            options["cp_group"] = parallel_state.get_context_parallel_group(check_initialized=False)
            options["cp_global_ranks"] = parallel_state.get_context_parallel_global_ranks(
                check_initialized=False
            )
            options["cp_stream"] = torch.cuda.Stream()
        if config.window_size is not None:
            options["window_size"] = config.window_size
        tracker = get_cuda_rng_tracker()
        super().__init__(
            num_attention_heads=config.num_attention_heads,
            kv_channels=config.kv_channels,
            num_gqa_groups=config.num_query_groups,
            attention_dropout=config.attention_dropout if attention_dropout is None else attention_dropout,
            attn_mask_type=attn_mask_type.name,
            attention_type=attention_type,
            layer_number=layer_number,
            sequence_parallel=config.sequence_parallel,
            tp_size=config.tensor_model_parallel_size,
            tp_group=parallel_state.get_tensor_model_parallel_group(check_initialized=False),
            get_rng_state_tracker=get_cuda_rng_tracker if tracker.is_initialized() else None,
            **options,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [sq, b, np, hn], key and value [sk, b, ng, hn] (packed: [t, n, hn]) -> [sq, b, np*hn] ([t,
        np*hn]).
        """
        packed = {} if packed_seq_params is None else vars_of(packed_seq_params)
        mask_type = attn_mask_type.name
        if packed.get("qkv_format") == "thd" and not mask_type.startswith("padding"):
            # documents of different lengths are padding to TransformerEngine
            mask_type = "padding_causal" if mask_type == "causal" else "padding"
        elif attention_mask is not None and mask_type == "causal":
            mask_type = "arbitrary"  # with "causal" the package would not look at the mask
        return super().forward(query, key, value, attention_mask, attn_mask_type=mask_type, **packed)


def vars_of(packed: PackedSeqParams) -> dict[str, Any]:
    """The record's fields as keyword arguments, without copying tensors."""
    return {field.name: getattr(packed, field.name) for field in dataclasses.fields(packed)}
