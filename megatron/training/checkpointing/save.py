"""Write a checkpoint: staged, flushed, checksummed, published, and only then named by the tracker."""

from __future__ import annotations

import os
import shutil
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing import durable
from megatron.core.dist_checkpointing.agreement import barrier, gather, rank, together
from megatron.core.dist_checkpointing.durable import Checksum
from megatron.core.errors import CheckpointError, FlagError
from megatron.training.checkpointing import asynchronous, distributed
from megatron.training.checkpointing.layout import (
    CheckpointType,
    Tracked,
    get_checkpoint_name,
    get_distributed_optimizer_checkpoint_name,
    non_persistent_directory,
    prune,
    saved_iterations,
    write_tracker,
)
from megatron.training.checkpointing.state import (
    current_args,
    generate_state_dict,
    get_rng_state,
    innermost,
    portable_args,
    say,
)


def save_checkpoint(
    iteration: int,
    model: Any,
    optimizer: Any,
    opt_param_scheduler: Any,
    num_floating_point_operations_so_far: float,
    checkpointing_context: dict[str, Any] | None = None,
    pipeline_rank: int | None = None,
    expert_rank: int | None = None,
    tensor_rank: int | None = None,
    pipeline_parallel: bool | None = None,
    expert_parallel: bool | None = None,
    non_persistent_ckpt: bool = False,
    train_data_iterator: Any = None,
    ft_client: Any = None,
    *,
    args: Namespace | None = None,
) -> None:
    """Save the run under `--save` in `--ckpt-format`; every rank must call.

    The ranks and axes may be given to write another rank's file (converters do); they default to this process.
    Nothing that was saved before is touched until the new checkpoint is complete on the disk. CheckpointError,
    on every rank, names the file that could not be written and why.
    """
    args = current_args(args)
    started = time.monotonic()
    save_dir = args.save
    if non_persistent_ckpt:
        save_dir = non_persistent_directory(args, args.save)
    kind = CheckpointType.LEGACY if args.ckpt_format == "torch" else CheckpointType.GLOBAL
    if args.async_save and kind is CheckpointType.LEGACY:
        raise FlagError(
            "--async-save", "the torch format is written synchronously", "add --ckpt-format torch_dist"
        )
    asynchronous.wait_for_saves()
    if non_persistent_ckpt:
        cleanup_old_non_persistent_checkpoint(save_dir)
    say(f"saving checkpoint at iteration {iteration:7d} to {save_dir} in {args.ckpt_format} format")

    chunks = innermost(model)
    rng_state = get_rng_state(kind is CheckpointType.GLOBAL, args=args)
    if train_data_iterator is not None:
        save_dataloader_state(train_data_iterator, iteration, getattr(args, "dataloader_save", None))
    _prepare(save_dir, iteration)

    def assemble(use_dist_ckpt: bool, optim_sd_kwargs: dict[str, Any] | None = None) -> dict[str, Any]:
        state = generate_state_dict(
            portable_args(args),
            chunks,
            optimizer,
            opt_param_scheduler,
            rng_state,
            use_dist_ckpt=use_dist_ckpt,
            iteration=iteration,
            optim_sd_kwargs=optim_sd_kwargs,
        )
        state["num_floating_point_operations_so_far"] = num_floating_point_operations_so_far
        return state

    def announce() -> None:
        keep_last = None if non_persistent_ckpt else getattr(args, "keep_last_checkpoints", None)
        _publish(save_dir, iteration, keep_last=keep_last)
        say(f"  successfully saved checkpoint from iteration {iteration:7d} to {save_dir}")

    if kind is CheckpointType.LEGACY:
        path = get_checkpoint_name(
            save_dir,
            iteration,
            False,
            pipeline_parallel,
            tensor_rank,
            pipeline_rank,
            expert_parallel,
            expert_rank,
        )
        _write_rank_files(path, save_dir, iteration, assemble, optimizer, args)
        announce()
    else:
        distributed.write(save_dir, iteration, assemble, announce, optimizer, checkpointing_context, args)
        if args.async_save:
            say(f"  the copy for the asynchronous save took {time.monotonic() - started:.3f} s")


def _prepare(save_dir: str, iteration: int) -> None:
    """Rank 0 makes the staging directory and clears what killed saves left behind."""
    final = Path(save_dir) / Tracked(iteration).directory
    with together():
        if rank() == 0:
            for leftover in Path(save_dir).glob(".iter_*.partial"):
                shutil.rmtree(leftover, ignore_errors=True)
            durable.stage(final)


def _publish(save_dir: str, iteration: int, keep_last: int | None) -> None:
    """Rename the staging directory, point the tracker at it, and drop old checkpoints; every rank must call."""
    tracked = Tracked(iteration)
    final = Path(save_dir) / tracked.directory
    with together():
        if rank() == 0:
            durable.publish(final)
            write_tracker(save_dir, tracked)
            if keep_last:
                for old in prune(save_dir, keep_last, iteration):
                    say(f"  removed the checkpoint of iteration {old:7d} (--keep-last {keep_last})")


def _write_rank_files(
    path: str,
    save_dir: str,
    iteration: int,
    assemble: Callable[..., dict[str, Any]],
    optimizer: Any,
    args: Namespace,
) -> None:
    """Torch format: the first data- and context-parallel rank of each model-parallel rank writes its part into staging."""
    final = Path(save_dir) / Tracked(iteration).directory
    staged = durable.staging_path(final) / Path(path).relative_to(final)
    writes = (
        not torch.distributed.is_initialized()
        or mpu.get_data_modulo_expert_parallel_rank(with_context_parallel=True) == 0
    )
    with_parameter_state = args.use_distributed_optimizer and optimizer is not None and not args.no_save_optim
    parameter_state = _gather_parameter_state(optimizer) if with_parameter_state else None
    contents = {staged: assemble(False)} if writes else {}
    if parameter_state is not None:
        contents[Path(get_distributed_optimizer_checkpoint_name(str(staged)))] = parameter_state
    checksums: dict[str, Checksum] = {}
    with together():
        for file, content in contents.items():
            with durable.naming_path(file, "writing"):
                file.parent.mkdir(parents=True, exist_ok=True)
                name = file.relative_to(durable.staging_path(final)).as_posix()
                checksums[name] = durable.save_file(content, file)
    everyone = gather(checksums)
    with together():
        if rank() == 0:
            manifest: dict[str, Checksum] = {}
            for part in everyone:
                if twice := manifest.keys() & part.keys():
                    why = "two ranks wrote it, so it may hold anything"
                    raise CheckpointError(str(final / min(twice)), why, "give --ckpt-format torch_dist")
                manifest |= part
            durable.write_manifest(durable.staging_path(final), manifest)


def _gather_parameter_state(optimizer: Any) -> Any:
    """The distributed optimizer's tensors, whole, on the first rank of its group; None elsewhere.

    Several chained optimizers give a list with None for those whose first rank this is not. Every rank must call.
    """
    optimizers = getattr(optimizer, "chained_optimizers", [optimizer])
    states = [one.get_parameter_state_dp_zero() for one in optimizers]
    if all(state is None for state in states):
        return None
    return states if hasattr(optimizer, "chained_optimizers") else states[0]


def cleanup_old_non_persistent_checkpoint(
    save_dir: str, leave_ckpt_num: int = 1, do_async: bool = False
) -> None:
    """Delete all but the newest `leave_ckpt_num` checkpoints of the directory (rank 0).

    `do_async` is accepted for callers of older versions; deleting is quick beside the save that precedes it.
    """
    with together():
        if rank() == 0 and (iterations := saved_iterations(save_dir)):
            prune(save_dir, leave_ckpt_num, iterations[0])


def save_dataloader_state(train_iterator: Any, iteration: int, dataloader_save_path: str | None) -> None:
    """Write the state of an iterator whose dataset has `save_state`, one file per data-parallel rank.

    The built-in loaders have none: their position is the number of consumed samples in `args`.
    """
    save_state = getattr(getattr(train_iterator, "iterable", None), "save_state", None)
    if not dataloader_save_path or save_state is None:
        return
    shares = (
        mpu.get_tensor_model_parallel_rank(),
        mpu.get_context_parallel_rank(),
    )  # its samples with these ranks
    if shares == (0, 0) and mpu.is_pipeline_first_stage(ignore_virtual=True):
        basename = f"train_dataloader_dprank{mpu.get_data_parallel_rank():03d}.pt"
        path = get_checkpoint_name(dataloader_save_path, iteration, basename=basename)
        with durable.naming_path(path, "writing"):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            durable.save_file({"dataloader_state_dict": save_state()}, path)
    barrier()
