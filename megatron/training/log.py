"""What a run says about itself while it trains: the iteration line, TensorBoard and W&B scalars, metrics records."""

from __future__ import annotations

import math
from argparse import Namespace
from datetime import datetime
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import device
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.moe.aux_losses import track_moe_metrics
from megatron.training.context import TrainContext
from megatron.training.flops import dense_peak_tflops, is_hybrid, throughput_tflops
from megatron.training.global_vars import get_context
from megatron.training.theoretical_memory_usage import report_theoretical_memory
from megatron.training.utils import is_last_rank, print_rank_last, report_memory

#: Timers printed after every iteration line, in this order (spec: training, section 19).
TIMERS_TO_LOG = [
    "forward-backward",
    "forward-compute",
    "backward-compute",
    "batch-generator",
    "forward-recv",
    "forward-send",
    "backward-recv",
    "backward-send",
    "forward-send-forward-recv",
    "forward-send-backward-recv",
    "backward-send-forward-recv",
    "backward-send-backward-recv",
    "forward-backward-send-forward-backward-recv",
    "layernorm-grads-all-reduce",
    "embedding-grads-all-reduce",
    "all-grads-sync",
    "params-all-gather",
    "optimizer-copy-to-main-grad",
    "optimizer-unscale-and-check-inf",
    "optimizer-clip-main-grad",
    "optimizer-count-zeros",
    "optimizer-inner-step",
    "optimizer-copy-main-to-model-params",
    "optimizer",
]

_ADVANCED, _SKIPPED, _NAN = "advanced iterations", "skipped iterations", "nan iterations"
_COUNTERS = (_ADVANCED, _SKIPPED, _NAN)


def training_log(
    loss_dict: dict[str, Tensor],
    total_loss_dict: dict[str, Any],
    learning_rate: float,
    decoupled_learning_rate: float | None,
    iteration: int,
    loss_scale: float | Tensor,
    report_memory_flag: bool,
    skipped_iter: int,
    grad_norm: float | Tensor | None,
    params_norm: float | None,
    num_zeros_in_grad: float | None,
    *,
    ctx: TrainContext | None = None,
) -> bool:
    """Account for one iteration and, at the intervals, write it out (spec: training, sections 17 and 18).

    `total_loss_dict` carries sums and counters from call to call and is reset at each printed line. Returns whether the
    memory report is still to come. All ranks must call; the last one prints.
    """
    ctx = ctx or get_context()
    args = ctx.args
    _accumulate(total_loss_dict, loss_dict, skipped_iter)
    batch_size = args.micro_batch_size * args.data_parallel_size * get_num_microbatches()
    total_iterations = total_loss_dict[_ADVANCED] + total_loss_dict[_SKIPPED]

    if args.log_timers_to_tensorboard and iteration % args.tensorboard_log_interval == 0:
        # Whether or not the writer is here: all ranks' times are gathered.
        ctx.timers.write(TIMERS_TO_LOG, ctx.tensorboard, iteration, normalizer=total_iterations)
    if ctx.tensorboard and iteration % args.tensorboard_log_interval == 0:
        if ctx.wandb:
            ctx.wandb.log({"samples vs steps": args.consumed_train_samples}, iteration)
        scalars: list[tuple[str, Any, bool]] = [("learning-rate", learning_rate, True)]
        if args.skipped_train_samples > 0:
            scalars.append(("skipped-train-samples", args.skipped_train_samples, False))
        scalars.append(("batch-size", batch_size, True))
        scalars += [(key, loss, True) for key, loss in loss_dict.items()]
        if args.log_loss_scale_to_tensorboard:
            scalars.append(("loss-scale", loss_scale, True))
        if args.log_world_size_to_tensorboard:
            scalars.append(("world-size", args.world_size, True))
        optional = {"grad-norm": grad_norm, "num-zeros": num_zeros_in_grad, "params-norm": params_norm}
        scalars += [(tag, value, True) for tag, value in optional.items() if value is not None]
        for tag, value, against_samples in scalars:
            ctx.tensorboard.add_scalar(tag, value, iteration)
            if tag == "learning-rate" and args.decoupled_lr is not None:
                ctx.tensorboard.add_scalar("decoupled-learning-rate", decoupled_learning_rate, iteration)
            if against_samples:
                ctx.tensorboard.add_scalar(f"{tag} vs samples", value, args.consumed_train_samples)
            if ctx.wandb:
                ctx.wandb.log({tag: value}, iteration)
        if args.log_memory_to_tensorboard:
            stats = device.memory_stats()
            ctx.tensorboard.add_scalar("mem-reserved-bytes", stats["reserved_bytes"], iteration)
            ctx.tensorboard.add_scalar("mem-allocated-bytes", stats["allocated_bytes"], iteration)
            ctx.tensorboard.add_scalar("mem-allocated-count", stats["allocated_count"], iteration)

    if args.num_experts is not None:
        scale = 1.0 / get_num_microbatches()
        track_moe_metrics(
            scale, iteration, ctx.tensorboard, ctx.wandb, total_loss_dict, args.moe_per_layer_logging
        )

    if iteration % args.log_interval:
        return report_memory_flag

    seconds = ctx.timers("interval-time").elapsed(barrier=True) / total_iterations
    tflops = throughput_tflops(args, batch_size, seconds) if args.log_throughput else None
    if args.log_timers_to_tensorboard:
        for tag, value in (("iteration-time", seconds), ("throughput", tflops)):
            if value is not None and ctx.tensorboard:
                ctx.tensorboard.add_scalar(tag, value, iteration)
            if value is not None and ctx.wandb:
                ctx.wandb.log({tag: value}, iteration)
    counts = {name: total_loss_dict[name] for name in _COUNTERS}
    averages = {
        key: (value / max(1, counts[_ADVANCED])).item()
        for key, value in total_loss_dict.items()
        if key not in _COUNTERS
    }
    values = {
        "learning_rate": learning_rate,
        "decoupled_learning_rate": decoupled_learning_rate,
        "loss_scale": float(loss_scale),
        "grad_norm": None if grad_norm is None else float(grad_norm),
        "num_zeros": num_zeros_in_grad,
        "params_norm": params_norm,
        "throughput": tflops,
    }
    print_rank_last(iteration_line(args, iteration, batch_size, seconds, averages, values, counts))
    if ctx.metrics:
        peak = args_peak_tflops(args)
        ctx.metrics.write(
            "train",
            iteration=iteration,
            consumed_samples=args.consumed_train_samples,
            elapsed_ms=seconds * 1000.0,
            tokens_per_second=batch_size * args.seq_length / seconds,
            global_batch_size=batch_size,
            mfu=tflops / peak if tflops is not None and peak else None,
            skipped_iterations=counts[_SKIPPED],
            nan_iterations=counts[_NAN],
            **averages,
            **values,
        )
    total_loss_dict.clear()
    if report_memory_flag and learning_rate > 0.0:
        if dist.get_rank() == 0 and not is_hybrid(args):  # the formula is a transformer's
            report_theoretical_memory(args, num_microbatches=get_num_microbatches(), verbose=True)
        report_memory(f"(after {iteration} iterations)")
        report_memory_flag = False
    ctx.timers.log(TIMERS_TO_LOG, normalizer=args.log_interval)
    return report_memory_flag


def args_peak_tflops(args: Namespace) -> float | None:
    """Dense peak of this device for MFU: `--mfu-peak-tflops`, else the table by device name."""
    return args.mfu_peak_tflops or dense_peak_tflops(device.device_name())


def _accumulate(totals: dict[str, Any], losses: dict[str, Tensor], skipped: int) -> None:
    """Add one iteration to the sums since the last line; a skipped one only counts, as nan if a loss is not finite."""
    for name in _COUNTERS:
        totals.setdefault(name, 0)
    totals[_SKIPPED if skipped else _ADVANCED] += 1
    if skipped:
        totals[_NAN] += any(not math.isfinite(loss.float().sum().item()) for loss in losses.values())
        return
    for key, loss in losses.items():
        totals[key] = totals.get(key, torch.zeros(1, device=loss.device)) + loss


def iteration_line(
    args: Namespace,
    iteration: int,
    batch_size: int,
    seconds: float,
    losses: dict[str, float],
    values: dict[str, float | None],
    counts: dict[str, int],
) -> str:
    """v0.9's line for one logging interval, character for character (spec: training, section 17.1)."""
    pieces = [
        f" [{datetime.now().strftime('%Y-%m-%d %H:%M:%S')}]",
        f" iteration {iteration:8d}/{args.train_iters:8d} |",
        f" consumed samples: {args.consumed_train_samples:12d} |",
    ]
    if args.skipped_train_samples > 0:
        pieces.append(f" skipped samples: {args.skipped_train_samples:12d} |")
    pieces.append(f" elapsed time per iteration (ms): {seconds * 1000.0:.1f} |")
    if values["throughput"] is not None:
        pieces.append(f" throughput per GPU (TFLOP/s/GPU): {values['throughput']:.1f} |")
    pieces.append(f" learning rate: {values['learning_rate']:.6E} |")
    if args.decoupled_lr is not None and values["decoupled_learning_rate"] is not None:
        pieces.append(f" decoupled learning rate: {values['decoupled_learning_rate']:.6E} |")
    pieces.append(f" global batch size: {batch_size:5d} |")
    pieces += [f" {key}: {loss:.6E} |" for key, loss in losses.items() if loss > 0.0]
    pieces.append(f" loss scale: {values['loss_scale']:.1f} |")
    for name, label, digits in (
        ("grad_norm", "grad norm", 3),
        ("num_zeros", "num zeros", 1),
        ("params_norm", "params norm", 3),
    ):
        if values[name] is not None:
            pieces.append(f" {label}: {values[name]:.{digits}f} |")
    pieces.append(f" number of skipped iterations: {counts[_SKIPPED]:3d} |")
    pieces.append(f" number of nan iterations: {counts[_NAN]:3d} |")
    return "".join(pieces)


def evaluation_log(
    prefix: str,
    losses: dict[str, float],
    iteration: int,
    write_to_tensorboard: bool,
    *,
    ctx: TrainContext | None = None,
) -> None:
    """Print validation losses between two lines of dashes on the last rank, and write their scalars (section 16)."""
    ctx = ctx or get_context()
    args = ctx.args
    text = f" validation loss at {prefix} | "
    for key, loss in losses.items():
        perplexity = math.exp(min(20, loss))
        text += f"{key} value: {loss:.6E} | {key} PPL: {perplexity:.6E} | "
        if ctx.metrics:
            ctx.metrics.write("validation", at=prefix, iteration=iteration, **{key: loss})
        if not (ctx.tensorboard and write_to_tensorboard):
            continue
        ctx.tensorboard.add_scalar(f"{key} validation", loss, iteration)
        ctx.tensorboard.add_scalar(f"{key} validation vs samples", loss, args.consumed_train_samples)
        if args.log_validation_ppl_to_tensorboard:
            ctx.tensorboard.add_scalar(f"{key} validation ppl", perplexity, iteration)
            ctx.tensorboard.add_scalar(
                f"{key} validation ppl vs samples", perplexity, args.consumed_train_samples
            )
        if ctx.wandb and is_last_rank():
            ctx.wandb.log({f"{key} validation": loss}, iteration)
    dashes = "-" * (len(text) + 1)
    print_rank_last(dashes)
    print_rank_last(text)
    print_rank_last(dashes)
