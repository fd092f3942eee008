"""An explanation as lines: the start-up report, then what no running process knows beforehand."""

from __future__ import annotations

import contextlib
import io
from argparse import Namespace
from collections.abc import Sequence

from megatron.core.kernels import capability
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)
from megatron.core.ssm.mamba_hybrid_layer_allocation import layer_counts
from megatron.core.timers import Timers
from megatron.training import report
from megatron.training.context import TrainContext
from megatron.training.data import get_train_valid_test_num_samples
from megatron.training.explain import data, mamba, parameters, steptime
from megatron.training.explain.command import CAUSAL
from megatron.training.explain.explanation import Explanation
from megatron.training.flops import num_floating_point_operations
from megatron.training.setup import get_optimizer_param_scheduler

_GIB = 2**30
_BARS = "▁▂▃▄▅▆▇█"
#: Stages and operations shown; the ones between are alike.
_WIDEST_STRIP = 48


class _NoOptimizer:
    """What a schedule needs of an optimizer when nothing is to be updated."""

    param_groups: list[dict[str, object]] = []


def lines(e: Explanation) -> list[str]:
    """The whole explanation."""
    name = None if e.reading.command.device == "cpu" else e.profile.name.upper()
    with capability.pretend(e.reading.machine):
        layout = report.layout(e.args, name)
    return [
        *layout,
        *(f">   {remark}" for remark in e.reading.remarks),
        *report.tokenizer(e.args, e.reading.vocabulary),
        *model(e),
        *report.kernels(e.choices),
        *run(e),
        *memory(e),
        *traffic(e),
        *time(e),
    ]


def model(e: Explanation) -> list[str]:
    """Parameters in total and per rank; of a hybrid model what its layers are."""
    result = report.model_size(parameters.total(e.stages, e.args))
    kinds = "".join(chunk.kinds for row in e.stages for chunk in row)
    if kinds:
        result.append(f">   layers: {layer_counts(kinds)}")
    for first, last, row in _runs([[(chunk.numel, chunk.kinds) for chunk in row] for row in e.stages]):
        text = " + ".join(f"{numel:,}" + (f", {letters}" if letters else "") for numel, letters in row)
        result.append(f">   on each rank of {_stages(first, last)}: {text}")
    return result


def run(e: Explanation) -> list[str]:
    """The schedule and the data, as far as the flags give the run a length."""
    args = Namespace(**vars(e.args))
    if not (args.train_iters or args.train_samples):
        return ["> the run has no length: give --train-iters or --train-samples to see its schedule and data"]
    if args.lr is None:
        return ["> no learning rate: give --lr to see its schedule"]
    context = TrainContext(args, Timers(0, "minmax"))
    ramp = [args.rampup_batch_size, args.global_batch_size, args.micro_batch_size, args.data_parallel_size]
    init_num_microbatches_calculator(1, *ramp)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            scheduler = get_optimizer_param_scheduler(_NoOptimizer(), ctx=context)  # type: ignore[arg-type]
    finally:
        destroy_num_microbatches_calculator()
    wanted = get_train_valid_test_num_samples(ctx=context)
    return report.schedule(args, scheduler) + data.lines(args, wanted, e.reading.command.script in CAUSAL)


def memory(e: Explanation) -> list[str]:
    """Bytes per rank of each stage, and how activations rise and fall over the first operations of a step."""
    result = ["> memory per rank in GiB: weights + gradients + optimizer + activations at their peak = total"]
    largest = max(stage.activations for stage in e.memory) or 1.0
    for stage, m in enumerate(e.memory):
        parts = (m.weights, m.gradients, m.optimizer, m.activations)
        text = " + ".join(f"{part / _GIB:.3g}" for part in parts)
        result.append(f">   stage {stage}: {text} = {m.total / _GIB:.3g}  {_strip(m.held, largest)}")
    worst = max(m.total for m in e.memory)
    if worst > e.profile.capacity and e.reading.command.device != "cpu":
        result.append(
            f">   does not fit: {worst / 1e9:.0f} GB of {e.profile.capacity / 1e9:.0f} GB; consider more tensor or pipeline "
            "stages, --sequence-parallel, --recompute-granularity selective or full, --use-distributed-optimizer"
        )
    return result


def traffic(e: Explanation) -> list[str]:
    """What one rank sends in a step."""
    result = ["> bytes sent per rank and step:"]
    for first, last, rows in _runs([e.traffic(stage) for stage in range(len(e.stages))]):
        for row in rows:
            where = "inside the node" if row.inside else "between nodes"
            result.append(
                f">   {_stages(first, last)}: {row.bytes / 1e9:.4g} GB {row.group}-parallel ({row.what}), {where}"
            )
    return result if len(result) > 1 else ["> bytes sent per rank and step: none"]


def time(e: Explanation) -> list[str]:
    """FLOPs and predicted time of one step."""
    flops = num_floating_point_operations(e.args, e.args.global_batch_size)
    per_rank = flops / e.args.world_size
    s = e.step
    rate = per_rank / s.seconds
    rest = ("gradients", s.exposed_reduce_s), ("parameters", s.exposed_gather_s)
    waits = ", ".join(f"{what} not hidden {seconds:.3g} s" for what, seconds in rest)
    result = [
        f"> model FLOPs per step: {flops:.4g}, {per_rank:.4g} per rank",
        f"> predicted step on {e.profile.name}: {s.seconds:.4g} s = {rate / 1e12:.4g} TFLOP/s per rank, "
        f"{100 * rate / e.profile.peak:.1f}% of the peak (an estimate; docs/scale.md)",
        f">   pipeline {s.pipeline_s:.4g} s (bubble {100 * s.bubble:.1f}%), {waits}, optimizer {s.optimizer_s:.3g} s",
    ]
    scans = steptime.share_of(mamba.SCAN, e.workload, e.profile, e.works)
    if scans:
        by = "Triton kernels, between them plain PyTorch" if e.workload.fused_scan else "plain PyTorch"
        result.append(
            f">   scans of Mamba layers: {100 * scans:.0f}% of the work of a micro-batch ({by}; counted by their "
            "passes over memory, not measured on a GPU)"
        )
    return result


def _stages(first: int, last: int) -> str:
    return f"stage {first}" if first == last else f"stages {first}-{last}"


def _runs(rows: Sequence[list]) -> list[tuple[int, int, list]]:
    """(first, last, row) of each stretch of equal rows."""
    result: list[tuple[int, int, list]] = []
    for index, row in enumerate(rows):
        if result and result[-1][2] == row:
            result[-1] = (result[-1][0], index, row)
        else:
            result.append((index, index, row))
    return result


def _strip(held: Sequence[float], largest: float) -> str:
    """A small curve of `held` over the operations of a step, the end left out where it only repeats."""
    step = max(1, -(-len(held) // _WIDEST_STRIP))
    peaks = [max(held[i : i + step]) for i in range(0, len(held), step)]
    return "".join(_BARS[min(7, int(8 * value / largest))] for value in peaks)
