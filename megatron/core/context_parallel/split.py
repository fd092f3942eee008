"""Which tokens of a sequence a context-parallel rank holds: integers and slices only.

A sequence of s tokens is cut into 2 cp chunks and rank r holds chunks r and 2 cp - 1 - r. Under a causal mask the
early chunk is cheap and the late one dear, so every rank has the same work.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from megatron.core.utils import divide


@dataclass(frozen=True)
class Run:
    """`length` consecutive tokens: at `local` in the rank's shard, at `start` in the whole sequence."""

    local: int
    start: int
    length: int

    @property
    def stop(self) -> int:
        """One past the last token, in the whole sequence."""
        return self.start + self.length


def runs(sequence_length: int, size: int, rank: int, first: int = 0, local: int = 0) -> list[Run]:
    """The two chunks of `rank`; one run if it holds everything. AssertionError unless 2 x size divides s."""
    if size == 1:
        return [Run(local, first, sequence_length)]
    chunk = divide(sequence_length, 2 * size)
    late = 2 * size - 1 - rank
    return [Run(local, first + rank * chunk, chunk), Run(local + chunk, first + late * chunk, chunk)]


def document_runs(edges: list[int], size: int, rank: int) -> list[Run]:
    """The chunks of `rank` where every document of a packed row is cut by itself.

    edges: [documents + 1] offsets. Each document's length must be a multiple of 2 x size.
    """
    held: list[Run] = []
    for first, last in pairwise(edges):
        if last > first:
            local = held[-1].local + held[-1].length if held else 0
            held += runs(last - first, size, rank, first, local)
    return held


def indices(sequence_length: int, size: int, rank: int) -> Tensor:
    """int64 [s / size]: the place in the whole sequence of each token that `rank` holds."""
    return torch.cat([torch.arange(run.start, run.stop) for run in runs(sequence_length, size, rank)])


def take(whole: Tensor, dim: int, size: int, rank: int) -> Tensor:
    """The shard [.., s / size, ..] of `rank` out of a tensor [.., s, ..]."""
    held = runs(whole.shape[dim], size, rank)
    if size == 1:
        return whole
    return torch.cat([whole.narrow(dim, run.start, run.length) for run in held], dim=dim)


def join(shards: Tensor, dim: int) -> Tensor:
    """Put shards stacked in rank order [size, .., s / size, ..] back in sequence order [.., s, ..] (`dim` of s)."""
    early, late = shards.chunk(2, dim=dim + 1) if shards.shape[0] > 1 else (shards, shards[:0])
    return torch.cat((*early.unbind(0), *late.flip(0).unbind(0)), dim=dim)


def divide_up(whole: Tensor, dim: int, size: int) -> Tensor:
    """The opposite of `join`: [.., s, ..] -> [size, .., s / size, ..]."""
    return torch.stack([take(whole, dim, size, rank) for rank in range(size)])
