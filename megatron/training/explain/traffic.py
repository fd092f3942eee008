"""Bytes that one rank sends per step, by who it talks to and over which kind of link."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron.training.explain.hardware import DeviceProfile
from megatron.training.explain.inventory import ChunkWork
from megatron.training.explain.parameters import Stages
from megatron.training.explain.work import Work
from megatron.training.explain.workload import Workload


@dataclass(frozen=True)
class Traffic:
    """What one rank sends in a step to the others of one group. `inside`: no transfer leaves the node."""

    group: str
    what: str
    bytes: float
    inside: bool


def of_stage(
    w: Workload, d: DeviceProfile, stage: int, stages: Stages, works: Sequence[ChunkWork]
) -> list[Traffic]:
    """Everything a rank of this stage sends; rings send all but one part of what they carry."""
    forward = _sum(works, lambda work: work.gathered)
    again = _sum(works, lambda work: work.gathered, recomputed_only=True)
    backward = _sum(works, lambda work: work.gathered_back + work.gathered_behind)
    around = 3 * _sum(works, lambda work: work.ring)
    spread = 2 * _sum(works, lambda work: work.exchanged)
    handed = w.message_bytes * _messages(w, stage)
    inner, n = w.tp * w.cp, w.microbatches
    rows = [
        Traffic(
            "tensor",
            "activations, gradients",
            n * _ring(w.tp) * (forward + again + backward),
            w.tp <= d.per_node,
        ),
        Traffic("context", "keys, values, gradients", n * around, inner <= d.per_node),
        Traffic("expert", "tokens", n * spread, inner * w.ep <= d.per_node),
        Traffic("pipeline", "activations, gradients", n * handed, w.world <= d.per_node),
    ]
    near = w.tp * w.dp * w.cp <= d.per_node
    reduced = gathered = tied = 0.0
    holders = sum(any(param.tied for chunk in row for param in chunk.parameters) for row in stages)
    for chunk in stages[stage]:
        for param in chunk.parameters:
            replicas = w.dp * w.cp // (w.ep if param.expert else 1)
            rings = 1 if w.distributed_optimizer else 2
            reduced += param.numel * w.gradient_bytes * rings * _ring(replicas)
            if w.distributed_optimizer:
                gathered += param.numel * w.weight_bytes(param) * _ring(replicas)
            if param.tied:
                tied += param.numel * w.gradient_bytes * 2 * _ring(holders)
    rows += [
        Traffic("pipeline", "gradients of tied words", tied, w.world <= d.per_node),
        Traffic("data", "gradients", reduced, near),
        Traffic("data", "parameters", gathered, near),
    ]
    return [row for row in rows if row.bytes]


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks


def _messages(w: Workload, stage: int) -> int:
    """Activations and gradients that leave a stage per micro-batch."""
    last = w.stages * w.chunks - 1
    virtual = [chunk * w.stages + stage for chunk in range(w.chunks)]
    return sum((v < last) + (v > 0) for v in virtual)


def _sum(works: Sequence[ChunkWork], value: Callable[[Work], float], recomputed_only: bool = False) -> float:
    total = 0.0
    for chunk in works:
        if not recomputed_only:
            total += sum(value(work) for work in (*chunk.front, *chunk.back))
        for group in chunk.groups:
            if group.again or not recomputed_only:
                total += group.count * sum(value(work) for work in group.works)
    return total
