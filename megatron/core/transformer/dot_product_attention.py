"""Core attention: softmax(q k^T / sqrt(d)) v by the implementation that fits this model and machine."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from megatron.core import device, parallel_state, tensor_parallel
from megatron.core.context_parallel import choose_attention
from megatron.core.fusions.core_attention import AttentionSpec, matmul_softmax
from megatron.core.kernels import registry
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import derived
from megatron.core.utils import divide


class DotProductAttention(MegatronModule):
    """Scaled dot-product attention over this rank's heads; it has no parameters.

    The implementation for ordinary calls is chosen when the module is built; one for calls of another kind
    (an explicit mask, packed documents, a key/value cache) at the first such call.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        *,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config)
        groups = parallel_state.resolve(pg_collection)
        tp_size = groups.size("tp")
        self.layer_number = max(1, layer_number)
        self.attn_mask_type = attn_mask_type
        self.attention_type = attention_type
        self.hidden_size_per_attention_head = head = derived(config.kv_channels)
        self.num_attention_heads_per_partition = divide(config.num_attention_heads, tp_size)
        self.num_query_groups_per_partition = max(1, derived(config.num_query_groups) // tp_size)
        self.hidden_size_per_partition = self.num_attention_heads_per_partition * head
        self.softmax_scale = 1.0 / math.sqrt(head)
        self.dropout_p = config.attention_dropout if attention_dropout is None else attention_dropout
        self.window = config.window_size
        # Under sequence parallelism the whole block already draws from the rank's own random state.
        self.fork_random_state = self.dropout_p > 0.0 and not config.sequence_parallel
        self.context_parallel_size = groups.size("cp")
        self.context_parallel_group = groups.cp
        self._implementations: dict[tuple[bool, bool, bool, bool], Callable[..., Tensor]] = {}
        self._implementation(
            causal=attn_mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal),
            masked=attn_mask_type
            in (AttnMaskType.padding, AttnMaskType.padding_causal, AttnMaskType.arbitrary),
        )

    def _implementation(
        self, causal: bool, masked: bool, packed: bool = False, short_query: bool = False
    ) -> Callable[..., Tensor]:
        """The provider for calls of this kind (see fusions/core_attention.py for its contract)."""
        kind = (causal, masked, packed, short_query)
        if kind not in self._implementations:
            self._implementations[kind] = self._choose(*kind)
        return self._implementations[kind]

    def _choose(self, causal: bool, masked: bool, packed: bool, short_query: bool) -> Callable[..., Tensor]:
        config = self.config
        spec = AttentionSpec(
            device=device.kind(),
            dtype=config.params_dtype,
            head_dim=self.hidden_size_per_attention_head,
            heads=self.num_attention_heads_per_partition,
            groups=self.num_query_groups_per_partition,
            causal=causal,
            masked=masked,
            packed=packed,
            dropout=self.dropout_p > 0.0,
            window=self.window is not None,
            context_parallel=self.context_parallel_size,
            softmax_in_fp32=config.attention_softmax_in_fp32,
            layer_scaling=config.apply_query_key_layer_scaling,
            deterministic=config.deterministic_mode,
            short_query=short_query,
        )
        demand = registry.Demand("flash_attn", "--use-flash-attn") if config.use_flash_attn else None
        if self.context_parallel_size > 1:
            return choose_attention(config.context_parallel_algo, spec, self.context_parallel_group, demand)
        # Without the fusion attention is v0.9's sequence of plain operations.
        allow = None if config.masked_softmax_fusion else ("matmul_softmax",)
        attend = registry.select("core_attention", spec, allow=allow, demand=demand)
        if attend is matmul_softmax:
            # The others keep scores in fp32, where neither setting changes anything.
            coefficient = float(self.layer_number) if config.apply_query_key_layer_scaling else 1.0
            in_fp32 = config.attention_softmax_in_fp32
            attend = functools.partial(attend, softmax_in_fp32=in_fp32, layer_coefficient=coefficient)
        return attend

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [sq, b, np, hn], key and value [sk, b, ng, hn], attention_mask bool broadcastable to [b, np,
        sq, sk] with True = hidden, or None -> context [sq, b, np * hn]. Packed documents: [t, np, hn] and [t,
        ng, hn] -> [t, np * hn].

        A given mask says everything (a causal one hides the future itself); with type `padding_causal` the
        future is hidden besides, with `no_mask` the mask is ignored.
        """
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        mask = None if mask_type is AttnMaskType.no_mask else attention_mask
        causal = mask_type is AttnMaskType.padding_causal or (
            mask_type is AttnMaskType.causal and mask is None
        )
        packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        if packed:
            query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        attend = self._implementation(
            causal,
            mask is not None,
            packed,
            short_query=query.size(0) != key.size(0) and self.attention_type == "self",
        )
        dropout_p = self.dropout_p if self.training else 0.0
        fork = self.fork_random_state and self.training
        with tensor_parallel.get_cuda_rng_tracker().fork() if fork else nullcontext():
            context = attend(
                query,
                key,
                value,
                mask,
                causal=causal,
                scale=self.softmax_scale,
                dropout_p=dropout_p,
                packed=packed_seq_params if packed else None,
                window=self.window,
            )
        return context.squeeze(1) if packed else context
