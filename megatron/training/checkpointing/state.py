"""What a checkpoint holds, gathered from a run: model, optimizer, schedule, random states and arguments."""

from __future__ import annotations

import argparse
import enum
import random
from argparse import Namespace
from typing import Any

import numpy as np
import torch

from megatron.core import device, tensor_parallel
from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing.agreement import rank
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.errors import CheckpointError

CHECKPOINT_VERSION = 3.0


def current_args(args: Namespace | None) -> Namespace:
    """`args` itself, or those of the running program."""
    if args is not None:
        return args
    from megatron.training.global_vars import get_args

    return get_args()


def unsafe_allowed(args: Namespace) -> bool:
    """Whether --allow-unsafe-pickle was given; runs recorded before the flag existed lack it."""
    return getattr(args, "allow_unsafe_pickle", False)


def say(message: str) -> None:
    """Print on the first rank."""
    if rank() == 0:
        print(message, flush=True)


def innermost(model: Any) -> list[torch.nn.Module]:
    """The chunks of a model without their wrappers (gradient buffers, half precision)."""
    chunks = []
    for chunk in model if isinstance(model, list) else [model]:
        while isinstance(getattr(chunk, "module", None), torch.nn.Module):
            chunk = chunk.module
        chunks.append(chunk)
    return chunks


def portable_args(args: Namespace) -> Namespace:
    """A copy of `args` that any program can unpickle: builtins and torch dtypes only.

    Enums become their values and subclasses of builtins the builtin; other objects, which belong to the running
    process, are left out.
    """
    portable = Namespace()
    for name, value in vars(args).items():
        try:
            setattr(portable, name, _portable(value))
        except TypeError:
            continue
    return portable


def _portable(value: Any) -> Any:
    if value is None or isinstance(value, (bool, torch.dtype)):
        return value
    if isinstance(value, enum.Enum) and not isinstance(value, (int, str)):
        return _portable(value.value)
    for builtin in (int, float, str, bytes):
        if isinstance(value, builtin):
            return builtin(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [_portable(item) for item in value]
        return (
            tuple(items)
            if isinstance(value, tuple)
            else set(items)
            if isinstance(value, (set, frozenset))
            else items
        )
    if isinstance(value, dict):
        return {_portable(key): _portable(item) for key, item in value.items()}
    if isinstance(value, argparse.Namespace):
        return portable_args(value)
    raise TypeError(f"{type(value).__name__} is not portable")


def get_rng_state(use_dist_ckpt: bool = False, *, args: Namespace | None = None) -> Any:
    """Every random state of this rank, as a list of one dict (one per data-parallel rank if those differ).

    For a distributed checkpoint it is a ShardedObject, one per (pipeline, tensor) rank. With
    `--data-parallel-random-init` every rank of the data-parallel group must call.
    """
    args = current_args(args)
    state = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": device.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    states = [state]
    if args.data_parallel_random_init and mpu.get_data_parallel_world_size() > 1:
        states = [state] * mpu.get_data_parallel_world_size()
        torch.distributed.all_gather_object(states, state, group=mpu.get_data_parallel_group())
    if not use_dist_ckpt:
        return states
    pp, tp = mpu.get_pipeline_model_parallel_world_size(), mpu.get_tensor_model_parallel_world_size()
    return ShardedObject(
        "rng_state",
        states,
        (pp, tp),
        (mpu.get_pipeline_model_parallel_rank(), mpu.get_tensor_model_parallel_rank()),
        replica_id=mpu.get_data_parallel_rank(with_context_parallel=True),
    )


def set_rng_state(states: list[dict[str, Any]], *, args: Namespace) -> None:
    """Put back what `get_rng_state` took.

    A generator state of another kind of device (a CPU run continuing a GPU run, or the reverse) cannot be used:
    it is skipped with a notice. CheckpointError if there is no tracker state at all.
    """
    state = states[mpu.get_data_parallel_rank() if args.data_parallel_random_init else 0]
    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    tracked = state["rng_tracker_states"]
    if not tracked:
        raise CheckpointError(
            "rng_state", "the tracker of model-parallel random states is empty", "pass --no-load-rng"
        )
    own = device.get_rng_state()
    if any(other.numel() != own.numel() for other in (state["cuda_rng_state"], *tracked.values())):
        say(
            "checkpoint: its random states belong to another kind of device; dropout and initialisation "
            "continue from this run's seed instead"
        )
        return
    device.set_rng_state(state["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(tracked)


def generate_state_dict(
    args: Namespace,
    model: list[torch.nn.Module],
    optimizer: Any,
    opt_param_scheduler: Any,
    rng_state: Any,
    use_dist_ckpt: bool = False,
    iteration: int | None = None,
    optim_sd_kwargs: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The dict that is saved, in the order of its keys on disk; sharded records if `use_dist_ckpt`."""
    state_dict: dict[str, Any] = {"args": args, "checkpoint_version": CHECKPOINT_VERSION}
    if iteration is not None:
        state_dict["iteration"] = iteration
    for index, (name, chunk) in enumerate(named_chunks(model)):
        if len(model) > 1:
            mpu.set_virtual_pipeline_model_parallel_rank(index)
        state_dict[name] = (
            chunk.sharded_state_dict() if use_dist_ckpt else chunk.state_dict_for_save_checkpoint()
        )
    if not args.no_save_optim:
        if optimizer is not None:
            state_dict["optimizer"] = (
                optimizer.sharded_state_dict(state_dict, **(optim_sd_kwargs or {}))
                if use_dist_ckpt
                else optimizer.state_dict()
            )
        if opt_param_scheduler is not None:
            state_dict["opt_param_scheduler"] = opt_param_scheduler.state_dict()
    if not args.no_save_rng:
        state_dict["rng_state"] = rng_state
    return state_dict


def named_chunks(model: list[torch.nn.Module]) -> list[tuple[str, torch.nn.Module]]:
    """The key of each model chunk: `model`, or `model0`, `model1` .. in virtual-rank order."""
    if len(model) == 1:
        return [("model", model[0])]
    return [(f"model{index}", chunk) for index, chunk in enumerate(model)]
