"""Small helpers of the training shell under their classic names."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import device, parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.fp8 import weights as fp8_weights
from megatron.core.optimizer.shard_layout import owned_slices
from megatron.core.process_groups_config import group_rank
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import Float16Module, param_is_not_shared
from megatron.training.batch import (
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
    get_ltor_masks_and_position_ids,
)
from megatron.training.context import TrainContext
from megatron.training.global_vars import get_context

__all__ = [
    "append_to_progress_log",
    "average_losses_across_data_parallel_group",
    "calc_params_l2_norm",
    "get_batch_on_this_cp_rank",
    "get_batch_on_this_tp_rank",
    "get_ltor_masks_and_position_ids",
    "is_last_rank",
    "print_rank_0",
    "print_rank_last",
    "report_memory",
    "unwrap_model",
    "update_use_dist_ckpt",
]

ALL_MODULE_WRAPPER_CLASSNAMES = (DistributedDataParallel, Float16Module)


def print_line(message: object) -> None:
    """Print in one write, so that lines of ranks that share a terminal do not run into each other."""
    print(f"{message}\n", end="", flush=True)


def print_rank_0(message: object) -> None:
    """Print on rank 0, or always without torch.distributed."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print_line(message)


def is_last_rank() -> bool:
    """Whether this is the rank that prints training and evaluation lines."""
    return not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1


def print_rank_last(message: object) -> None:
    """Print on the last rank, or always without torch.distributed."""
    if is_last_rank():
        print_line(message)


def unwrap_model(model: Any, module_instances: tuple[type, ...] = ALL_MODULE_WRAPPER_CLASSNAMES) -> Any:
    """The plain model inside its wrappers; a list gives a list."""
    chunks = model if isinstance(model, list) else [model]
    plain = []
    for chunk in chunks:
        while isinstance(chunk, module_instances):
            chunk = chunk.module
        plain.append(chunk)
    return plain if isinstance(model, list) else plain[0]


def calc_params_l2_norm(model: Any) -> float:
    """L2 norm of all parameters of the whole model, shared and duplicated ones counted once.

    All ranks must call. Half-precision parameters are squared in fp32. Where a step's updates are gathered only in the
    next forward pass, each rank counts what it updated itself.
    """
    chunks = model if isinstance(model, list) else [model]
    owned = _owned_where_gathered_late(chunks)
    dense: list[Tensor] = []
    expert: list[Tensor] = []
    for chunk in chunks:
        for param in chunk.parameters():
            if param_is_not_shared(param) and param_is_not_tensor_parallel_duplicate(param):
                values = fp8_weights.values_of(param)
                if owned is not None:
                    values = values.flatten()[owned.get(param, _counted_once(param))]
                (dense if getattr(param, "allreduce", True) else expert).append(values)
    has_experts = parallel_state.get_expert_model_parallel_world_size() > 1
    if has_experts and owned is None and parallel_state.get_expert_model_parallel_rank() > 0:
        dense = []  # the same on every expert-parallel rank: counted on the first
    total = torch.zeros(1, dtype=torch.float64, device=device.current())
    for param in (*dense, *expert):
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        total += torch.linalg.vector_norm(param, dtype=wide).double().square()
    if owned is not None:
        dist.all_reduce(total)
    elif has_experts:
        dist.all_reduce(total, group=parallel_state.get_tensor_and_expert_parallel_group())
        dist.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    else:
        dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return total.item() ** 0.5


def _owned_where_gathered_late(chunks: Sequence[Any]) -> dict[Tensor, slice] | None:
    """What this rank updates of each flattened parameter, if the rest is gathered only in the next forward pass.

    All chunks of a run gather alike; one without trainable parameters owns nothing.
    """
    late = [c for c in chunks if isinstance(c, DistributedDataParallel) and c.ddp_config.overlap_param_gather]
    owned: dict[Tensor, slice] = {}
    for chunk in late:
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            rank, ranks = group_rank(buffer.data_parallel_group), buffer.data_parallel_world_size
            owned |= zip(buffer.params, owned_slices(buffer.layout, rank, ranks))
    return owned if late else None


def _counted_once(param: Tensor) -> slice:
    """All of a parameter that no rank updates, on the first of its replicas."""
    if getattr(param, "allreduce", True):
        replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    else:
        replica = parallel_state.get_data_modulo_expert_parallel_rank(with_context_parallel=True)
    return slice(None) if replica == 0 else slice(0)


def average_losses_across_data_parallel_group(losses: Sequence[Tensor]) -> Tensor:
    """Mean of each loss over the data-parallel group [len(losses)]; all ranks of the group must call."""
    averaged = torch.cat([loss.clone().detach().view(1) for loss in losses])
    group = parallel_state.get_data_parallel_group()
    dist.all_reduce(averaged, group=group)
    return averaged / dist.get_world_size(group=group)


def report_memory(name: str) -> None:
    """Print the device memory in use, once per model-parallel rank."""
    mega_bytes = 1024.0 * 1024.0
    stats = device.memory_stats()
    text = f"{name} memory (MB)"
    text += f" | allocated: {stats['allocated_bytes'] / mega_bytes}"
    text += f" | max allocated: {stats['max_allocated_bytes'] / mega_bytes}"
    text += f" | reserved: {stats['reserved_bytes'] / mega_bytes}"
    text += f" | max reserved: {stats['max_reserved_bytes'] / mega_bytes}"
    if parallel_state.get_data_parallel_rank() == 0:
        print_line(f"[Rank {dist.get_rank()}] {text}")


def append_to_progress_log(string: str, barrier: bool = True, *, ctx: TrainContext | None = None) -> None:
    """Append a line to `<save>/progress.txt` on rank 0 (`--log-progress`); all ranks call if `barrier`."""
    args = (ctx or get_context()).args
    if args.save is None:
        return
    if barrier:
        dist.barrier()
    if dist.get_rank() == 0:
        Path(args.save).mkdir(parents=True, exist_ok=True)
        with open(Path(args.save) / "progress.txt", "a", encoding="utf-8") as file:
            now = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
            job = os.getenv("SLURM_JOB_ID", "")
            file.write(f"{now}\tJob ID: {job}\t# GPUs: {dist.get_world_size()}\t{string}\n")


def update_use_dist_ckpt(args: Any) -> None:
    """Set `args.use_dist_ckpt` from `--ckpt-format`."""
    args.use_dist_ckpt = args.ckpt_format != "torch"
