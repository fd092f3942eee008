"""What a piece of a distributed checkpoint is: its key, its place in the whole, which copy of it counts.

Nothing here knows how pieces are stored. A state dict whose leaves are these records is a *sharded state
dict*; its nesting is for the program that builds it, only the keys of the records matter in a checkpoint.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import torch

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.errors import InvariantError

StateDict = dict[str, Any]
CommonStateDict = dict[str, Any]
ShardedStateDict = dict[str, Any]
ReplicaId = int | tuple[int, ...]


class ShardedBase(ABC):
    """A leaf of a sharded state dict that is stored as (part of) something global."""

    key: str
    data: object
    replica_id: ReplicaId

    @abstractmethod
    def validate_metadata_integrity(self) -> None:
        """Raise CheckpointingException if the fields contradict each other."""

    @abstractmethod
    def without_data(self) -> ShardedBase:
        """The same description with `data` None: small enough to send between ranks."""


@dataclass
class ShardedTensor(ShardedBase):
    """One rank's piece of a global tensor that is cut into a regular grid of equal pieces.

    `local_shape` is the shape of the grid cell; `global_shape` has `prepend_axis_num` more leading axes, in
    which a cell has extent one (the layer axis of stacked layers). `global_offset` is where the cell starts
    and `axis_fragmentations` how many cells each axis of `global_shape` has. With `flattened_range`, `data`
    is 1-D and holds only that slice of the row-major flattened cell (optimizer shards).
    `replica_id` tells apart ranks that hold the same cell; the one with 0 (or all zeros) is written.
    `allow_shape_mismatch` lets the global shape differ from the stored one: padded vocabularies.
    """

    key: str
    data: torch.Tensor | None = field(repr=False)
    dtype: torch.dtype
    local_shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    axis_fragmentations: tuple[int, ...] | None
    replica_id: ReplicaId = 0
    prepend_axis_num: int = 0
    allow_shape_mismatch: bool = False
    flattened_range: slice | None = None

    def __post_init__(self) -> None:
        self.validate_metadata_integrity()

    def validate_metadata_integrity(self) -> None:
        """Raise CheckpointingException if shapes, offsets, data and flattened range contradict each other."""
        if (
            not len(self.global_shape)
            == len(self.global_offset)
            == len(self.local_shape) + self.prepend_axis_num
        ):
            self._refuse(f"{self.prepend_axis_num} prepended axes do not bridge local and global dimensions")
        if self.flattened_range is None:
            expected: tuple[int, ...] = tuple(self.local_shape)
        else:
            if not isinstance(self.flattened_range, slice) or self.flattened_range.step is not None:
                self._refuse("flattened_range must be a slice without a step")
            expected = (self.flattened_range.stop - self.flattened_range.start,)
        if self.data is not None:
            if self.data.dtype != self.dtype:
                self._refuse(f"data has dtype {self.data.dtype}")
            if tuple(self.data.shape) != expected:
                self._refuse(f"data has shape {tuple(self.data.shape)}, expected {expected}")
        if self.axis_fragmentations is not None:
            for offset, size in zip(self.global_offset[self.prepend_axis_num :], self.local_shape):
                if size and offset % size:
                    self._refuse(f"offset {offset} is not a multiple of the local size {size}")

    def _refuse(self, why: str) -> None:
        raise CheckpointingException(f"sharded tensor {self}", why)

    def has_regular_grid(self) -> bool:
        """Whether the grid of pieces is known."""
        return self.axis_fragmentations is not None

    def global_slice(self) -> tuple[int | slice, ...]:
        """Index of this cell in the global tensor: integers for prepended axes, slices for the others."""
        prepended = self.global_offset[: self.prepend_axis_num]
        own = self.global_offset[self.prepend_axis_num :]
        return (*prepended, *(slice(start, start + size) for start, size in zip(own, self.local_shape)))

    def local_coordinates(self) -> tuple[np.ndarray, ...]:
        """For a flattened piece: index arrays, one per axis, of its elements inside the cell."""
        if self.flattened_range is None:
            raise CheckpointingException(
                f"sharded tensor {self}", "coordinates exist only for flattened pieces"
            )
        return np.unravel_index(
            np.arange(math.prod(self.local_shape))[self.flattened_range], self.local_shape
        )

    def global_coordinates(self) -> tuple[np.ndarray, ...]:
        """For a flattened piece: index arrays, one per axis, of its elements in the global tensor."""
        local = self.local_coordinates()
        prepended = tuple(np.zeros(len(local[0]), dtype=int) for _ in range(self.prepend_axis_num))
        return tuple(c + off for c, off in zip((*prepended, *local), self.global_offset))

    def local_chunk_offset_in_global(self) -> tuple[int, ...]:
        """Position of this cell in the grid, counted in cells along every global axis."""
        prepended = self.global_offset[: self.prepend_axis_num]
        own = self.global_offset[self.prepend_axis_num :]
        return (*prepended, *(off // size if size else 0 for off, size in zip(own, self.local_shape)))

    def max_allowed_chunks(self) -> tuple[int, ...]:
        """How many cells the grid has along every global axis."""
        if self.axis_fragmentations is not None and not self.allow_shape_mismatch:
            return tuple(self.axis_fragmentations)
        sizes = (1,) * self.prepend_axis_num + tuple(self.local_shape)
        return tuple(-(-whole // size) if size else 1 for whole, size in zip(self.global_shape, sizes))

    def without_data(self) -> ShardedTensor:
        """The same description without the tensor."""
        return replace(self, data=None)

    @classmethod
    def from_rank_offsets(
        cls,
        key: str,
        data: torch.Tensor,
        *rank_offsets: tuple[int, int, int],
        replica_id: ReplicaId = 0,
        prepend_axis_num: int = 0,
        flattened_range: None = None,
        **init_kwargs: Any,
    ) -> ShardedTensor:
        """Describe `data` as the cell at `(axis, position, number of cells)` for each cut axis.

        Axes count in the global tensor, prepended ones first; axes not named are whole. InvariantError for a
        position outside its axis, CheckpointingException for contradictory shapes and axes named twice.
        """
        if flattened_range is not None:
            raise ValueError(
                "a flattened range needs the unflattened shape: use ShardedTensor.from_rank_offsets_flat"
            )
        offsets = [0] * (data.ndim + prepend_axis_num)
        global_shape = [1] * prepend_axis_num + list(data.shape)
        fragmentations = [1] * len(global_shape)
        named: set[int] = set()
        for axis, position, pieces in rank_offsets:
            if axis in named:
                raise CheckpointingException(f"sharded tensor {key}", f"axis {axis} is named twice")
            if not 0 <= axis < len(global_shape):
                raise InvariantError(
                    f"sharded tensor {key}", f"axis {axis} is not one of its {len(global_shape)} axes"
                )
            if not 0 <= position < pieces:
                raise InvariantError(
                    f"sharded tensor {key}",
                    f"position {position} on axis {axis} is not below its {pieces} pieces",
                )
            named.add(axis)
            size = 1 if axis < prepend_axis_num else data.shape[axis - prepend_axis_num]
            global_shape[axis], offsets[axis], fragmentations[axis] = pieces * size, position * size, pieces
        return cls(
            key,
            data,
            data.dtype,
            tuple(data.shape),
            tuple(global_shape),
            tuple(offsets),
            tuple(fragmentations),
            replica_id,
            prepend_axis_num,
            **init_kwargs,
        )

    @classmethod
    def from_rank_offsets_flat(
        cls,
        key: str,
        data: torch.Tensor,
        non_flat_local_shape: tuple[int, ...],
        *args: tuple[int, int, int],
        flattened_range: slice | None = None,
        **kwargs: Any,
    ) -> ShardedTensor:
        """As `from_rank_offsets` for 1-D `data` that is the slice `flattened_range` of a flattened cell.

        CheckpointingException if `data` has more axes or there is no range.
        """
        if data.ndim != 1:
            raise CheckpointingException(
                f"sharded tensor {key}", f"a flattened piece is 1-D, not {data.ndim}-D", "pass data.flatten()"
            )
        if flattened_range is None:
            raise CheckpointingException(
                f"sharded tensor {key}", "flattened_range is missing", "pass the slice that data is"
            )
        cell = torch.empty(non_flat_local_shape, dtype=data.dtype, device="meta")
        piece = cls.from_rank_offsets(key, cell, *args, **kwargs)
        return replace(piece, data=data, flattened_range=flattened_range)

    def init_data(
        self, device: torch.device | str, init_fn: Callable[..., torch.Tensor] = torch.empty
    ) -> None:
        """Allocate `data` (uninitialised by default) if there is none."""
        if self.data is None:
            self.data = init_fn(self.local_shape, dtype=self.dtype, device=device)
            if self.flattened_range is not None:
                self.data = self.data.flatten()[self.flattened_range]

    def narrow(self, dim: int, start: int, length: int) -> list[ShardedTensor]:
        """The part `start:start+length` of the cell along `dim`, as a piece of an equally cut smaller tensor.

        The global size and offset along `dim` shrink by length / local size. A flattened piece can be
        narrowed along axis 0 only, and the list is empty if none of it falls into the part.
        """
        axis, size = dim + self.prepend_axis_num, self.local_shape[dim]

        def scaled(values: tuple[int, ...]) -> tuple[int, ...]:
            value, remainder = divmod(values[axis] * length, size)
            if remainder:
                raise CheckpointingException(
                    f"sharded tensor {self}", f"cannot be narrowed to {length} on axis {dim}"
                )
            return (*values[:axis], value, *values[axis + 1 :])

        changes: dict[str, Any] = {
            "local_shape": (*self.local_shape[:dim], length, *self.local_shape[dim + 1 :]),
            "global_shape": scaled(self.global_shape),
            "global_offset": scaled(self.global_offset),
        }
        if self.flattened_range is None:
            data = None if self.data is None else self.data.narrow(dim, start, length)
            return [replace(self, data=data, **changes)]
        if dim != 0:
            raise CheckpointingException(
                f"sharded tensor {self}", "a flattened piece narrows along axis 0 only"
            )
        row = math.prod(self.local_shape[1:])
        held = self.flattened_range
        first, last = max(held.start, start * row), min(held.stop, (start + length) * row)
        if first >= last:
            return []
        data = None if self.data is None else self.data[first - held.start : last - held.start]
        return [
            replace(
                self, data=data, flattened_range=slice(first - start * row, last - start * row), **changes
            )
        ]


def is_main_replica(replica_id: ReplicaId) -> bool:
    """Whether this copy is the one to write: 0, or a tuple of zeros."""
    return replica_id == 0 if isinstance(replica_id, int) else all(part == 0 for part in replica_id)


class LocalNonpersistentObject:
    """A value that is not stored: on load it is what the running program put here."""

    def __init__(self, obj: Any) -> None:
        self.obj = obj

    def unwrap(self) -> Any:
        """The wrapped value."""
        return self.obj


@dataclass
class ShardedObject(ShardedBase):
    """One cell of a grid of arbitrary picklable objects; cells are read back only as they were written."""

    key: str
    data: object
    global_shape: tuple[int, ...]
    global_offset: tuple[int, ...]
    replica_id: ReplicaId = 0

    def __post_init__(self) -> None:
        self.validate_metadata_integrity()

    def validate_metadata_integrity(self) -> None:
        """Raise CheckpointingException if the offset does not have as many axes as the grid."""
        if len(self.global_shape) != len(self.global_offset):
            raise CheckpointingException(
                f"sharded object {self.key}", "offset and shape have different lengths"
            )

    def without_data(self) -> ShardedObject:
        """The same description without the object."""
        return replace(self, data=None)

    @property
    def unique_key(self) -> str:
        """Name of the cell in a checkpoint: `key/shard_<offset>_<shape>`, numbers joined by dots."""
        offset, shape = (".".join(map(str, numbers)) for numbers in (self.global_offset, self.global_shape))
        return f"{self.key}/shard_{offset}_{shape}"

    @classmethod
    def empty_from_unique_key(cls, unique_key: str, replica_id: ReplicaId = 0) -> ShardedObject:
        """The description that `unique_key` names. CheckpointingException if it names none."""
        key, found, cell = unique_key.rpartition("/shard_")
        offset, _, shape = cell.partition("_")
        try:
            numbers = tuple(int(n) for n in offset.split(".")), tuple(int(n) for n in shape.split("."))
        except ValueError:
            found = ""
        if not found:
            raise CheckpointingException(
                unique_key, "is not a sharded object's key (key/shard_<offset>_<shape>)"
            )
        return cls(key, None, numbers[1], numbers[0], replica_id)

    def __str__(self) -> str:
        return f"{type(self).__name__}(key='{self.key}')"


FactoryBuildFn = Callable[[str, torch.Tensor, ReplicaId, "slice | None"], ShardedStateDict]
FactoryMergeFn = Callable[[StateDict], torch.Tensor]


@dataclass
class ShardedTensorFactory(ShardedBase):
    """One parameter that is stored as several tensors: `build_fn` cuts it, `merge_fn` joins what was loaded.

    The optimizer reuses the same factory for its moments by swapping `key` and `data`.
    """

    key: str
    data: torch.Tensor
    build_fn: FactoryBuildFn
    merge_fn: FactoryMergeFn
    replica_id: ReplicaId = 0
    flattened_range: slice | None = None

    def build(self) -> Any:
        """The tree of sharded tensors that stands for `data`."""
        return self.build_fn(self.key, self.data, self.replica_id, self.flattened_range)

    def merge(self, loaded: Any) -> Any:
        """What stood in `data`, from the tree of tensors that were loaded into what `build` gave."""
        return self.merge_fn(loaded)

    def validate_metadata_integrity(self) -> None:
        """Nothing to contradict: the pieces are checked when they are built."""

    def without_data(self) -> ShardedTensorFactory:
        """The same description without the tensor."""
        return replace(self, data=None)  # type: ignore[arg-type]


def apply_factories(sharded_state_dict: ShardedStateDict) -> None:
    """Replace every factory in the tree by the pieces it builds, in place."""
    dict_list_map_inplace(
        lambda x: x.build() if isinstance(x, ShardedTensorFactory) else x, sharded_state_dict
    )


def apply_factory_merges(x1: Any, x2: Any, key: tuple[str, ...] = ()) -> Any:
    """Join in `x1` (loaded, in place) what the factories at the same places of `x2` had cut; returns `x1`.

    ValueError if `x2` has a place that `x1` lacks.
    """
    if isinstance(x2, ShardedTensorFactory):
        return x2.merge(x1)
    if isinstance(x1, (dict, list)) and isinstance(x2, (dict, list)):
        places = chain(x2.items()) if isinstance(x2, dict) else enumerate(x2)
        for name, factory in places:
            if not (name in x1 if isinstance(x1, dict) else name < len(x1)):
                raise ValueError(f"nothing was loaded for the factory at {(*key, name)}")
            x1[name] = apply_factory_merges(x1[name], factory, (*key, str(name)))
        return x1
    raise ValueError(f"{type(x1).__name__} and {type(x2).__name__} at {key} cannot be merged")
