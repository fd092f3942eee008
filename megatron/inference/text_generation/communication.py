"""What the ranks of a generating model tell each other; requests start on one rank, results end on the first stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import device, parallel_state
from megatron.core.errors import InvariantError
from megatron.core.inference.communication_utils import (
    broadcast_from_last_pipeline_stage,
    recv_from_prev_pipeline_rank_,
    send_to_next_pipeline_rank,
)

__all__ = [
    "broadcast_float_list",
    "broadcast_from_last_pipeline_stage",
    "broadcast_from_last_to_first_pipeline_stage",
    "broadcast_int_list",
    "broadcast_list",
    "broadcast_tensor",
    "copy_from_last_to_first_pipeline_stage",
    "prepare_on_rank",
    "recv_from_prev_pipeline_rank_",
    "send_to_next_pipeline_rank",
]

T = TypeVar("T")
Size = int | Sequence[int]


def prepare_on_rank(prepare: Callable[[], T], rank: int = 0) -> T | None:
    """What `prepare` returns on this global rank, None on the others; all ranks of the world must call.

    Where it fails there, the other ranks raise ValueError: none of them waits for what will not be sent.
    """
    failed = torch.zeros(1, dtype=torch.long, device=device.current())
    prepared = None
    if dist.get_rank() == rank:
        try:
            prepared = prepare()
        except BaseException:
            dist.broadcast(failed.fill_(1), rank)
            raise
    dist.broadcast(failed, rank)
    if failed.item():
        raise ValueError(f"rank {rank} could not prepare the request; its own message says why")
    return prepared


def broadcast_tensor(size: Size, dtype: torch.dtype, tensor: Tensor | None = None, rank: int = 0) -> Tensor:
    """The `tensor` of a global rank, of this size and type, on every rank of the world."""
    if dist.get_rank() == rank:
        if tensor is None:
            raise InvariantError("broadcast_tensor", "there is nothing to send", "pass tensor on its rank")
        tensor = tensor.contiguous()
    else:
        tensor = torch.empty(size, dtype=dtype, device=device.current())
    dist.broadcast(tensor, rank)
    return tensor


def broadcast_list(
    size: Size, dtype: torch.dtype, list_values: Sequence[float] | None = None, rank: int = 0
) -> Tensor:
    """The numbers of a global rank on every rank of the world, as a tensor."""
    here = dist.get_rank() == rank
    tensor = torch.tensor(list_values, dtype=dtype, device=device.current()) if here else None
    return broadcast_tensor(size, dtype, tensor, rank)


def broadcast_int_list(size: Size, int_list: Sequence[int] | None = None, rank: int = 0) -> Tensor:
    """The integers of a global rank on every rank of the world: int64."""
    return broadcast_list(size, torch.int64, int_list, rank)


def broadcast_float_list(size: Size, float_list: Sequence[float] | None = None, rank: int = 0) -> Tensor:
    """The floats of a global rank on every rank of the world: float64, so that they arrive as they are."""
    return broadcast_list(size, torch.float64, float_list, rank)


def broadcast_from_last_to_first_pipeline_stage(
    size: Size, dtype: torch.dtype, tensor: Tensor | None = None
) -> Tensor | None:
    """The last stage's `tensor`, of this size and type, on the first stage; None on the stages between."""
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    if last and tensor is None:
        raise InvariantError(
            "broadcast_from_last_to_first_pipeline_stage", "there is nothing to send", "pass tensor"
        )
    if first == last:
        return tensor if last else None
    if last:
        assert tensor is not None, "checked above"
        tensor = tensor.contiguous()
    else:
        tensor = torch.empty(size, dtype=dtype, device=device.current())
    source = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(tensor, source, parallel_state.get_embedding_group())
    return tensor


def copy_from_last_to_first_pipeline_stage(
    size: Size, dtype: torch.dtype, tensor: Tensor | None = None
) -> None:
    """Overwrite `tensor`, any view of this size and type, on the first stage with that of the last."""
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
    received = broadcast_from_last_to_first_pipeline_stage(size, dtype, tensor if last else None)
    if first and not last:
        if tensor is None or received is None:
            raise InvariantError(
                "copy_from_last_to_first_pipeline_stage", "there is nothing to fill", "pass tensor"
            )
        tensor.copy_(received)
