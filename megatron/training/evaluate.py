"""Evaluation: forward passes over held-out data, averaged and printed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megatron.core import device, parallel_state
from megatron.core.num_microbatches_calculator import (
    get_current_running_global_batch_size,
    get_num_microbatches,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.context import TrainContext
from megatron.training.global_vars import get_context
from megatron.training.log import evaluation_log
from megatron.training.step import sum_reported
from megatron.training.utils import is_last_rank, print_rank_0


def evaluate(
    forward_step_func: Callable[..., Any],
    data_iterator: Any,
    model: list[torch.nn.Module],
    process_non_loss_data_func: Callable[..., Any] | None,
    config: TransformerConfig,
    verbose: bool = False,
    *,
    start_time: float | None = None,
    ctx: TrainContext | None = None,
) -> tuple[dict[str, float] | None, Any, bool]:
    """Average losses over `--eval-iters` batches (on the last stage), non-loss data, and whether time or a signal ran out.

    `start_time` (seconds since the epoch, the same on all ranks) is what `--exit-duration-in-mins` counts from.
    """
    ctx = ctx or get_context()
    args, timers = ctx.args, ctx.timers
    timers("evaluate", log_level=0).start(barrier=True)
    for chunk in model:
        chunk.eval()
    num_microbatches = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    totals: dict[str, list[Any]] = {}
    position_after = args.consumed_valid_samples + args.eval_iters * args.global_batch_size
    if process_non_loss_data_func is not None:
        position_after += get_current_running_global_batch_size()
    saved_timers, config.timers = config.timers, None
    try:
        with torch.no_grad():
            if verbose:
                print_rank_0(f"Evaluating on {args.eval_iters * args.global_batch_size} samples")
            for iteration in range(1, args.eval_iters + 1):
                if verbose:
                    print_rank_0(f"Evaluating iter {iteration}/{args.eval_iters}")
                reported = _forward(forward_step_func, data_iterator, model, num_microbatches, ctx)
                if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
                    sum_reported(reported, totals)
                args.consumed_valid_samples += args.global_batch_size
                if stop_requested(ctx, start_time):
                    # Resuming must validate on what an uninterrupted run would: the rest of this pass counts as read.
                    args.consumed_valid_samples = position_after
                    return None, None, True
            collected = None
            if process_non_loss_data_func is not None:
                # On all ranks: the last one alone would wait for the other parts of its model, as v0.9's does.
                collected = _forward(
                    forward_step_func,
                    data_iterator,
                    model,
                    get_num_microbatches(),
                    ctx,
                    collect_non_loss_data=True,
                )
                args.consumed_valid_samples = position_after
    finally:
        config.timers = saved_timers
        for chunk in model:
            chunk.train()
        timers("evaluate").stop()
    timers.log(["evaluate"])
    losses = {key: float(numerator / denominator) for key, (numerator, denominator) in totals.items()}
    return losses, collected, False


def _forward(
    forward_step_func: Callable[..., Any],
    data_iterator: Any,
    model: list[torch.nn.Module],
    num_microbatches: int,
    ctx: TrainContext,
    collect_non_loss_data: bool = False,
) -> list[Any]:
    return get_forward_backward_func()(
        forward_step_func=forward_step_func,
        data_iterator=data_iterator,
        model=model,
        num_microbatches=num_microbatches,
        seq_length=ctx.args.seq_length,
        micro_batch_size=ctx.args.micro_batch_size,
        decoder_seq_length=ctx.args.decoder_seq_length,
        forward_only=True,
        collect_non_loss_data=collect_non_loss_data,
    )


def stop_requested(ctx: TrainContext, start_time: float | None) -> bool:
    """Whether a rank got SIGTERM or the time of `--exit-duration-in-mins` is over; all ranks must call."""
    if ctx.signal_handler is not None and any(ctx.signal_handler.signals_received()):
        return True
    return out_of_time(ctx, start_time) is not None


def out_of_time(ctx: TrainContext, start_time: float | None) -> float | None:
    """Minutes since `start_time` if they exceed `--exit-duration-in-mins` on any rank; all ranks must call."""
    limit = ctx.args.exit_duration_in_mins
    if not limit or start_time is None:
        return None
    minutes = (time.time() - start_time) / 60.0
    over = torch.tensor([int(minutes > limit)], dtype=torch.int, device=device.current())
    dist.all_reduce(over, op=dist.ReduceOp.MAX)
    return minutes if over.item() else None


def evaluate_and_print_results(
    prefix: str,
    forward_step_func: Callable[..., Any],
    data_iterator: Any,
    model: list[torch.nn.Module],
    iteration: int,
    process_non_loss_data_func: Callable[..., Any] | None,
    config: TransformerConfig,
    verbose: bool = False,
    write_to_tensorboard: bool = True,
    *,
    start_time: float | None = None,
    ctx: TrainContext | None = None,
) -> bool:
    """Evaluate and print; returns whether it was cut short, and then nothing is printed."""
    ctx = ctx or get_context()
    losses, collected, cut_short = evaluate(
        forward_step_func,
        data_iterator,
        model,
        process_non_loss_data_func,
        config,
        verbose,
        start_time=start_time,
        ctx=ctx,
    )
    if cut_short or losses is None:
        return True
    evaluation_log(prefix, losses, iteration, write_to_tensorboard, ctx=ctx)
    if process_non_loss_data_func is not None and ctx.tensorboard and is_last_rank():
        process_non_loss_data_func(collected, iteration, ctx.tensorboard)
    return False
