"""Flags about what is printed and written down."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.flags import flag


@dataclass
class LoggingConfig:
    """The log line, TensorBoard, Weights & Biases, timers."""

    # fmt: off
    log_interval: int = flag(100, group="logging", help="Steps between log lines.")
    log_params_norm: bool = flag(False, group="logging", help="Compute and log the norm of all parameters.")
    log_throughput: bool = flag(False, group="logging", help="Log FLOP/s per device, with their share of its peak.")
    log_progress: bool = flag(
        False, group="logging", needs="--save", help="Append work done and time taken to progress.txt in --save.")
    timing_log_level: int = flag(
        0, choices=(0, 1, 2), group="logging", help="Detail of timers: the step, its parts, or every small piece.")
    timing_log_option: str = flag(
        "minmax", choices=("max", "minmax", "all"), group="logging",
        help="Times to report over ranks: the largest, both extremes, or each.")
    tensorboard_dir: str | None = flag(None, group="logging", help="Directory for TensorBoard.")
    tensorboard_log_interval: int = flag(
        1, group="logging", needs="--tensorboard-dir", help="Steps between TensorBoard entries.")
    tensorboard_queue_size: int = flag(
        1000, group="logging", needs="--tensorboard-dir", help="Entries TensorBoard holds back before writing.")
    log_timers_to_tensorboard: bool = flag(
        False, group="logging",
        needs="--tensorboard-dir or --wandb-project", help="Write timers to TensorBoard.")
    log_loss_scale_to_tensorboard: bool = flag(
        True, off="--no-log-loss-scale-to-tensorboard", group="logging",
        needs="--tensorboard-dir", help="Do not write the loss scale to TensorBoard.")
    log_validation_ppl_to_tensorboard: bool = flag(
        False, group="logging", needs="--tensorboard-dir", unless="--eval-iters 0",
        help="Write validation perplexity to TensorBoard.")
    log_memory_to_tensorboard: bool = flag(
        False, group="logging", status="gpu", needs="--tensorboard-dir", help="Write device memory to TensorBoard.")
    log_world_size_to_tensorboard: bool = flag(
        False, group="logging", needs="--tensorboard-dir", help="Write the world size to TensorBoard.")
    wandb_project: str = flag("", group="logging", help="Project at Weights & Biases; empty: do not use it.")
    wandb_exp_name: str = flag(
        "", group="logging", needs="--wandb-project", help="Name of the run at Weights & Biases.")
    wandb_save_dir: str = flag("", group="logging",
        needs="--wandb-project", help="Local directory of Weights & Biases; default inside --save.")
    log_straggler: bool = flag(
        False, group="straggler", status="gpu",
        help="With each log line, name the ranks whose devices take longest and least for the forward pass.")
    disable_straggler_on_startup: bool = flag(
        False, group="straggler", status="gpu", needs="--log-straggler", help="Measure only once switched on by request.")
    straggler_ctrlr_port: int = flag(
        65535, group="straggler", status="gpu", needs="--log-straggler",
        help="Port of rank 0's host at which a request (curl HOST:PORT) switches measuring on or off.")
    straggler_minmax_count: int = flag(
        1, group="straggler", status="gpu", needs="--log-straggler", help="Slowest and fastest ranks to name.")
    logging_level: int | None = flag(
        None, group="logging", help="Level of Python's loggers; default from MEGATRON_LOGGING_LEVEL, else 20 (INFO).")
    # fmt: on
