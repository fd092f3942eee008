"""The arithmetic of routing: who goes where, with what weight, and the reordering of tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron.core.errors import InvariantError
from megatron.core.transformer.moe.aux_losses import (
    MoEAuxLossAutoScaler,
    clear_aux_losses_tracker,
    reduce_aux_losses_tracker_across_ranks,
    save_to_aux_losses_tracker,
    switch_load_balancing_loss_func,
    track_moe_metrics,
    z_loss_func,
)

__all__ = [
    "DROPPED",
    "MoEAuxLossAutoScaler",
    "clear_aux_losses_tracker",
    "get_capacity",
    "permute",
    "permute_with_padded_tokens",
    "reduce_aux_losses_tracker_across_ranks",
    "save_to_aux_losses_tracker",
    "sinkhorn",
    "sort_chunks_by_idxs",
    "switch_load_balancing_loss_func",
    "topk_softmax_with_capacity",
    "track_moe_metrics",
    "unpermute",
    "unpermute_with_padded_tokens",
    "z_loss_func",
]

#: The expert index of an assignment that was dropped: after all real experts when sorted.
DROPPED = torch.iinfo(torch.long).max


def sinkhorn(cost: Tensor, tol: float = 0.0001) -> Tensor:
    """Scale rows and columns of exp(cost) [t, e] alternately until tokens and experts are evenly matched ->
    fp32 [t, e].

    Stops when the column scales change by `tol` or less on average (arXiv:2202.01169).
    """
    cost = torch.exp(cost)
    tokens, experts = cost.shape
    by_expert = torch.ones(experts, device=cost.device, dtype=cost.dtype)
    eps, change = 1e-8, math.inf
    by_token = torch.ones(tokens, device=cost.device, dtype=cost.dtype)
    while change > tol:
        by_token = 1.0 / (tokens * ((by_expert * cost).sum(1) + eps))
        updated = 1.0 / (experts * ((by_token.unsqueeze(1) * cost).sum(0) + eps))
        change = (updated - by_expert).abs().mean().item()
        by_expert = updated
    return by_expert * cost * by_token.unsqueeze(1)


def get_capacity(
    num_tokens: int, num_experts: int, capacity_factor: float, min_capacity: int | None = None
) -> int:
    """Assignments an expert takes: an even share of `num_tokens` times the factor, rounded up."""
    capacity = math.ceil(num_tokens / num_experts * capacity_factor)
    return capacity if min_capacity is None else max(capacity, min_capacity)


def topk_softmax_with_capacity(
    logits: Tensor,
    topk: int,
    capacity_factor: float | None = None,
    pad_to_capacity: bool = False,
    drop_policy: str = "probs",
    use_pre_softmax: bool = False,
    deterministic_mode: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """logits [t, e] -> (probabilities, indices, assignments per expert before dropping [e]).

    Without padding probabilities and expert indices are [t, k], dropped ones with probability 0 and index
    DROPPED. Padded to the capacity c they are [e, c], indices name tokens, and unused slots have probability
    0. An overfull expert keeps its most probable tokens ("probs") or its first ("position").
    """
    tokens, experts = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    if use_pre_softmax:
        scores = torch.softmax(logits, dim=-1, dtype=wide).type_as(logits)
        probs, indices = torch.topk(scores, k=topk, dim=1)
    else:
        if topk == 1:
            raise InvariantError(
                "--moe-router-topk 1", "a softmax over one expert is always 1", "add --moe-router-pre-softmax"
            )
        chosen, indices = torch.topk(logits, k=topk, dim=1)
        probs = torch.softmax(chosen, dim=-1, dtype=wide).type_as(logits)
    per_expert = torch.bincount(indices.flatten(), minlength=experts)
    if capacity_factor is None:
        return probs, indices, per_expert

    capacity = min(tokens, get_capacity(tokens * topk, experts, capacity_factor))
    gates = torch.zeros_like(logits).scatter(1, indices, probs)
    assigned = torch.zeros_like(logits, dtype=torch.bool).scatter(1, indices, True)
    if drop_policy == "probs":
        rank_by = gates.detach()
    elif drop_policy == "position":
        earliness = torch.arange(tokens, 0, -1, device=logits.device).unsqueeze(1)
        rank_by = assigned * earliness
    else:
        raise ValueError(f"drop_policy is probs or position (--moe-token-drop-policy), not {drop_policy!r}")
    kept_tokens = torch.topk(rank_by, k=capacity, dim=0, sorted=False).indices  # [c, e]
    if pad_to_capacity:
        return gates.gather(0, kept_tokens).t(), kept_tokens.t(), per_expert
    kept = torch.zeros_like(assigned).scatter(0, kept_tokens, True)
    dropped = ~(assigned & kept).gather(1, indices)
    return probs * ~dropped, indices.masked_fill(dropped, DROPPED), per_expert


def permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    """Order tokens [t, h] by expert: -> (rows [n, h], where row r came from among the t*k assignments [n]).

    indices [t, k] or [t] name experts. `num_out_tokens` keeps only the first rows: dropped assignments sort
    last. In padded mode indices [e, c] name tokens.
    """
    if padded_mode:
        return permute_with_padded_tokens(tokens, indices)
    topk = 1 if indices.dim() == 1 else indices.size(1)
    order = torch.argsort(indices.reshape(-1), stable=True)[:num_out_tokens]
    return tokens.index_select(0, order // topk), order


def unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: torch.Size | None = None,
) -> Tensor:
    """Undo `permute`: rows [n, h] weighted by probs [t, k] and summed per token -> [t, h]."""
    if padded_mode:
        if probs is None or restore_shape is None:
            raise ValueError("padded tokens need probs and restore_shape to be put back")
        return unpermute_with_padded_tokens(permuted_tokens, sorted_indices, probs, restore_shape)
    topk = 1 if probs is None else probs.size(1)
    total = sorted_indices.numel() if probs is None else probs.numel()
    if probs is not None:
        permuted_tokens = permuted_tokens * probs.reshape(-1, 1).index_select(0, sorted_indices)
    out = permuted_tokens.new_zeros((total // topk, permuted_tokens.size(-1)))
    return out.index_add(0, sorted_indices // topk, permuted_tokens)


def permute_with_padded_tokens(tokens: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """tokens [t, h], token indices [e, c] -> (rows [e*c, h], the flattened indices)."""
    flat = indices.reshape(-1)
    return tokens.index_select(0, flat), flat


def unpermute_with_padded_tokens(
    permuted_tokens: Tensor, indices: Tensor, probs: Tensor, restore_shape: torch.Size
) -> Tensor:
    """Undo it: rows [e*c, h] weighted by probs [e, c], summed into zeros of `restore_shape` (t, h)."""
    weighted = permuted_tokens * probs.reshape(-1, 1)
    return weighted.new_zeros(tuple(restore_shape)).index_add(0, indices.reshape(-1), weighted)


def sort_chunks_by_idxs(input: Tensor, split_sizes: Tensor, sorted_idxs: Tensor) -> Tensor:
    """Cut rows [n, ..] into chunks of `split_sizes` and join them in the order `sorted_idxs`."""
    chunks = torch.split(input, split_sizes.tolist(), dim=0)
    return torch.cat([chunks[i] for i in sorted_idxs.tolist()], dim=0)
