"""Flags that v0.9 does not have."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.flags import flag


@dataclass
class ExtrasConfig:
    """Safety, reports and later Megatron's rotary scaling."""

    # fmt: off
    sanity_checks: bool = flag(
        False, group="extras",
        help="Check every step that replicas agree and gradients are finite; names rank and parameter if not.")
    keep_last_checkpoints: int | None = flag(
        None, on=("--keep-last", "--keep-last-checkpoints"), group="extras",
        needs="--save", help="Keep this many newest checkpoints in --save and delete older ones.")
    allow_unsafe_pickle: bool = flag(
        False, group="extras",
        needs="--load or --pretrained-checkpoint", help="Load checkpoint files that can run code. Only for files you trust.")
    print_config: bool = flag(
        False, group="extras", help="Print every value, where it comes from, and end.")
    metrics_file: str | None = flag(
        None, group="extras", help="File for one JSON line per log line; default metrics.jsonl in --save.")
    mfu_peak_tflops: float | None = flag(
        None, group="extras",
        needs="--log-throughput",
        help="Peak TFLOP/s of one device for the share --log-throughput reports; default by name.")
    use_rope_scaling: bool = flag(
        False, group="extras",
        needs="--position-embedding-type rope",
        help="Scale rotary frequencies as Llama 3.1 does, to lengthen the context.")
    rope_scaling_factor: float = flag(8.0, group="extras", needs="--use-rope-scaling", help="The factor.")
    # fmt: on
