"""Self- and cross-attention: project to queries, keys and values, rotate, look up the cache, attend,
project back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.core import parallel_state, tensor_parallel
from megatron.core.errors import InvariantError
from megatron.core.inference_params import InferenceParams
from megatron.core.models.common.embeddings.rotary_pos_embedding import choose_rotation
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType, AttnType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import derived
from megatron.core.utils import divide

RotaryTables = Tensor | tuple[Tensor, Tensor] | None


@dataclass
class SelfAttentionSubmodules:
    """Parts of self-attention; the norms of queries and keys are optional."""

    linear_qkv: ModuleSpec | type | None = None
    core_attention: ModuleSpec | type | None = None
    linear_proj: ModuleSpec | type | None = None
    q_layernorm: ModuleSpec | type | None = None
    k_layernorm: ModuleSpec | type | None = None


@dataclass
class CrossAttentionSubmodules:
    """Parts of cross-attention."""

    linear_q: ModuleSpec | type | None = None
    linear_kv: ModuleSpec | type | None = None
    core_attention: ModuleSpec | type | None = None
    linear_proj: ModuleSpec | type | None = None


class Attention(MegatronModule, ABC):
    """What self- and cross-attention share; heads are divided over tensor parallel ranks."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules | CrossAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        *,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        self.attn_mask_type = attn_mask_type
        self.attention_type = attention_type

        tp_size = parallel_state.resolve(pg_collection).size("tp")
        # Rows per rank of the query projection and of the keys' and values' (v0.9 names: whole model, not per
        # rank).
        head, groups = derived(config.kv_channels), derived(config.num_query_groups)
        self.query_projection_size = head * config.num_attention_heads
        self.kv_projection_size = head * groups
        self.hidden_size_per_attention_head = divide(self.query_projection_size, config.num_attention_heads)
        self.num_attention_heads_per_partition = divide(config.num_attention_heads, tp_size)
        self.num_query_groups_per_partition = max(1, groups // tp_size)

        self.core_attention = build_module(
            submodules.core_attention,
            config=config,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type=attention_type,
            pg_collection=pg_collection,
        )
        self.rotate = choose_rotation(config)
        self.checkpoint_core_attention = config.recompute_granularity == "selective"
        self.linear_proj = build_module(
            submodules.linear_proj,
            self.query_projection_size,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=config.add_bias_linear,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="proj",
            pg_collection=pg_collection,
        )

    @abstractmethod
    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden_states [sq/sp, b, h] and, for cross-attention, key_value_states [sk/sp, b, h] ->
        query [sq, b, np/tp, hn], key and value [sk, b, ng/tp, hn]."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        rotary_pos_emb: RotaryTables = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from hidden_states to themselves or to key_value_states.

        hidden_states [sq/sp, b, h], attention_mask bool [b or 1, 1, sq, sk] (True = hidden) or None,
        key_value_states [sk/sp, b, h] -> output [sq/sp, b, h] and the unadded bias [h] (None without biases).
        Packed documents come as one sequence [t, 1, h].
        """
        query, key, value = self.get_query_key_value_tensors(hidden_states, key_value_states)
        attn_mask_type = self.attn_mask_type
        tables = rotary_pos_emb if isinstance(rotary_pos_emb, tuple) else (rotary_pos_emb, rotary_pos_emb)
        if inference_params is not None and self.attention_type == "self":
            key, value, tables, attn_mask_type, attention_mask = self._extend_cache(
                inference_params, key, value, tables, attention_mask
            )
        packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        if packed:
            query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)

        if tables[0] is not None and tables[1] is not None:
            cu_q = packed_seq_params.cu_seqlens_q if packed and packed_seq_params else None
            cu_kv = packed_seq_params.cu_seqlens_kv if packed and packed_seq_params else None
            interleaved = self.config.rotary_interleaved
            query = self.rotate(query, tables[0], interleaved, cu_q)
            key = self.rotate(key, tables[1], interleaved, cu_kv)

        if self.checkpoint_core_attention and self.training:
            context = self._recomputed_core_attention(
                query, key, value, attention_mask, attn_mask_type, packed_seq_params
            )
        else:
            context = self.core_attention(
                query,
                key,
                value,
                attention_mask,
                attn_mask_type=attn_mask_type,
                packed_seq_params=packed_seq_params,
            )  # [sq, b, np/tp * hn]
        if packed:
            context = context.reshape(context.size(0), 1, -1)
        return self.linear_proj(context)

    def _recomputed_core_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType,
        packed_seq_params: PackedSeqParams | None,
    ) -> Tensor:
        """Core attention that keeps q, k, v only and is run again in the backward pass."""

        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return self.core_attention(
                query,
                key,
                value,
                attention_mask,
                attn_mask_type=attn_mask_type,
                packed_seq_params=packed_seq_params,
            )

        return tensor_parallel.checkpoint(run, False, query, key, value)

    def _extend_cache(
        self,
        inference_params: InferenceParams,
        key: Tensor,
        value: Tensor,
        tables: tuple[Tensor | None, Tensor | None],
        attention_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None], AttnMaskType, Tensor | None]:
        """Append this step's keys and values (before rotation) to the layer's cache and return all seen so
        far.

        key, value [sq, b, ng, hn] -> [offset + sq, b, ng, hn]; the rotary tables become those of the new
        queries and of all keys. One new position sees everything and needs no mask; several see the past by
        the causal rule.
        """
        memory = inference_params.key_value_memory_dict
        if self.layer_number not in memory:
            shape = (
                inference_params.max_sequence_length,
                inference_params.max_batch_size,
                self.num_query_groups_per_partition,
                self.hidden_size_per_attention_head,
            )
            memory[self.layer_number] = (key.new_empty(shape), value.new_empty(shape))
        key_memory, value_memory = memory[self.layer_number]
        start = inference_params.sequence_len_offset
        first = inference_params.batch_size_offset
        new, batch = key.shape[:2]
        stop, past_last = start + new, first + batch
        if stop > key_memory.size(0) or past_last > key_memory.size(1):
            raise InvariantError(
                "key/value cache",
                f"of {key_memory.size(0)} positions x {key_memory.size(1)} samples cannot take position {stop} of "
                f"sample {past_last}",
                "create InferenceParams with larger maxima",
            )
        key_memory[start:stop, first:past_last] = key
        value_memory[start:stop, first:past_last] = value
        key, value = key_memory[:stop, first:past_last], value_memory[:stop, first:past_last]
        if tables[0] is not None and tables[1] is not None:
            tables = (tables[0][start:stop], tables[1][:stop])
        if start == 0:
            return key, value, tables, self.attn_mask_type, attention_mask
        if new == 1:
            return key, value, tables, AttnMaskType.no_mask, None
        positions = torch.arange(stop, device=key.device)
        future = positions[None, :] > positions[start:, None]
        return key, value, tables, AttnMaskType.arbitrary, future[None, None]


class SelfAttention(Attention):
    """Queries, keys and values from one projection, packed group by group: its query heads, its key, its
    value.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.padding,
        *,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(
            config,
            submodules,
            layer_number,
            attn_mask_type,
            attention_type="self",
            pg_collection=pg_collection,
        )
        groups = parallel_state.resolve(pg_collection)
        self.tp_rank = groups.rank("tp")
        # With fewer groups than ranks several ranks share one group's key and value (and each takes some of
        # its queries).
        self.ranks_per_group = max(1, groups.size("tp") // derived(config.num_query_groups))
        self.linear_qkv = build_module(
            submodules.linear_qkv,
            config.hidden_size,
            self.query_projection_size + 2 * self.kv_projection_size,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=config.add_bias_linear or config.add_qkv_bias,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="qkv",
            pg_collection=pg_collection,
        )
        self.q_layernorm = self._head_norm(submodules.q_layernorm)
        self.k_layernorm = self._head_norm(submodules.k_layernorm)

    def _head_norm(self, spec: ModuleSpec | type | None) -> torch.nn.Module | None:
        if spec is None or spec is IdentityOp:
            return None
        return build_module(
            spec,
            hidden_size=self.hidden_size_per_attention_head,
            config=self.config,
            eps=self.config.layernorm_epsilon,
        )

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden_states [s/sp, b, h] -> query [s, b, np/tp, hn], key and value [s, b, ng/tp, hn]."""
        mixed, _ = self.linear_qkv(hidden_states)  # [s, b, (np + 2 ng)/tp * hn]
        head = self.hidden_size_per_attention_head
        if self.ranks_per_group > 1:
            mixed = self._share_of_group(mixed)
        groups = self.num_query_groups_per_partition
        heads_per_group = self.num_attention_heads_per_partition // groups
        mixed = mixed.view(*mixed.shape[:2], groups, (heads_per_group + 2) * head)
        query, key, value = mixed.split((heads_per_group * head, head, head), dim=3)
        if heads_per_group > 1:
            query = query.reshape(*query.shape[:2], -1, head)
        if self.q_layernorm is not None:
            query = self.q_layernorm(query)
        if self.k_layernorm is not None:
            key = self.k_layernorm(key)
        if self.config.test_mode:
            self.run_realtime_tests()
        return query, key, value

    def _share_of_group(self, mixed: Tensor) -> Tensor:
        """[s, b, (np + 2 ng)/tp * hn] cut across a group -> this rank's [queries | key | value] of its group.

        The projection's rows do not end at group borders when ranks outnumber groups, so the whole result is
        gathered; in the backward pass the ranks' gradients of a shared key and value are summed.
        """
        head = self.hidden_size_per_attention_head
        heads = self.num_attention_heads_per_partition
        whole = tensor_parallel.all_gather_last_dim_from_tensor_parallel_region(mixed)
        group, part = divmod(self.tp_rank, self.ranks_per_group)
        heads_per_group = heads * self.ranks_per_group
        base = group * (heads_per_group + 2)
        first = base + part * heads
        query = whole[..., first * head : (first + heads) * head]
        key_value = whole[..., (base + heads_per_group) * head : (base + heads_per_group + 2) * head]
        return torch.cat((query, key_value), dim=-1)

    def run_realtime_tests(self) -> None:
        """Check that the norms of queries and keys are equal on all tensor parallel ranks (all must call).

        InvariantError names this layer if a rank's copy has drifted.
        """
        for name in ("q_layernorm", "k_layernorm"):
            norm = getattr(self, name)
            if norm is None:
                continue
            own = torch.cat([p.detach().flatten().float() for p in norm.parameters()])
            gathered = tensor_parallel.gather_from_tensor_model_parallel_region(own)
            if not torch.equal(gathered, own.repeat(gathered.numel() // own.numel())):
                raise InvariantError(
                    f"layer {self.layer_number}",
                    f"{name} differs between tensor parallel ranks",
                    "reload a checkpoint in which they agree",
                )


class CrossAttention(Attention):
    """Queries from one sequence, keys and values (packed head by head) from another."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: CrossAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.padding,
        *,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(
            config,
            submodules,
            layer_number,
            attn_mask_type,
            attention_type="cross",
            pg_collection=pg_collection,
        )
        if config.num_query_groups != config.num_attention_heads:
            raise ValueError(
                "cross-attention has one key and value per query head: leave num_query_groups unset "
                "(--group-query-attention) for encoder-decoder models"
            )
        common = {
            "config": config,
            "init_method": config.init_method,
            "gather_output": False,
            "bias": config.add_bias_linear,
            "skip_bias_add": False,
            "is_expert": False,
            "pg_collection": pg_collection,
        }
        self.linear_q = build_module(
            submodules.linear_q, config.hidden_size, self.query_projection_size, **common
        )
        self.linear_kv = build_module(
            submodules.linear_kv, config.hidden_size, 2 * self.kv_projection_size, **common
        )

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden_states [sq/sp, b, h], key_value_states [sk/sp, b, h] -> query [sq, b, np/tp, hn], key and
        value [sk, b, np/tp, hn].
        """
        heads, head = self.num_attention_heads_per_partition, self.hidden_size_per_attention_head
        mixed, _ = self.linear_kv(key_value_states)
        key, value = mixed.view(*mixed.shape[:2], heads, 2 * head).split(head, dim=3)
        query, _ = self.linear_q(hidden_states)
        return query.view(*query.shape[:2], heads, head), key, value


__all__ = [
    "Attention",
    "AttnType",
    "CrossAttention",
    "CrossAttentionSubmodules",
    "SelfAttention",
    "SelfAttentionSubmodules",
]
