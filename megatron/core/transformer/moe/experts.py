"""The experts of one rank: one MLP each, or their weights side by side in two tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import (
    ReplicaId,
    ShardedBase,
    ShardedStateDict,
    ShardedTensor,
)
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.errors import InvariantError
from megatron.core.tensor_parallel.layers import new_weight
from megatron.core.tensor_parallel.placement import Placed
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.grouped_state import GroupedCell, GroupedWeight
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import derived, sharded_state_dict_default
from megatron.core.utils import divide


class SequentialMLP(MegatronModule):
    """A list of MLPs, run one after the other on their rows."""

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        *,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config)
        self.groups = parallel_state.resolve(pg_collection)
        self.num_local_experts = num_local_experts
        self.add_bias = config.add_bias_linear
        self.local_experts = torch.nn.ModuleList(
            MLP(config, submodules, is_expert=True, pg_collection=pg_collection)
            for _ in range(num_local_experts)
        )

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Rows [n, h] ordered by expert, rows per expert [e/ep] -> rows [n, h] and a bias per row [n, h] or
        None.

        An expert without rows is run on none, which gives its weights a zero gradient.
        """
        parts = permuted_local_hidden_states.split(tokens_per_expert.tolist())
        outputs: list[Tensor] = []
        biases: list[Tensor] = []
        for expert, rows in zip(self.local_experts, parts):
            output, bias = expert(rows)
            outputs.append(output)
            if bias is not None:
                biases.append(bias.expand_as(output))
        return torch.cat(outputs), torch.cat(biases) if biases else None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Experts stacked along one more axis in front, of the model's number of experts."""
        sharded: dict[str, Any] = {}
        first = self.groups.rank("ep") * self.num_local_experts
        total = self.groups.size("ep") * self.num_local_experts
        for local, expert in enumerate(self.local_experts):
            own = f"{prefix}local_experts.{local}."
            stacked = (*sharded_offsets, (len(sharded_offsets), first + local, total))
            part = sharded_state_dict_default(expert, own, stacked, metadata)
            replace_prefix_for_sharding(part, own, f"{prefix}experts.")
            replicas = parallel_state.get_data_modulo_expert_parallel_rank(with_context_parallel=True)
            for key, piece in part.items():
                if isinstance(piece, ShardedBase):
                    part[key] = replace(piece, replica_id=(*piece.replica_id[:2], replicas))  # type: ignore[type-var,index]
            sharded.update(part)
        return sharded


class GroupedMLP(MegatronModule):
    """All local experts' weights in two tensors, `weight1` [h, e*f] and `weight2` [e*f, h] (v0.9's layout, no
    biases).

    In memory weight1 is [e, h, f] (2f when gated, gate first) and weight2 [e, f, h].
    """

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, *, pg_collection: Any = None
    ) -> None:
        super().__init__(config)
        if config.add_bias_linear:
            raise InvariantError(
                "--moe-grouped-gemm",
                "grouped experts have no biases",
                "add --disable-bias-linear, or drop --moe-grouped-gemm",
            )
        self.groups = parallel_state.resolve(pg_collection)
        self.num_local_experts = num_local_experts
        extended = config.moe_extended_tp
        ranks = self.groups.size("tp_ep") if extended else self.groups.size("tp")
        inner = divide(derived(config.ffn_hidden_size), ranks)
        self.inner = inner
        up = inner * (2 if config.gated_linear_unit else 1)
        expert_parallel = config.expert_model_parallel_size > 1

        def weight(shape: tuple[int, int], dim: int, init_method: Any) -> torch.nn.Parameter:
            whole = tuple(size * ranks if axis == dim else size for axis, size in enumerate(shape))
            placed = Placed(dim=dim, over="tp", expert=expert_parallel)
            rank = self.groups.rank("tp_ep" if extended else "tp")
            return new_weight(shape, whole, placed, config, init_method, rank, ranks)[0]  # type: ignore[arg-type]

        self.weight1 = weight((config.hidden_size, num_local_experts * up), 1, derived(config.init_method))
        self.weight2 = weight(
            (num_local_experts * inner, config.hidden_size), 0, derived(config.output_layer_init_method)
        )
        self.activation_func = config.activation_func

    def forward(self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor) -> tuple[Tensor, None]:
        """Rows [n, h] ordered by expert, rows per expert [e/ep] -> rows [n, h]; partial sums where ffn is
        divided.
        """
        experts, width = self.num_local_experts, self.config.hidden_size
        up = self.weight1.view(experts, width, -1)
        down = self.weight2.view(experts, -1, width)
        parts = permuted_local_hidden_states.split(tokens_per_expert.long().tolist())
        return torch.cat([self._activate(rows @ up[i]) @ down[i] for i, rows in enumerate(parts)]), None

    def _activate(self, rows: Tensor) -> Tensor:
        if not self.config.gated_linear_unit:
            return self.activation_func(rows)
        gate, value = rows.chunk(2, dim=-1)
        return self.activation_func(gate) * value

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """The same pieces as SequentialMLP's, so that either reads the other's file: expert by expert,
        transposed, a gated projection cut into gate and value.
        """
        if self.config.moe_extended_tp:
            raise ValueError(
                "distributed checkpoints do not support --moe-extended-tp; use --ckpt-format torch"
            )
        experts, width = self.num_local_experts, self.config.hidden_size
        tp_rank, tp_size = self.groups.rank("tp"), self.groups.size("tp")
        first, total = self.groups.rank("ep") * experts, self.groups.size("ep") * experts
        depth = len(sharded_offsets)
        replicas = parallel_state.get_data_modulo_expert_parallel_rank(with_context_parallel=True)
        halves = 2 if self.config.gated_linear_unit else 1

        def fc1(key: str, t: Tensor, replica_id: ReplicaId, flattened_range: slice | None) -> Any:
            by_expert = t.view(experts, width, -1).transpose(1, 2)  # [e, f, h]
            return [
                ShardedTensor.from_rank_offsets(
                    key,
                    half.contiguous(),
                    *sharded_offsets,
                    (depth, first + i, total),
                    (depth + 1, tp_rank + part * tp_size, tp_size * halves),
                    replica_id=replica_id,
                    prepend_axis_num=depth + 1,
                )
                for i in range(experts)
                for part, half in enumerate(by_expert[i].chunk(halves, dim=0))
            ]

        def merge_fc1(parts: Any) -> Tensor:
            rows = [torch.cat(parts[i * halves : (i + 1) * halves]) for i in range(experts)]
            return torch.stack(rows).transpose(1, 2).reshape(width, -1)

        def fc2(key: str, t: Tensor, replica_id: ReplicaId, flattened_range: slice | None) -> Any:
            by_expert = t.view(experts, -1, width).transpose(1, 2)  # [e, h, f]
            return [
                ShardedTensor.from_rank_offsets(
                    key,
                    by_expert[i].contiguous(),
                    *sharded_offsets,
                    (depth, first + i, total),
                    (depth + 2, tp_rank, tp_size),
                    replica_id=replica_id,
                    prepend_axis_num=depth + 1,
                )
                for i in range(experts)
            ]

        def merge_fc2(parts: Any) -> Tensor:
            return torch.stack(parts).transpose(1, 2).reshape(-1, width)

        gated = tuple(
            (*sharded_offsets, (depth + 2, tp_rank + i * tp_size, tp_size * halves)) for i in range(halves)
        )
        whole = ((*sharded_offsets, (depth + 1, tp_rank, tp_size)),)
        replica: ReplicaId = (0, 0, replicas)
        names = {
            "weight1": ("linear_fc1", fc1, merge_fc1, GroupedCell(width, self.inner, halves), gated),
            "weight2": ("linear_fc2", fc2, merge_fc2, GroupedCell(self.inner, width, 1), whole),
        }
        return {
            f"{prefix}{own}": GroupedWeight(
                f"{prefix}experts.{layer}.weight",
                getattr(self, own),
                build,
                merge,
                replica,
                cell=cell,
                expert_axis=depth,
                experts=(first, total),
                offsets=offsets,
            )
            for own, (layer, build, merge, cell, offsets) in names.items()
        }
