"""The feed-forward part of a layer: up, activation (gated or not), down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core import device
from megatron.core.dist_checkpointing.mapping import (
    ReplicaId,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.kernels import registry
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import derived, sharded_state_dict_default

Activation = Callable[[Tensor, Tensor | None], Tensor]


@dataclass
class MLPSubmodules:
    """The two projections of an MLP."""

    linear_fc1: ModuleSpec | type | None = None
    linear_fc2: ModuleSpec | type | None = None


class MLP(MegatronModule):
    """h -> ffn -> h, split over tensor parallel ranks along ffn.

    A gated MLP projects to 2 x ffn, the gate in the first half of each rank's rows and the value in the
    second, and computes activation(gate) * value (Shazeer 2020, arXiv:2002.05202).
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        is_expert: bool = False,
        input_size: int | None = None,
        *,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config)
        self.input_size = input_size if input_size is not None else config.hidden_size
        ffn_hidden_size = derived(config.ffn_hidden_size) * (2 if config.gated_linear_unit else 1)
        self.linear_fc1 = build_module(
            submodules.linear_fc1,
            self.input_size,
            ffn_hidden_size,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=config.add_bias_linear,
            skip_bias_add=True,
            is_expert=is_expert,
            tp_comm_buffer_name="fc1",
            pg_collection=pg_collection,
        )
        self.activation_func = config.activation_func
        self.activation = choose_activation(config)
        self.linear_fc2 = build_module(
            submodules.linear_fc2,
            config.ffn_hidden_size,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=config.add_bias_linear,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=is_expert,
            tp_comm_buffer_name="fc2",
            pg_collection=pg_collection,
        )

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Project up, apply the activation, project down.

        hidden_states [s/sp, b, h] -> output [s/sp, b, h]; bias [h] (or None) is returned unadded so that the
        caller can fuse it with dropout.
        """
        up, bias = self.linear_fc1(hidden_states)  # [s, b, f/tp], 2f/tp when gated
        return self.linear_fc2(self.activation(up, bias))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """As every module's; a gated fc1 is cut so that the file holds [all gate rows; all value rows]."""
        sharded: dict[str, Any] = {}
        for name, module in self.named_children():
            part = sharded_state_dict_default(module, f"{prefix}{name}.", sharded_offsets, metadata)
            if self.config.gated_linear_unit and name == "linear_fc1":
                for key, piece in part.items():
                    if isinstance(piece, ShardedTensor) and key.endswith((".weight", ".bias")):
                        part[key] = apply_swiglu_sharded_factory(piece, sharded_offsets)
            sharded.update(part)
        return sharded


def choose_activation(config: TransformerConfig) -> Activation:
    """The function (projected [*, f], bias [f] or None) -> activated [*, f] (half as wide when gated).

    Fusion applies to the activations that have a fused form; any other is computed in plain steps.
    """
    activation, gated = config.activation_func, config.gated_linear_unit
    if config.bias_activation_fusion:
        spec = registry.Spec(device.kind(), config.params_dtype)
        if gated and activation is F.silu:
            bias_swiglu, store_fp8 = (
                registry.select("bias_swiglu", spec),
                config.activation_func_fp8_input_store,
            )
            return lambda x, bias: bias_swiglu(x, bias, store_fp8)
        if gated and activation is F.gelu:
            return registry.select("bias_geglu", spec)
        if activation is F.gelu and not gated and config.add_bias_linear:
            return registry.select("bias_gelu", spec)

    def plain(x: Tensor, bias: Tensor | None) -> Tensor:
        x = x if bias is None else x + bias
        if not gated:
            return activation(x)
        gate, value = x.chunk(2, dim=-1)
        return activation(gate) * value

    return plain


def apply_swiglu_sharded_factory(
    original_sh_ten: ShardedTensor, sharded_offsets: tuple[tuple[int, int, int], ...]
) -> ShardedTensorFactory:
    """Describe a local [gate; value] tensor as two pieces of one global [gate; value] tensor.

    With tp ranks the global axis 0 has 2 tp fragments, of which rank r holds number r (gate) and tp + r
    (value).
    """
    prepended = len(sharded_offsets)
    axis = prepended
    local_rows = original_sh_ten.local_shape[0]
    if original_sh_ten.global_offset[axis] % local_rows:
        raise ValueError(
            f"{original_sh_ten.key}: global offset {original_sh_ten.global_offset} is no multiple of the {local_rows} "
            "local rows; a gated projection must be cut evenly over tensor parallel ranks"
        )
    rank = original_sh_ten.global_offset[axis] // local_rows
    fragments = derived(original_sh_ten.axis_fragmentations)[axis]
    half_shape = (local_rows // 2, *original_sh_ten.local_shape[1:])
    half_size = 1
    for extent in half_shape:
        half_size *= extent

    def pieces(key: str, t: Tensor, replica_id: ReplicaId, flattened_range: slice | None) -> Any:
        offsets = [(axis, rank, 2 * fragments), (axis, rank + fragments, 2 * fragments)]
        if flattened_range is None:
            return [
                ShardedTensor.from_rank_offsets(
                    key,
                    half,
                    *sharded_offsets,
                    offset,
                    replica_id=replica_id,
                    prepend_axis_num=prepended,
                )
                for half, offset in zip(t.chunk(2, dim=0), offsets)
            ]
        # A distributed optimizer owns an arbitrary slice of the flattened local tensor: cut it at the
        # gate/value border.
        gate_length = max(0, min(flattened_range.stop, half_size) - flattened_range.start)
        owned = [
            (t[:gate_length], slice(flattened_range.start, flattened_range.start + gate_length)),
            (
                t[gate_length:],
                slice(
                    max(0, flattened_range.start - half_size),
                    max(0, flattened_range.stop - half_size),
                ),
            ),
        ]
        return [
            ShardedTensor.from_rank_offsets_flat(
                key,
                part,
                half_shape,
                *sharded_offsets,
                offset,
                replica_id=replica_id,
                prepend_axis_num=prepended,
                flattened_range=part_range,
            )
            for (part, part_range), offset in zip(owned, offsets)
            if part.numel()
        ]

    def merge(sub_state_dict: Any) -> Tensor:
        with torch.no_grad():
            return torch.cat(sub_state_dict)

    return ShardedTensorFactory(
        original_sh_ten.key, derived(original_sh_ten.data), pieces, merge, original_sh_ten.replica_id
    )
