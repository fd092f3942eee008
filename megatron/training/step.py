"""One training step: gradients of a global batch, one update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron.core import device, parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import sanity
from megatron.training.context import TrainContext
from megatron.training.global_vars import get_context
from megatron.training.profiling import OPTIMIZER_RANGE

StepResult = tuple[dict[str, Tensor], int, float | None, float | None]


def train_step(
    forward_step_func: Callable[..., Any],
    data_iterator: Any,
    model: list[torch.nn.Module],
    optimizer: MegatronOptimizer,
    opt_param_scheduler: OptimizerParamScheduler,
    config: TransformerConfig,
    *,
    ctx: TrainContext | None = None,
) -> StepResult:
    """Run one step; returns (losses, skipped, grad norm, zeros in gradients).

    losses are averages over the global batch, on the last pipeline stage only; skipped is 1 if the update was not made
    because a gradient was not finite (fp16), and then neither the schedule nor the norms advance.
    """
    ctx = ctx or get_context()
    args, timers = ctx.args, ctx.timers
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    sanity.before_forward(args, model)

    reported = get_forward_backward_func()(
        forward_step_func=forward_step_func,
        data_iterator=data_iterator,
        model=model,
        num_microbatches=get_num_microbatches(),
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        decoder_seq_length=args.decoder_seq_length,
        forward_only=False,
    )
    if args.empty_unused_memory_level >= 1:
        device.empty_cache()
    sanity.after_backward(args, model)

    timers("optimizer", log_level=1).start(barrier=args.barrier_with_L1_time)
    with torch.profiler.record_function(OPTIMIZER_RANGE):
        successful, grad_norm, num_zeros_in_grad = optimizer.step()
    timers("optimizer").stop()
    sanity.after_update(args, model)
    if successful:
        samples = get_num_microbatches() * args.micro_batch_size * args.data_parallel_size
        opt_param_scheduler.step(increment=samples)
    if args.empty_unused_memory_level >= 2:
        device.empty_cache()
    losses = reduce_reported(reported) if parallel_state.is_pipeline_last_stage(ignore_virtual=True) else {}
    return losses, 0 if successful else 1, grad_norm, num_zeros_in_grad


def reduce_reported(reported: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Averages of what the loss function reported for each microbatch.

    A value is a number (all microbatches weigh the same) or a pair (numerator, denominator).
    """
    return {
        key: numerator / denominator for key, (numerator, denominator) in sum_reported(reported, {}).items()
    }


def sum_reported(reported: list[dict[str, Any]], totals: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Add the numerators and denominators of every key to `totals`."""
    for values in reported:
        for key, value in values.items():
            numerator, denominator = value if isinstance(value, (tuple, list)) else (value, 1)
            total = totals.setdefault(key, [0, 0])
            total[0] = total[0] + numerator
            total[1] = total[1] + denominator
    return totals
