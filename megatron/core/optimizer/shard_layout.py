"""Which slice of which parameter a data-parallel rank owns: integers alone."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.distributed.buckets import BufferLayout


@dataclass(frozen=True)
class Range:
    """Elements [start, end) of something flat."""

    start: int
    end: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.end - self.start

    @property
    def as_slice(self) -> slice:
        """The same elements as an index."""
        return slice(self.start, self.end)

    def normalize(self, start: int = 0) -> Range:
        """The range of the same length that begins at `start`."""
        return Range(start, start + self.size)

    def shifted(self, offset: int) -> Range:
        """The range moved by `offset` elements."""
        return Range(self.start + offset, self.end + offset)

    def within(self, other: Range) -> Range | None:
        """The part shared with `other`, or None where they do not meet."""
        start, end = max(self.start, other.start), min(self.end, other.end)
        return Range(start, end) if start < end else None

    def __len__(self) -> int:
        return self.size

    def __str__(self) -> str:
        return f"{self.start},{self.end} [{self.size}]"


@dataclass(frozen=True)
class Piece:
    """The part of one parameter that a rank owns, seen from four sides (all in elements).

    `param` is the position of the parameter in the layout's slots; `in_buffer`, `in_bucket`, `in_shard` and `in_param`
    are the same elements counted from the start of the buffer, of the bucket, of the rank's part of the bucket, and
    of the flattened parameter.
    """

    param: int
    in_buffer: Range
    in_bucket: Range
    in_shard: Range
    in_param: Range


@dataclass(frozen=True)
class BucketShard:
    """What one rank owns of one bucket: `in_buffer` is its part, `pieces` the parameters that reach into it."""

    in_buffer: Range
    pieces: tuple[Piece, ...]


def plan_shards(layout: BufferLayout, rank: int, data_parallel_size: int) -> tuple[BucketShard, ...]:
    """Cut every bucket in `data_parallel_size` equal parts and say what lies in part number `rank`.

    Parameters are split wherever an edge falls, so that all ranks own equally much. Raises ValueError if a bucket does
    not divide evenly, which a layout planned with `sharded=True` for this size never does.
    """
    shards = []
    for bucket in layout.buckets:
        if bucket.numel % data_parallel_size:
            raise ValueError(
                f"a bucket of {bucket.numel} elements does not divide over {data_parallel_size} ranks; "
                "plan the buffer with sharded=True for this data-parallel size"
            )
        shard_numel = bucket.numel // data_parallel_size
        shard = Range(bucket.start + rank * shard_numel, bucket.start + (rank + 1) * shard_numel)
        pieces = []
        for position in bucket.params:
            slot = layout.slots[position]
            owned = Range(slot.start, slot.end).within(shard)
            if owned is not None:
                pieces.append(
                    Piece(
                        param=position,
                        in_buffer=owned,
                        in_bucket=owned.shifted(-bucket.start),
                        in_shard=owned.shifted(-shard.start),
                        in_param=owned.shifted(-slot.start),
                    )
                )
        shards.append(BucketShard(shard, tuple(pieces)))
    return tuple(shards)


def owned_slices(layout: BufferLayout, rank: int, data_parallel_size: int) -> list[slice]:
    """What part number `rank` holds of each flattened parameter, in the order of the slots; empty slices of others' own."""
    owned = [slice(0)] * len(layout.slots)
    for shard in plan_shards(layout, rank, data_parallel_size):
        for piece in shard.pieces:
            owned[piece.param] = piece.in_param.as_slice
    return owned
