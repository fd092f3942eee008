"""progress.txt: when jobs started and saved, and what they computed (spec: training, section 20.3)."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

from megatron.core.errors import CheckpointError
from megatron.training.context import TrainContext
from megatron.training.global_vars import get_context
from megatron.training.utils import append_to_progress_log

_FORMAT = "%Y-%m-%d %H:%M:%S"


def get_start_time_from_progress_log(*, ctx: TrainContext | None = None) -> tuple[datetime, float]:
    """When the current streak of jobs on this number of ranks started, and the FLOPs done before it."""
    args = (ctx or get_context()).args
    path = Path(args.save) / "progress.txt"
    start_time: datetime | None = None
    start_flops = 0.0
    latest_flops = 0.0
    for line in path.read_text(encoding="utf-8").splitlines():
        fields = line.split("\t")
        world_size = int(fields[2].removeprefix("# GPUs: "))
        if fields[3] == "Saved checkpoint":
            latest_flops = _number(fields, "Floating-point operations")
        if world_size != args.world_size:
            start_time = None
        elif start_time is None and fields[3] == "Starting job":
            start_time = datetime.strptime(fields[0], _FORMAT)
            start_flops = latest_flops
    if start_time is None:
        raise CheckpointError(
            str(path), f"has no 'Starting job' line for {args.world_size} ranks", "delete or mend the file"
        )
    return start_time, start_flops


def _number(fields: list[str], name: str) -> float:
    return next(float(field.split(": ")[1]) for field in fields if field.startswith(name))


class JobThroughput:
    """Throughput of this job and of its streak of jobs, for the lines of progress.txt."""

    def __init__(self, flops_so_far: float) -> None:
        self._started, self._flops_before = time.time(), flops_so_far

    def append(self, iteration: int, flops_so_far: float, *, ctx: TrainContext | None = None) -> None:
        """Write the "Saved checkpoint" line (`--log-progress`); all ranks must call."""
        ctx = ctx or get_context()
        args = ctx.args
        if args.save is None:
            return
        per_rank = 1e12 * args.world_size
        job = (flops_so_far - self._flops_before) / ((time.time() - self._started) * per_rank)
        start_time, start_flops = get_start_time_from_progress_log(ctx=ctx)
        elapsed = max((datetime.now() - start_time).total_seconds(), 1.0)
        cumulative = (flops_so_far - start_flops) / (elapsed * per_rank)
        tokens = args.consumed_train_samples * args.seq_length / 10**9
        saved = "Saving async checkpoint" if args.async_save else "Saved checkpoint"
        append_to_progress_log(
            f"{saved}\tIteration: {iteration}\tJob throughput: {job:.1f} TFLOP/s/GPU\t"
            f"Cumulative throughput: {cumulative:.1f} TFLOP/s/GPU\t"
            f"Floating-point operations: {flops_so_far:.2e}\tTokens (in billions): {tokens:.2f}",
            ctx=ctx,
        )
