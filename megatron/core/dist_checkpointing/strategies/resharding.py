"""Where a flattened optimizer shard lies in a file, and which stored elements a request overlaps.

A flattened piece of an N-D tensor cannot be described by a box of that tensor. It is stored in a *reformulated*
tensor of shape `axis_fragmentations + (elements per cell,)`: one row per grid cell, and in it a 1-D range. All of
this is integer arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor


@dataclass(frozen=True)
class Box:
    """An axis-aligned part of a tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def overlap(self, other: Box) -> Box | None:
        """What both have in common, in global coordinates; None if nothing."""
        start = tuple(max(a, b) for a, b in zip(self.offset, other.offset))
        stop = tuple(
            min(a + m, b + n) for a, m, b, n in zip(self.offset, self.shape, other.offset, other.shape)
        )
        if any(last <= first for first, last in zip(start, stop)):
            return None
        return Box(start, tuple(last - first for first, last in zip(start, stop)))

    def slices_in(self, outer: Box) -> tuple[slice, ...]:
        """Index of this box in a tensor that holds `outer`."""
        return tuple(
            slice(start - origin, start - origin + size)
            for start, size, origin in zip(self.offset, self.shape, outer.offset)
        )

    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def is_nd_flattened_tensor(sh_ten: ShardedTensor) -> bool:
    """Whether the piece is stored in a reformulated tensor: flattened, of more than one global axis."""
    return sh_ten.flattened_range is not None and len(sh_ten.global_shape) > 1


def nd_flattened_tensor_reformulated_global_shape(sh_ten: ShardedTensor) -> tuple[int, ...]:
    """Shape of the reformulated tensor: the grid, then the elements of one cell."""
    if sh_ten.axis_fragmentations is None:
        raise CheckpointingException(f"sharded tensor {sh_ten.key}", "a flattened piece needs a regular grid")
    return (*sh_ten.axis_fragmentations, math.prod(sh_ten.local_shape))


def stored_box(sh_ten: ShardedTensor) -> tuple[tuple[int, ...], Box]:
    """(shape of the stored tensor, the box of it that this piece fills)."""
    if sh_ten.flattened_range is None:
        return tuple(sh_ten.global_shape), cell_box(sh_ten)
    start, stop = sh_ten.flattened_range.start, sh_ten.flattened_range.stop
    if not is_nd_flattened_tensor(sh_ten):
        return tuple(sh_ten.global_shape), Box((sh_ten.global_offset[0] + start,), (stop - start,))
    shape = nd_flattened_tensor_reformulated_global_shape(sh_ten)
    grid = sh_ten.local_chunk_offset_in_global()
    return shape, Box((*grid, start), (*(1,) * len(grid), stop - start))


def cell_box(sh_ten: ShardedTensor) -> Box:
    """The whole cell of a piece, prepended axes included."""
    return Box(tuple(sh_ten.global_offset), (*(1,) * sh_ten.prepend_axis_num, *sh_ten.local_shape))


def reformulated_cell(
    original_shape: Sequence[int], reformulated_shape: Sequence[int], chunk_offset: Sequence[int]
) -> Box:
    """The cell of the original tensor that a chunk of its reformulation belongs to."""
    grid = reformulated_shape[:-1]
    shape = tuple(whole // pieces for whole, pieces in zip(original_shape, grid))
    return Box(tuple(position * size for position, size in zip(chunk_offset, shape)), shape)
