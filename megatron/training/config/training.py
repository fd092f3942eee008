"""Flags of the training loop: batch sizes, length, exits, profiling, garbage collection, fusions."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.flags import flag


@dataclass
class TrainingConfig:
    """How long to train, on which batches, and what the loop does besides."""

    # fmt: off
    micro_batch_size: int | None = flag(None, group="training", help="Samples in one forward pass of one replica.")
    batch_size: int | None = flag(
        None, group="training", status="unsupported", reason="it was renamed", instead="--micro-batch-size",
        help="Old name of --micro-batch-size.")
    global_batch_size: int | None = flag(
        None, group="training", help="Samples per optimizer step; default micro batch x data-parallel size.")
    rampup_batch_size: list[str] | None = flag(
        None, parse=None, nargs="*", group="training",
        help="Start, increment and samples: grow the global batch from start by increments over that many samples.")
    decrease_batch_size_if_needed: bool = flag(
        False, group="training",
        help="Run with a smaller batch where micro batch x data-parallel size does not divide the global batch.")
    recompute_activations: bool = flag(
        False, group="training", help="The same as --recompute-granularity selective.")
    checkpoint_activations: bool = flag(
        False, group="training", status="unsupported", reason="it was renamed", instead="--recompute-activations",
        help="Old name of --recompute-activations.")
    train_iters: int | None = flag(None, group="training", help="Optimizer steps to train for.")
    train_samples: int | None = flag(None, group="training", help="Samples to train for, instead of --train-iters.")
    exit_interval: int | None = flag(
        None, group="training", help="End the process at the next iteration divisible by this number.")
    exit_duration_in_mins: int | None = flag(None, group="training", help="End the process after this many minutes.")
    exit_signal_handler: bool = flag(False, group="training", help="On SIGTERM save a checkpoint and end.")
    bias_gelu_fusion: bool = flag(
        True, off="--no-bias-gelu-fusion", group="training",
        unless="--swiglu or --squared-relu or --openai-gelu or --disable-bias-linear", help="Do not fuse bias and GELU.")
    bias_swiglu_fusion: bool = flag(
        True, off="--no-bias-swiglu-fusion", group="training", needs="--swiglu", help="Do not fuse bias and SwiGLU.")
    empty_unused_memory_level: int = flag(
        0, choices=(0, 1, 2), group="training", status="gpu",
        help="Return cached device memory: never, after each step, or also between its halves.")
    check_weight_hash_across_dp_replicas_interval: int | None = flag(
        None, group="training", help="Every so many steps compare weight hashes over the data-parallel replicas.")
    train_sync_interval: int | None = flag(
        None, group="training", status="gpu",
        help="Every so many steps wait for the device, so that the host does not run far ahead.")
    manual_gc: bool = flag(
        False, group="training",
        help="Switch Python's garbage collector off and run it on all ranks at the same steps.")
    manual_gc_interval: int = flag(
        0, group="training", needs="--manual-gc", help="Steps between collections; 0 means at evaluations only.")
    manual_gc_eval: bool = flag(
        True, off="--no-manual-gc-eval", group="training",
        needs="--manual-gc", help="Do not collect before and after evaluation.")
    # fmt: on


@dataclass
class ProfilingConfig:
    """Which steps of which ranks are profiled."""

    # fmt: off
    profile: bool = flag(False, group="training", help="Profile some steps (nsys, or torch's profiler).")
    profile_step_start: int = flag(10, group="training", needs="--profile", help="First profiled step.")
    profile_step_end: int = flag(
        12, group="training", needs="--profile", help="First step that is not profiled any more.")
    use_pytorch_profiler: bool = flag(
        False, group="training", needs="--profile", help="Write a trace with torch's profiler into --tensorboard-dir.")
    profile_ranks: list[int] = flag(
        [0], nargs="+", group="training", needs="--profile", help="Global ranks that profile.")
    # fmt: on


@dataclass
class CommandLineConfig:
    """Where arguments come from besides the command line."""

    # fmt: off
    yaml_cfg: str | None = flag(
        None, group="experimental",
        help="YAML file with values for flags; flags given on the command line go before it.")
    # fmt: on
