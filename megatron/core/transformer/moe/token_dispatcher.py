"""Bringing tokens to the ranks of their experts, and the results back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel.mappings import gather_first_dim
from megatron.core.transformer.moe.moe_utils import DROPPED
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import derived


def assignments(
    probs: Tensor, indices: Tensor, padded: bool, num_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A router's result as a list ordered by expert: (token [n], probability [n], assignments per expert
    [e]).

    probs and indices are [t, k] naming experts (dropped ones left out of the list), or padded [e, c] naming
    tokens.
    """
    if padded:
        experts, capacity = indices.shape
        counts = torch.full((experts,), capacity, dtype=torch.long, device=indices.device)
        return indices.reshape(-1), probs.reshape(-1), counts
    flat = indices.reshape(-1)
    order = torch.argsort(flat, stable=True)
    kept = flat != DROPPED
    counts = torch.bincount(flat[kept], minlength=num_experts)
    order = order[: int(counts.sum())]
    return order // indices.size(1), probs.reshape(-1).index_select(0, order), counts


class MoETokenDispatcher(ABC):
    """Permute tokens before the experts and back after them."""

    def __init__(self, config: TransformerConfig, *, pg_collection: Any = None) -> None:
        self.config = config
        self.groups = parallel_state.resolve(pg_collection)

    @abstractmethod
    def token_permutation(self, tokens: Tensor, probs: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [s/sp, b, h] and the router's result -> (rows [n, h] of this rank's experts, in order;
        rows per local expert [e/ep]).
        """

    @abstractmethod
    def token_unpermutation(
        self, expert_output: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Rows [n, h] (and a bias per row) -> [s/sp, b, h], each token the weighted sum of its experts' results,
        and the same of the biases if they are not in that sum.
        """


class MoEAllGatherTokenDispatcher(MoETokenDispatcher):
    """Every rank receives all tokens of the tensor x expert group and keeps those its experts are to see."""

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: TransformerConfig,
        *,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config, pg_collection=pg_collection)
        self.num_local_experts = num_local_experts
        self.first_expert = local_expert_indices[0]
        self.gathers = config.sequence_parallel or config.expert_model_parallel_size > 1

    def token_permutation(
        self, hidden_states: Tensor, max_prob: Tensor, max_ind: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As the base class says."""
        self.hidden_shape = hidden_states.shape
        tokens = hidden_states.reshape(-1, hidden_states.size(-1))
        token_of, prob_of, counts = max_ind, max_prob, None
        if self.gathers:
            group = self.groups.tp_ep
            tokens = tensor_parallel.gather_from_sequence_parallel_region_to_moe(tokens, group=group)
            if group is not None and group.size() > 1:
                token_of = gather_first_dim(max_ind, group)
            prob_of = tensor_parallel.gather_from_sequence_parallel_region_to_moe(max_prob, group=group)
        experts = derived(self.config.num_moe_experts)
        token_of, prob_of, counts = assignments(prob_of, token_of, False, experts)
        start = int(counts[: self.first_expert].sum())
        counts = counts[self.first_expert : self.first_expert + self.num_local_experts]
        mine = slice(start, start + int(counts.sum()))
        self.gathered_shape = tokens.shape
        self.token_of, self.prob_of = token_of[mine], prob_of[mine]
        return tokens.index_select(0, self.token_of), counts

    def token_unpermutation(
        self, hidden_states: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As the base class says; biases come back apart."""
        if bias is not None and self.gathers:
            bias = bias / self.groups.size("tp")  # tensor parallel ranks hold the same biases, and are summed
        return self._combine(hidden_states), None if bias is None else self._combine(bias)

    def _combine(self, rows: Tensor) -> Tensor:
        weighted = rows * self.prob_of.unsqueeze(1)
        out = weighted.new_zeros(self.gathered_shape).index_add(0, self.token_of, weighted)
        if self.gathers:
            out = tensor_parallel.reduce_scatter_to_sequence_parallel_region_from_moe(
                out, group=self.groups.tp_ep
            )
        return out.view(self.hidden_shape)


class MoEAlltoAllTokenDispatcher(MoETokenDispatcher):
    """Tokens travel only to the ranks of their experts, and there are joined over the tensor parallel ranks."""

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: TransformerConfig,
        *,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config, pg_collection=pg_collection)
        self.num_local_experts = num_local_experts
        self.first_expert = local_expert_indices[0]
        self.ep, self.tp = self.groups.size("ep"), self.groups.size("tp") if config.sequence_parallel else 1

    def preprocess(self, counts: Tensor) -> Tensor:
        """Exchange counts: assignments per expert here [e] -> rows per (tensor rank, expert rank, local
        expert) that arrive here [tp, ep, e/ep]. All ranks of the tensor x expert group must call.
        """
        local = self.num_local_experts
        to_rank = counts.view(self.ep, local)
        self.input_splits = to_rank.sum(1).tolist()
        everywhere = counts.view(1, -1)
        if self.ep > 1:
            everywhere = gather_first_dim(everywhere, derived(self.groups.ep))
        if self.tp > 1:
            everywhere = gather_first_dim(everywhere, derived(self.groups.tp))
        arriving = everywhere.view(self.tp, self.ep, -1)[..., self.first_expert : self.first_expert + local]
        tp_rank = self.groups.rank("tp") if self.tp > 1 else 0
        self.output_splits = arriving[tp_rank].sum(1).tolist()
        self.tp_splits = arriving.sum((1, 2)).tolist()
        return arriving

    def token_permutation(
        self, hidden_states: Tensor, probs: Tensor, indices: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As the base class says."""
        self.hidden_shape = hidden_states.shape
        tokens = hidden_states.reshape(-1, hidden_states.size(-1))
        self.tokens_shape = tokens.shape
        padded = self.config.moe_pad_expert_input_to_capacity
        self.token_of, self.prob_of, counts = assignments(
            probs, indices, padded, derived(self.config.num_moe_experts)
        )
        arriving = self.preprocess(counts)
        rows = tokens.index_select(0, self.token_of)
        rows = tensor_parallel.all_to_all(self.groups.ep, rows, self.output_splits, self.input_splits)
        if self.tp > 1:
            rows = tensor_parallel.gather_from_sequence_parallel_region(
                rows, True, self.tp_splits, group=self.groups.tp
            )
        # Rows come ordered by (tensor rank, expert rank, local expert); experts want them together.
        source = torch.arange(self.num_local_experts, device=rows.device).repeat(self.tp * self.ep)
        by_chunk = torch.repeat_interleave(source, arriving.flatten())
        self.order = torch.argsort(by_chunk, stable=True)
        return rows.index_select(0, self.order), arriving.sum((0, 1))

    def token_unpermutation(self, hidden_states: Tensor, bias: Tensor | None = None) -> tuple[Tensor, None]:
        """As the base class says; biases travel in the sum."""
        rows = hidden_states
        if bias is not None:
            rows = rows + bias / self.tp  # tensor parallel ranks hold the same biases, and are summed
        rows = torch.empty_like(rows).index_copy(0, self.order, rows)
        if self.tp > 1:
            rows = tensor_parallel.reduce_scatter_to_sequence_parallel_region(
                rows, self.tp_splits, group=self.groups.tp
            )
        rows = tensor_parallel.all_to_all(self.groups.ep, rows, self.input_splits, self.output_splits)
        weighted = rows * self.prob_of.unsqueeze(1)
        out = weighted.new_zeros(self.tokens_shape).index_add(0, self.token_of, weighted)
        return out.view(self.hidden_shape), None
