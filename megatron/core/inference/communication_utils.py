"""Activations and results between the pipeline stages of a generating model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import device, parallel_state
from megatron.core.errors import InvariantError
from megatron.core.pipeline_parallel.p2p_communication import only, pipeline_group


def broadcast_from_last_pipeline_stage(
    size: int | Sequence[int], dtype: torch.dtype, tensor: Tensor | None = None
) -> Tensor:
    """Give all stages the last one's `tensor`, of this size and type. All ranks of the pipeline must call."""
    shape = (size,) if isinstance(size, int) else tuple(size)
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != dtype:
            found = None if tensor is None else (tensor.dtype, list(tensor.shape))
            raise InvariantError(
                "broadcast_from_last_pipeline_stage",
                f"{found} is sent where {dtype} {list(shape)} is awaited",
            )
        tensor = tensor.contiguous()
    else:
        tensor = torch.empty(shape, dtype=dtype, device=device.current())
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        source = parallel_state.get_pipeline_model_parallel_last_rank()
        dist.broadcast(tensor, source, group=pipeline_group())
    return tensor


def recv_from_prev_pipeline_rank_(recv_buffer: Tensor | None = None) -> None:
    """Fill `recv_buffer` with what the previous stage sends."""
    if recv_buffer is None:
        raise InvariantError(
            "recv_from_prev_pipeline_rank_", "there is no buffer to fill", "pass recv_buffer"
        )
    dist.recv(recv_buffer, src=only(parallel_state.get_pipeline_model_parallel_prev_rank()))


def send_to_next_pipeline_rank(tensor: Tensor | None = None) -> None:
    """Send `tensor` to the next stage."""
    if tensor is None:
        raise InvariantError("send_to_next_pipeline_rank", "there is nothing to send", "pass tensor")
    dist.send(tensor.contiguous(), dst=only(parallel_state.get_pipeline_model_parallel_next_rank()))
