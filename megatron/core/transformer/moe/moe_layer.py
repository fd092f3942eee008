"""The layer that replaces an MLP: route, dispatch, run experts, combine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import GroupedMLP, SequentialMLP
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoETokenDispatcher,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import derived
from megatron.core.utils import divide

#: alltoall_seq differs from alltoall in the path of the tokens only, not in what is computed.
DISPATCHERS: dict[str, Callable[..., MoETokenDispatcher]] = {
    "allgather": MoEAllGatherTokenDispatcher,
    "alltoall": MoEAlltoAllTokenDispatcher,
    "alltoall_seq": MoEAlltoAllTokenDispatcher,
}


class BaseMoELayer(MegatronModule, ABC):
    """Which experts are local; the parts come from the subclass."""

    router: TopKRouter

    def __init__(
        self, config: TransformerConfig, layer_number: int | None = None, *, pg_collection: Any = None
    ) -> None:
        super().__init__(config)
        groups = parallel_state.resolve(pg_collection)
        self.expert_parallel_size = groups.size("ep")
        self.layer_number = layer_number
        if config.moe_extended_tp:
            self.num_local_experts, first = derived(config.num_moe_experts), 0
        else:
            self.num_local_experts = divide(derived(config.num_moe_experts), self.expert_parallel_size)
            first = groups.rank("ep") * self.num_local_experts
        self.local_expert_indices = list(range(first, first + self.num_local_experts))

    @abstractmethod
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s/sp, b, h] -> [s/sp, b, h] and a bias or None."""

    def set_layer_number(self, layer_number: int) -> None:
        """Tell layer and router their place in the model (from 1)."""
        self.layer_number = layer_number
        self.router.set_layer_number(layer_number)


class MoELayer(BaseMoELayer):
    """A mixture of experts (Shazeer et al., arXiv:1701.06538; Mixtral, arXiv:2401.04088)."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules | None = None,
        layer_number: int | None = None,
        *,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config, layer_number, pg_collection=pg_collection)
        kind = config.moe_token_dispatcher_type
        if kind not in DISPATCHERS:
            raise ValueError(
                f"moe_token_dispatcher_type (--moe-token-dispatcher-type) is one of {', '.join(DISPATCHERS)}, not {kind!r}"
            )
        if config.moe_extended_tp and kind != "allgather":
            raise ValueError(
                "moe_extended_tp (--moe-extended-tp) works with the allgather dispatcher only; "
                "set --moe-token-dispatcher-type allgather"
            )
        self.router = TopKRouter(config, pg_collection=pg_collection)
        if config.moe_grouped_gemm:
            self.experts: GroupedMLP | SequentialMLP = GroupedMLP(
                self.num_local_experts, config, pg_collection=pg_collection
            )
        else:
            if submodules is None:
                raise ValueError(
                    "experts that run one by one need the spec of their projections (MLPSubmodules)"
                )
            self.experts = SequentialMLP(
                self.num_local_experts, config, submodules, pg_collection=pg_collection
            )
        self.token_dispatcher = DISPATCHERS[kind](
            self.num_local_experts, self.local_expert_indices, config, pg_collection=pg_collection
        )
        self.tp_size = parallel_state.resolve(pg_collection).size("tp")

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """hidden_states [s/sp, b, h] -> [s/sp, b, h] and what its experts' biases add to it, or None."""
        if self.training and self.tp_size > 1 and not self.config.sequence_parallel:
            raise ValueError(
                "training experts with tensor parallelism needs sequence parallelism: add --sequence-parallel "
                "(each tensor parallel rank must route tokens of its own)"
            )
        if self.config.moe_layer_recompute and self.training:
            return tensor_parallel.checkpoint(self._route_and_run, False, hidden_states)
        return self._route_and_run(hidden_states)

    def _route_and_run(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        probs, indices = self.router(hidden_states)
        rows, per_expert = self.token_dispatcher.token_permutation(hidden_states, probs, indices)
        output, bias = self.experts(rows, per_expert)
        return self.token_dispatcher.token_unpermutation(output, bias)
