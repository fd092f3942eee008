"""Settings of the optimizer: update rule, precision, loss scale, clipping."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron.core.flags import flag, from_args, runtime


@dataclass
class OptimizerConfig:
    """What `get_megatron_optimizer` builds."""

    # fmt: off
    optimizer: str = flag("adam", choices=("adam", "sgd"), group="training", help="Update rule; adam is AdamW.")
    lr: float | None = flag(
        None, group="learning rate",
        help="Peak learning rate, reached after warm-up and followed by the chosen decay.")
    min_lr: float | None = flag(
        None, cli_default=0.0, group="learning rate",
        unless="--lr-decay-style constant", help="Lower bound of the learning rate.")
    decoupled_lr: float | None = flag(
        None, group="learning rate", help="Peak learning rate of the input embedding and the output layer alone.")
    decoupled_min_lr: float | None = flag(
        None, group="learning rate",
        needs="--decoupled-lr", unless="--lr-decay-style constant",
        help="Lower bound of the learning rate set by --decoupled-lr.")
    weight_decay: float = flag(
        0.01, group="regularization",
        unless="--weight-decay-incr-style linear or --weight-decay-incr-style cosine",
        help="Weight decay of matrices; biases and norms have none.")
    fp16: bool = from_args("fp16", default=False)
    bf16: bool = from_args("bf16", default=False)
    params_dtype: torch.dtype = from_args("params_dtype", default=torch.float32)
    loss_scale: float | None = flag(
        None, group="mixed precision",
        needs="--fp16 or --bf16 or --use-distributed-optimizer",
        help="Constant loss scale, a power of two; without it fp16 uses a dynamic scale.")
    initial_loss_scale: float = flag(
        2**32, group="mixed precision", needs="--fp16", unless="--loss-scale", help="First value of the dynamic loss scale.")
    min_loss_scale: float = flag(
        1.0, group="mixed precision", needs="--fp16", unless="--loss-scale", help="Lower bound of the dynamic loss scale.")
    loss_scale_window: float = flag(
        1000, group="mixed precision",
        needs="--fp16", unless="--loss-scale", help="Steps without overflow after which the dynamic loss scale doubles.")
    hysteresis: int = flag(
        2, group="mixed precision",
        needs="--fp16", unless="--loss-scale", help="Overflows tolerated before the dynamic loss scale halves.")
    adam_beta1: float = flag(
        0.9, group="regularization", needs="--optimizer adam", help="Adam: decay of the running mean of gradients.")
    adam_beta2: float = flag(
        0.999, group="regularization",
        needs="--optimizer adam", help="Adam: decay of the running mean of squared gradients.")
    adam_eps: float = flag(
        1e-08, group="regularization", needs="--optimizer adam", help="Adam: term added to the denominator.")
    sgd_momentum: float = flag(0.9, group="regularization", needs="--optimizer sgd", help="SGD: momentum factor.")
    use_distributed_optimizer: bool = from_args("use_distributed_optimizer", default=False)
    overlap_grad_reduce: bool = from_args("overlap_grad_reduce", default=False)
    overlap_param_gather: bool = from_args("overlap_param_gather", default=False)
    overlap_param_gather_with_optimizer_step: bool = flag(
        False, group="distributed",
        help="With interleaved pipelines: gather the first model chunk's parameters while the others are updated.")
    clip_grad: float = flag(1.0, group="regularization", help="Largest global gradient norm; 0 switches clipping off.")
    log_num_zeros_in_grad: bool = flag(False, group="logging", help="Count and log the zeros in the gradient.")
    barrier_with_L1_time: bool = from_args("barrier_with_L1_time", default=False)
    timers: Callable | None = runtime(None)
    config_logger_dir: str = from_args("config_logger_dir", default="")
    # fmt: on
