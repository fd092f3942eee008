"""Where every parameter lives in a flat buffer: order, padding and bucket edges, as integers alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

PARAM_ALIGNMENT = 64
"""Elements to which the distributed optimizer rounds each parameter's start."""

SMALLEST_DEFAULT_BUCKET = 40_000_000
DEFAULT_BUCKET_PER_RANK = 1_000_000


@dataclass(frozen=True)
class Slot:
    """The place of one parameter: elements [start, end) of the buffer, inside bucket number `bucket`."""

    start: int
    end: int
    bucket: int


@dataclass(frozen=True)
class BucketPlan:
    """One bucket: elements [start, end) of the buffer, the unit of communication.

    `numel_unpadded` leaves out the filling at the bucket's end, not the gaps between its parameters. `params` are
    positions in the sequence of sizes the plan was made from, in the order in which they lie in memory.
    """

    start: int
    end: int
    numel_unpadded: int
    params: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Length in elements, the filling at its end included."""
        return self.end - self.start


@dataclass(frozen=True)
class BufferLayout:
    """A whole buffer: one slot per parameter (in the order of the given sizes) and the buckets in memory order."""

    slots: tuple[Slot, ...]
    buckets: tuple[BucketPlan, ...]

    @property
    def numel(self) -> int:
        """Length of the buffer in elements, all padding included."""
        return self.buckets[-1].end if self.buckets else 0

    @property
    def numel_unpadded(self) -> int:
        """Elements that a checkpoint stores: the buckets without the filling at their ends."""
        return sum(bucket.numel_unpadded for bucket in self.buckets)

    def stored_starts(self) -> list[int]:
        """Where each parameter starts in what a checkpoint stores."""
        before = [0, *itertools.accumulate(bucket.numel_unpadded for bucket in self.buckets)]
        return [before[slot.bucket] + slot.start - self.buckets[slot.bucket].start for slot in self.slots]


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def default_bucket_size(data_parallel_size: int) -> int:
    """Elements per bucket when none is asked for: larger with more ranks, so that rings stay bandwidth-bound."""
    return max(SMALLEST_DEFAULT_BUCKET, DEFAULT_BUCKET_PER_RANK * data_parallel_size)


def bucket_end_multiple(data_parallel_size: int) -> int:
    """What a sharded bucket's length is a multiple of: every rank gets the same number of elements, 128 apart."""
    return math.lcm(data_parallel_size, 128)


def plan_buffer(
    sizes: Sequence[int],
    *,
    bucket_size: int | None,
    data_parallel_size: int,
    sharded: bool,
    own_bucket: Collection[int] = (),
) -> BufferLayout:
    """Lay parameters of the given sizes (elements, in named_parameters order) out in a flat buffer.

    Parameters are laid out in reverse, because backward finishes the last ones first and a bucket can be reduced as
    soon as it is complete. A bucket closes once it holds at least `bucket_size` elements (None: never). `sharded` asks
    for the distributed optimizer's rules: parameters start at multiples of 64, buckets end at multiples of
    lcm(data_parallel_size, 128), and the parameters at positions `own_bucket` (tied embeddings, which must be cut the
    same way on the first and on the last stage) get a bucket each. Without it nothing is padded or set apart.
    """
    multiple = bucket_end_multiple(data_parallel_size) if sharded else 1
    alignment = PARAM_ALIGNMENT if sharded else 1
    slots: dict[int, Slot] = {}
    buckets: list[BucketPlan] = []
    members: list[int] = []
    bucket_start = cursor = 0

    def close() -> None:
        nonlocal bucket_start, cursor
        end = round_up(cursor, multiple)
        buckets.append(BucketPlan(bucket_start, end, cursor - bucket_start, tuple(members)))
        members.clear()
        bucket_start = cursor = end

    for position in reversed(range(len(sizes))):
        alone = sharded and position in own_bucket
        cursor = round_up(cursor, alignment)
        if alone and members:
            # v0.9 counts this bucket's filling as content, and checkpoints hold that many elements.
            cursor = round_up(cursor, multiple)
            close()
        slots[position] = Slot(cursor, cursor + sizes[position], len(buckets))
        cursor += sizes[position]
        members.append(position)
        if alone or (bucket_size is not None and cursor - bucket_start >= bucket_size):
            close()
    if members:
        close()
    return BufferLayout(tuple(slots[position] for position in range(len(sizes))), tuple(buckets))
