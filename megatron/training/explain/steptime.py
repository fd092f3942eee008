"""Predicted time of a step: operations by the device profile, the pipeline by its plan, the rest behind or after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron.core.pipeline_parallel.plan import Message, Op, make_plan
from megatron.core.pipeline_parallel.simulator import timeline
from megatron.training.explain.hardware import DeviceProfile
from megatron.training.explain.inventory import ChunkWork, LayerGroup
from megatron.training.explain.parameters import Stages
from megatron.training.explain.work import Gemm, Work
from megatron.training.explain.workload import Workload

#: Micro-batches per stage and chunk cycle that are simulated; further ones repeat the steady state.
_SIMULATED_ROUNDS = 5

Lines = list[list[tuple[Op, float, float]]]


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step and where they go. `lines` is the simulated pipeline (of fewer micro-batches if many)."""

    seconds: float
    pipeline_s: float
    bubble: float
    exposed_gather_s: float
    exposed_reduce_s: float
    optimizer_s: float
    lines: Lines


def forward_seconds(w: Workload, d: DeviceProfile, work: Work) -> float:
    """One operation's forward pass, transfers that it waits for included."""
    gathered = d.ring_seconds(work.gathered, w.tp, 1) if work.gathered else 0.0
    operands = work.operand_bytes or w.bytes
    seconds = sum(d.gemm_seconds(gemm, operands) for gemm in work.gemms) + d.pass_seconds(work.moved)
    seconds += _exposed(w, d, gathered)
    if work.attention:
        seconds += _attention_seconds(w, d, work.attention, work.ring)
    if work.exchanged:
        seconds += work.exchanged / d.group_rate(w.ep, w.tp * w.cp)
    return seconds


def backward_seconds(w: Workload, d: DeviceProfile, work: Work) -> float:
    """One operation's backward pass."""
    operands = work.operand_bytes or w.bytes
    of_weights = operands if w.fp8_wgrad else max(operands, w.bytes)
    gemms = sum(
        d.gemm_seconds(Gemm(m, k, n, batch), operands) + d.gemm_seconds(Gemm(n, k, m, batch), of_weights)
        for m, n, k, batch in work.gemms
    )
    waited = d.ring_seconds(work.gathered_back, w.tp, 1) if work.gathered_back else 0.0
    behind = d.ring_seconds(work.gathered_behind, w.tp, 1) if work.gathered_behind else 0.0
    seconds = max(gemms, behind) + d.pass_seconds(work.moved_back) + _exposed(w, d, waited)
    if work.attention:
        seconds += _attention_seconds(w, d, 2.5 * work.attention, 2 * work.ring)
    if work.exchanged:
        seconds += work.exchanged / d.group_rate(w.ep, w.tp * w.cp)
    return seconds


def _exposed(w: Workload, d: DeviceProfile, transfer: float) -> float:
    return transfer * (1 - d.hidden_tensor) if w.overlap_tensor else transfer


def _attention_seconds(w: Workload, d: DeviceProfile, flops: float, ring: float) -> float:
    """Attention, with the keys and values of other context-parallel ranks arriving behind it."""
    compute = d.attention_seconds(flops, w.bytes)
    if not ring:
        return compute
    return max(compute, d.send_seconds(ring, w.tp * w.cp - 1))


def work_seconds(w: Workload, d: DeviceProfile, chunk: ChunkWork) -> Iterator[tuple[Work, float, float]]:
    """(operation, seconds forward, seconds backward) of one micro-batch in a chunk; recomputation counts as backward."""
    ends = LayerGroup((*chunk.front, *chunk.back), 1, False)
    for group in (ends, *chunk.groups):
        for work in group.works:
            ahead = forward_seconds(w, d, work)
            back = backward_seconds(w, d, work) + (group.again + work.runs_again(w)) * ahead
            yield work, group.count * ahead, group.count * back


def chunk_seconds(w: Workload, d: DeviceProfile, chunk: ChunkWork) -> tuple[float, float]:
    """(forward, backward) of one micro-batch through a chunk."""
    parts = list(work_seconds(w, d, chunk))
    return sum(ahead for _, ahead, _ in parts), sum(back for _, _, back in parts)


def share_of(name: str, w: Workload, d: DeviceProfile, works: Sequence[Sequence[ChunkWork]]) -> float:
    """The share of the operations of this name in the time that the ranks of all stages work on a micro-batch."""
    parts = [part for row in works for chunk in row for part in work_seconds(w, d, chunk)]
    named = sum(ahead + back for work, ahead, back in parts if work.name == name)
    return named / sum(ahead + back for _, ahead, back in parts)


def predict(w: Workload, d: DeviceProfile, stages: Stages, works: Sequence[Sequence[ChunkWork]]) -> StepTime:
    """The time of one step; `works[stage][chunk]` as the inventory has them."""
    durations = [[chunk_seconds(w, d, chunk) for chunk in row] for row in works]
    send = d.send_seconds(w.message_bytes, w.world // w.stages)

    def lines_of(microbatches: int) -> Lines:
        plans = [make_plan(stage, w.stages, w.chunks, microbatches) for stage in range(w.stages)]

        def duration(stage: int, op: Op) -> float:
            ahead, back = durations[stage][op.chunk]
            return ahead if op.kind == "F" else back

        def transfer(stage: int, message: Message) -> float:
            return send

        return timeline(plans, w.chunks, duration, transfer)

    simulated = _simulated(w)
    lines = lines_of(simulated)
    length = _length(lines)
    if simulated < w.microbatches:
        # In the steady state every further round of `stages` micro-batches takes the same time.
        rounds = (w.microbatches - simulated) / w.stages
        period = length - _length(lines_of(simulated - w.stages))
        length += rounds * period
    busy = max(sum(sum(pair) for pair in row) for row in durations) * w.microbatches
    gather = max((_gather_stall(w, d, stages, lines, stage) for stage in range(w.stages)), default=0.0)
    reduce = max((_reduce_stall(w, d, stages, lines, stage) for stage in range(w.stages)), default=0.0)
    update = max(optimizer_seconds(w, d, sum(chunk.numel for chunk in row)) for row in stages)
    seconds = (length + gather + reduce + update) * (1 + d.jitter) + d.step_s
    bubble = 1 - busy / length if w.stages > 1 else 0.0
    return StepTime(seconds, length, bubble, gather, reduce, update, lines)


def _simulated(w: Workload) -> int:
    rounds = w.microbatches // w.stages
    if rounds <= _SIMULATED_ROUNDS:
        return w.microbatches
    return _SIMULATED_ROUNDS * w.stages + w.microbatches % w.stages


def _length(lines: Lines) -> float:
    return max(end for line in lines for _, _, end in line)


def _replicas(w: Workload) -> int:
    return w.dp * w.cp


def _gather_stall(w: Workload, d: DeviceProfile, stages: Stages, lines: Lines, stage: int) -> float:
    """How long parameter gathers (distributed optimizer) hold up a stage.

    Overlapped, the parameters of a layer need only be there when the first micro-batch reaches it.
    """
    if not w.distributed_optimizer or _replicas(w) == 1:
        return 0.0
    whole = d.ring_seconds(w.sent_bytes(stages[stage]), _replicas(w), w.tp)
    if not w.overlap_gather:
        return whole
    first = {op.chunk: (start, end) for op, start, end in reversed(lines[stage]) if op.kind == "F"}
    done = stall = 0.0
    sent = max(1, w.sent_bytes(stages[stage]))
    for chunk, part in enumerate(stages[stage]):
        done += whole * w.sent_bytes([part]) / sent
        layers = max(1, part.encoder_layers + part.decoder_layers)
        start, end = first[chunk]
        stall = max(stall, done - (start + (end - start) * (layers - 1) / layers))
    return stall


def _reduce_stall(w: Workload, d: DeviceProfile, stages: Stages, lines: Lines, stage: int) -> float:
    """How much longer than its pipeline a stage's gradient reduction takes.

    Overlapped, a layer's gradients leave as soon as the last micro-batch's backward has passed it.
    """
    if _replicas(w) == 1:
        return 0.0
    rings = 1 if w.distributed_optimizer else 2
    per_element = rings * w.gradient_bytes
    numel = max(1, sum(c.numel for c in stages[stage]))
    whole = d.ring_seconds(numel * per_element, _replicas(w), w.tp)
    if not w.overlap_gradients:
        return whole
    last = {op.chunk: (start, end) for op, start, end in lines[stage] if op.kind == "B"}
    free = 0.0
    for chunk in sorted(last, key=lambda c: last[c][1]):
        part = stages[stage][chunk]
        start, end = last[chunk]
        layers = max(1, part.encoder_layers + part.decoder_layers)
        share = whole * part.numel / numel / layers
        for done in range(1, layers + 1):
            free = max(free, start + (end - start) * done / layers) + share
    return max(0.0, free - _length(lines))


def optimizer_seconds(w: Workload, d: DeviceProfile, numel: int) -> float:
    """Zeroing gradients, their norm, and the update of the parameters that a rank owns."""
    owned = numel / _replicas(w) if w.distributed_optimizer else numel
    per_element = 12 + 4 + (16 if w.adam else 8) + w.bytes
    return d.pass_seconds(numel * w.gradient_bytes + owned * per_element)
