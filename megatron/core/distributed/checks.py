"""Invariants of data parallelism that can be watched while a run goes on; each names the rank and the parameter."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.errors import TrainingError

_INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(tensor: Tensor) -> Tensor:
    """An int64 scalar that changes if any bit of `tensor` does or two unequal elements change places."""
    bits = (
        tensor.detach().contiguous().view(_INTEGER_OF_SIZE[tensor.element_size()]).reshape(-1).to(torch.int64)
    )
    weights = torch.arange(1, 2 * bits.numel(), 2, device=bits.device, dtype=torch.int64)
    return (bits * weights).sum()  # odd weights modulo 2**64


def replicas_equal(model: list[torch.nn.Module]) -> None:
    """Check that data-parallel replicas hold the same bits in every parameter; all ranks must call.

    Raises TrainingError, on every rank of a group that has drifted, with the first parameter and the ranks that differ.
    """
    for expert in (False, True):
        named = [(n, p) for n, p in _parameters(model) if is_expert(p) == expert]
        if not named:
            continue
        if expert:
            group = parallel_state.get_data_modulo_expert_parallel_group(with_context_parallel=True)
        else:
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        if dist.get_world_size(group) == 1:
            continue
        mine = torch.stack([fingerprint(param) for _, param in named])
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, mine, group=group)
        table = torch.stack(everyone)
        differs = (table != table[0]).any(dim=0)
        if differs.any():
            index = int(differs.nonzero()[0])
            ranks = dist.get_process_group_ranks(group)
            odd = [ranks[i] for i in range(len(ranks)) if table[i, index] != table[0, index]]
            raise TrainingError(
                named[index][0],
                f"rank(s) {', '.join(map(str, odd))} hold other values than rank {ranks[0]}, their replica",
                "resume from the last checkpoint; a rank that drifts again has faulty memory or software",
            )


def gradients_finite(model: list[torch.nn.Module]) -> None:
    """Check that every accumulated gradient is finite; TrainingError names the rank and the parameter."""
    for name, param in _parameters(model):
        gradient = getattr(param, "main_grad", param.grad)
        if gradient is not None and not torch.isfinite(gradient).all():
            raise TrainingError(
                name,
                f"its gradient is not finite on rank {dist.get_rank()}",
                "lower --lr, or look for the batch that causes it with --skip-train on its data",
            )


def is_expert(param: torch.nn.Parameter) -> bool:
    """Whether a parameter belongs to one expert-parallel rank instead of to all data-parallel ranks."""
    return not getattr(param, "allreduce", True)


def _parameters(model: list[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for chunk in model:
        yield from ((name, param) for name, param in chunk.named_parameters() if param.requires_grad)
