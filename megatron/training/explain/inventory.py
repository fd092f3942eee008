"""What each chunk of a model does to one micro-batch on one rank: GEMMs, memory passes, transfers, and what is kept for
the backward pass.

One inventory serves predicted time, traffic, FLOPs and activation memory. What a layer does is written down in layers.py
and mamba.py; here layers are put together as the model has them, and as they are recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby

from megatron.core.ssm.mamba_hybrid_layer_allocation import Symbols
from megatron.core.transformer.recompute import plan_recompute
from megatron.training.explain import layers
from megatron.training.explain.mamba import mamba_layer
from megatron.training.explain.parameters import Chunk
from megatron.training.explain.work import Work
from megatron.training.explain.workload import Workload

Layer = tuple[Work, ...]


@dataclass(frozen=True)
class LayerGroup:
    """`count` equal layers of a chunk or, if `again`, equal stretches of layers that are recomputed together."""

    works: Layer
    count: int
    again: bool


@dataclass(frozen=True)
class ChunkWork:
    """The operations of one model chunk: before its layers, in them, after them; `stream` is one hidden state."""

    front: tuple[Work, ...]
    groups: tuple[LayerGroup, ...]
    back: tuple[Work, ...]
    stream_bytes: float

    def all(self) -> list[tuple[Work, int]]:
        """(operation, how often it runs forward before any recomputation)."""
        counted = [(work, 1) for work in (*self.front, *self.back)]
        for group in self.groups:
            counted += [(work, group.count) for work in group.works]
        return counted


def chunk_work(w: Workload, chunk: Chunk) -> ChunkWork:
    """What a chunk of the model does."""
    front = layers.embedding(w) if chunk.embeds else []
    back = layers.head(w, w.decoder_tokens if w.encoder_decoder else w.tokens) if chunk.scores else []
    stacks = [_hybrid_stack(w, chunk)] if chunk.kinds else _transformer_stacks(w, chunk)
    groups = chain.from_iterable(_groups(w, stack) for stack in stacks)
    held = w.tokens * w.replicated * w.hidden * w.residual_bytes
    return ChunkWork(tuple(front), tuple(groups), tuple(back), held)


def _transformer_stacks(w: Workload, chunk: Chunk) -> list[list[Layer]]:
    """The layers of an encoder and of a decoder."""
    stacks = []
    kinds = [(chunk.encoder_layers, False, False), (chunk.decoder_layers, True, w.encoder_decoder)]
    for count, decoder, cross in kinds:
        narrow = min(count, chunk.fp8_layers)
        stack: list[Layer] = []
        for alike, fp8 in ((count - narrow, False), (narrow, True)):
            stack += [tuple(layers.transformer_layer(w, decoder=decoder, cross=cross, fp8=fp8))] * alike
        stacks.append(stack)
    return stacks


def _hybrid_stack(w: Workload, chunk: Chunk) -> list[Layer]:
    """Layers of several kinds, in their order."""
    made: dict[str, Layer] = {
        Symbols.ATTENTION: tuple(layers.attention_part(w, decoder=True)),
        Symbols.MLP: tuple(layers.mlp_part(w)),
    }
    if chunk.mixer is not None:
        made[Symbols.MAMBA] = tuple(mamba_layer(w, chunk.mixer))
    return [made[kind] for kind in chunk.kinds]


def _groups(w: Workload, stack: Sequence[Layer]) -> list[LayerGroup]:
    """A stack as it runs: layer by layer, or by the plan of full recomputation."""
    units = [(layer, False) for layer in stack]
    if w.recompute == "full":
        plan = plan_recompute(len(stack), w.recompute_method, w.recompute_layers)
        units = [(tuple(chain.from_iterable(stack[s.start : s.stop])), s.recomputed) for s in plan]
    return [LayerGroup(works, len(list(alike)), again) for (works, again), alike in groupby(units)]


def kept_bytes(w: Workload, chunk: ChunkWork) -> float:
    """Bytes that a micro-batch of this chunk occupies between its forward and its backward pass."""
    ends = _kept(w, (*chunk.front, *chunk.back))
    return ends + sum(_kept_by(w, chunk, group) for group in chunk.groups)


def _kept(w: Workload, works: Sequence[Work]) -> float:
    return sum(work.kept for work in works if not work.runs_again(w))


def _kept_by(w: Workload, chunk: ChunkWork, group: LayerGroup) -> float:
    one = chunk.stream_bytes * w.distributed_segments if group.again else _kept(w, group.works)
    return group.count * one


def recompute_bytes(w: Workload, chunk: ChunkWork) -> float:
    """By how much the backward pass exceeds what was kept, because it brings recomputed activations to life again.

    By the time it comes to them, everything that lies behind them has been freed.
    """
    freed = _kept(w, chunk.back)
    excess = 0.0
    for group in reversed(chunk.groups):
        above = _above(w, group.works, 0.0 if group.again else freed)
        if group.again:
            above += _kept(w, group.works) - chunk.stream_bytes - freed
        excess = max(excess, above)
        freed += _kept_by(w, chunk, group)
    return excess


def _above(w: Workload, works: Sequence[Work], freed: float) -> float:
    """The same for operations that keep what they can, `freed` bytes behind the last of them."""
    excess = 0.0
    for work in reversed(works):
        if work.runs_again(w):
            excess = max(excess, work.kept - freed)
        else:
            freed += work.kept
    return excess
