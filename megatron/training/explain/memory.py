"""Bytes per rank: weights, gradients and optimizer state by the buffers' own layout, activations by the pipeline plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.distributed.buckets import default_bucket_size, plan_buffer
from megatron.core.pipeline_parallel.plan import Op, make_plan
from megatron.training.explain.inventory import ChunkWork, kept_bytes, recompute_bytes
from megatron.training.explain.parameters import Chunk, Parameter
from megatron.training.explain.workload import Workload


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank of a stage. `held` are activations after each operation of the plan, in its order."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    held: tuple[float, ...]

    @property
    def total(self) -> float:
        """At the fullest moment of a step."""
        return self.weights + self.gradients + self.optimizer + self.activations


def stage_memory(w: Workload, stage: int, chunks: Sequence[Chunk], works: Sequence[ChunkWork]) -> StageMemory:
    """The memory of one rank of a stage."""
    weights = gradients = optimizer = 0.0
    for chunk in chunks:
        for expert in (False, True):
            replicas = w.dp * w.cp // (w.ep if expert else 1)
            for each in sorted({w.weight_bytes(p) for p in chunk.parameters}):
                alike = [p for p in chunk.parameters if p.expert == expert and w.weight_bytes(p) == each]
                padded = buffer_numel(alike, w, replicas)
                weights += (padded if w.distributed_optimizer else sum(p.numel for p in alike)) * each
                gradients += padded * w.gradient_bytes
                owned = padded / replicas if w.distributed_optimizer else padded
                optimizer += owned * optimizer_bytes(w, each)
        # The fp8 operands, as they are and transposed, live from step to step.
        weights += sum(p.numel for p in chunk.parameters if p.fp8) * (1 if w.fp8_weights else 2)
    held = tuple(held_over_time(w, stage, works))
    return StageMemory(weights, gradients, optimizer, max(held), held)


def buffer_numel(params: Sequence[Parameter], w: Workload, replicas: int) -> int:
    """Elements of the flat buffer that these parameters live in, padding included."""
    bucket = default_bucket_size(replicas) if w.overlap_gradients else None
    layout = plan_buffer(
        [param.numel for param in params],
        bucket_size=bucket,
        data_parallel_size=replicas,
        sharded=w.distributed_optimizer,
        own_bucket={position for position, param in enumerate(params) if param.tied},
    )
    return layout.numel


def optimizer_bytes(w: Workload, weight_bytes: int) -> int:
    """Per parameter: moments, the fp32 copies of weights of fewer bytes, and of half-precision gradients."""
    moments = 8 if w.adam else 4
    copies = 4 if weight_bytes < 4 else 0
    return moments + copies + (4 if w.gradient_bytes == 2 else 0)


def held_over_time(w: Workload, stage: int, works: Sequence[ChunkWork]) -> list[float]:
    """Bytes of activations held after each operation of the stage's plan; recomputed ones count at the backward."""
    kept = [kept_bytes(w, chunk) for chunk in works]
    again = [recompute_bytes(w, chunk) for chunk in works]
    alive, held = 0.0, []
    for op in stage_plan(w, stage):
        if op.kind == "F":
            alive += kept[op.chunk]
            held.append(alive)
        else:
            held.append(alive + again[op.chunk])
            alive -= kept[op.chunk]
    return held


def stage_plan(w: Workload, stage: int) -> list[Op]:
    """The stage's plan for enough micro-batches to reach the steady state."""
    warmup = 2 * w.stages * w.chunks
    rounded = -(-warmup // w.stages) * w.stages
    return make_plan(stage, w.stages, w.chunks, min(w.microbatches, rounded))
