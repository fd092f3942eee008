"""Who is recomputed in the backward pass: a plan over the layers of one chunk, and the loop that follows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from megatron.core import tensor_parallel
from megatron.core.errors import ConfigError

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass(frozen=True)
class Segment:
    """Layers [start, stop) of a chunk, run as one checkpointed function or plainly."""

    start: int
    stop: int
    recomputed: bool


def plan_recompute(num_layers: int, method: str | None, recompute_num_layers: int | None) -> list[Segment]:
    """How the `num_layers` layers of a chunk are run under full recomputation.

    `uniform`: all of them, in checkpointed segments of `recompute_num_layers` (the last may be shorter),
    which saves the most memory. `block`: the first `recompute_num_layers`, one by one, and the rest not at
    all, which spends no more recomputation than fits. ConfigError for another method or a missing number.
    """
    if method not in ("uniform", "block"):
        raise ConfigError(
            "--recompute-method",
            why=f"full recomputation needs a method, uniform or block, not {method}",
            fix="add --recompute-method uniform --recompute-num-layers 1",
        )
    if recompute_num_layers is None or recompute_num_layers < (1 if method == "uniform" else 0):
        raise ConfigError(
            "--recompute-num-layers",
            why=f"{method} recomputation needs a number of layers, not {recompute_num_layers}",
            fix="add --recompute-num-layers 1",
        )
    if method == "uniform":
        starts = range(0, num_layers, recompute_num_layers)
        return [Segment(s, min(s + recompute_num_layers, num_layers), True) for s in starts]
    return [Segment(i, i + 1, i < recompute_num_layers) for i in range(num_layers)]


def run_segments(
    segments: Sequence[Segment],
    run_layers: Callable[[int, int, Tensor, Tensor | None], tuple[Tensor, Tensor | None]],
    hidden: Tensor,
    context: Tensor | None,
    distribute_saved_activations: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Follow a plan: `run_layers(start, stop, hidden, context)` for every segment, checkpointed where it says
    so.

    hidden [s/sp, b, h] and context [sk/sp, b, h] or None -> the same after the last layer. With
    `distribute_saved_activations` each tensor parallel rank keeps 1/tp of a segment's input.
    """
    for segment in segments:
        if not segment.recomputed:
            hidden, context = run_layers(segment.start, segment.stop, hidden, context)
            continue

        def run(hidden: Tensor, context: Tensor | None, segment: Segment = segment) -> Any:
            return run_layers(segment.start, segment.stop, hidden, context)

        hidden, context = tensor_parallel.checkpoint(run, distribute_saved_activations, hidden, context)
    return hidden, context


def run_stack(
    config: TransformerConfig,
    segments: Sequence[Segment] | None,
    depth: int,
    run_layers: Callable[[int, int, Tensor, Tensor | None], tuple[Tensor, Tensor | None]],
    hidden: Tensor,
    context: Tensor | None,
    training: bool,
) -> tuple[Tensor, Tensor | None]:
    """All `depth` layers of a chunk, in training as the plan `segments` says if there is one; shapes as in `run_segments`.

    Under sequence parallelism each rank drops other positions, so their masks must differ between the ranks.
    """
    fork = config.sequence_parallel and training
    with tensor_parallel.get_cuda_rng_tracker().fork() if fork else nullcontext():
        if segments is None or not training:
            return run_layers(0, depth, hidden, context)
        return run_segments(segments, run_layers, hidden, context, bool(config.distribute_saved_activations))
