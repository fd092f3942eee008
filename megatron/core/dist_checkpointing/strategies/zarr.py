"""Reading the zarr format, in which older releases saved: one uncompressed array per tensor, in files of one chunk each.

The format is version 2 of the zarr storage specification, so far as Megatron wrote it; no package but numpy is needed. It is
not written any more: what was read is saved in another format.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron.core.dist_checkpointing import durable
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
)
from megatron.core.dist_checkpointing.safe_load import load_file
from megatron.core.dist_checkpointing.strategies.base import (
    StrategyAction,
    register_default_strategy,
)
from megatron.core.dist_checkpointing.strategies.reading import StoredLoadStrategy
from megatron.core.dist_checkpointing.strategies.resharding import Box

_ARRAY = ".zarray"
#: How numbers are named in the files: numpy's way, but for one type that numpy does not have.
_DTYPES = {
    "<f8": torch.float64,
    "<f4": torch.float32,
    "<f2": torch.float16,
    "bfloat16": torch.bfloat16,
    "<i8": torch.int64,
    "<i4": torch.int32,
    "<i2": torch.int16,
    "|i1": torch.int8,
    "|u1": torch.uint8,
    "|b1": torch.bool,
}


@dataclass(frozen=True)
class _Array:
    """What `.zarray` says of an array."""

    folder: Path
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: torch.dtype
    separator: str
    fill_value: Any

    @classmethod
    def of(cls, folder: Path) -> _Array:
        """CheckpointingException for a file that is damaged, or of a kind that Megatron did not write."""
        path = folder / _ARRAY
        with durable.naming_path(path, "reading"):
            content = path.read_bytes()
        try:
            said = json.loads(content)
            shape, chunks = tuple(map(int, said["shape"])), tuple(map(int, said["chunks"]))
            kind, order = str(said["dtype"]), said.get("order", "C")
            packed = said.get("compressor") is not None or bool(said.get("filters"))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointingException(
                str(path), f"it does not describe an array ({error})", "use an earlier checkpoint"
            ) from error
        if kind not in _DTYPES or order != "C" or packed or said.get("zarr_format") != 2:
            raise CheckpointingException(
                str(path),
                f"only uncompressed arrays of zarr 2 are read, in C order and of {', '.join(_DTYPES)}",
                "convert the checkpoint with the program that wrote it",
            )
        if len(shape) != len(chunks) or any(size < 1 for size in chunks):
            raise CheckpointingException(
                str(path), f"chunks of {chunks} do not make up {shape}", "use an earlier checkpoint"
            )
        return cls(
            folder, shape, chunks, _DTYPES[kind], said.get("dimension_separator", "."), said.get("fill_value")
        )

    def chunks_over(self, box: Box) -> Iterator[tuple[Box, Path]]:
        """The chunks that `box` reaches into, each with its file."""
        spans = [
            range(start // size, (start + extent - 1) // size + 1)
            for start, extent, size in zip(box.offset, box.shape, self.chunks)
        ]
        for place in itertools.product(*spans):
            offset = tuple(index * size for index, size in zip(place, self.chunks))
            name = self.separator.join(map(str, place)) or "0"
            yield Box(offset, self.chunks), self.folder / name

    def read(self, path: Path) -> torch.Tensor | None:
        """A chunk [chunks], whole even where the array ends within it; None for one that was not written."""
        if not path.exists() and self.fill_value is None:
            return None
        if not path.exists():
            return torch.full(self.chunks, self.fill_value, dtype=self.dtype)
        with durable.naming_path(path, "reading"):
            data = np.fromfile(path, dtype=np.uint8)
        expected = math.prod(self.chunks) * self.dtype.itemsize
        if data.nbytes != expected:
            raise CheckpointingException(
                str(path), f"it has {data.nbytes} bytes, not {expected}", "use an earlier checkpoint"
            )
        return torch.from_numpy(data).view(self.dtype).view(self.chunks)


class StoredArrays:
    """Random access to the arrays and objects of a zarr directory."""

    def __init__(self, directory: Path, allow_unsafe_pickle: bool = False) -> None:
        self.directory = Path(directory)
        self._allow_unsafe_pickle = allow_unsafe_pickle
        self._arrays: dict[str, _Array] = {}

    def __contains__(self, key: str) -> bool:
        return self.is_tensor(key) or self._object(key) is not None

    def array(self, key: str) -> _Array:
        """The array of a tensor."""
        if key not in self._arrays:
            self._arrays[key] = _Array.of(self.directory / key)
        return self._arrays[key]

    def shape(self, key: str) -> tuple[int, ...]:
        """Global shape of a tensor."""
        return self.array(key).shape

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self.array(key).dtype

    def keys(self) -> list[str]:
        """Every stored key; objects under their unique keys."""
        return self.tensors() + [each.unique_key for each in self.objects()]

    def is_tensor(self, key: str) -> bool:
        """Whether the key is a tensor, not an object."""
        return (self.directory / key / _ARRAY).exists()

    def tensors(self) -> list[str]:
        """Keys of all tensors."""
        return sorted(path.parent.name for path in self.directory.glob(f"*/{_ARRAY}"))

    def objects(self) -> list[ShardedObject]:
        """All objects, without data."""
        return [
            ShardedObject.empty_from_unique_key(f"{path.parent.name}/{_full_name(path)}")
            for path in sorted(self.directory.glob("*/shard_*.pt"))
        ]

    def _object(self, unique_key: str) -> Path | None:
        """The file of an object, under its name or under that which older writers gave it (see `_full_name`)."""
        path = self.directory / unique_key
        named = path.with_name(f"{path.name}.pt")
        return next((found for found in (named, path.with_suffix(".pt")) if found.is_file()), None)

    def read_object(self, key: str) -> Any:
        """The object, if it is plain data."""
        path = self._object(key)
        assert path is not None, "it was looked for before"
        return load_file(path, allow_unsafe_pickle=self._allow_unsafe_pickle, mmap=False)

    def read_box(self, key: str, box: Box, target: torch.Tensor) -> int:
        """Copy what is stored of `box` into `target` (of the box's shape); returns the number of elements found."""
        array, found = self.array(key), 0
        inside = Box((0,) * len(array.shape), array.shape).overlap(box)
        if inside is None:
            return 0
        for chunk, path in array.chunks_over(inside):
            common, data = chunk.overlap(inside), array.read(path)
            if common is not None and data is not None:
                target[common.slices_in(box)].copy_(data[common.slices_in(chunk)])
                found += common.numel()
        return found

    def read_flat(self, key: str, cell: Box, wanted: slice, target: torch.Tensor) -> bool:
        """Nothing is stored flattened: optimizers' pieces were written to their places in the whole tensor."""
        return False


def _full_name(path: Path) -> str:
    """shard_<offset>_<shape> of an object's file.

    Older writers took the shape's last number for a suffix and lost it; it is one more than the largest offset.
    """
    offset, _, shape = path.stem.removeprefix("shard_").partition("_")
    if shape.count(".") == offset.count("."):
        return path.stem
    beside = [other.stem.removeprefix("shard_").partition("_")[0] for other in path.parent.glob("shard_*.pt")]
    return f"{path.stem}.{1 + max(int(other.split('.')[-1]) for other in beside)}"


class ZarrLoadShardedStrategy(StoredLoadStrategy):
    """Reads zarr in any layout."""

    backend = "zarr"

    def open(self, checkpoint_dir: Path) -> StoredArrays:
        """Random access to the files."""
        return StoredArrays(checkpoint_dir, self.allow_unsafe_pickle)

    def load_tensors_metadata(self, checkpoint_dir: Path) -> ShardedStateDict:
        """key -> a ShardedTensor without data that covers the whole stored tensor."""
        stored = StoredArrays(checkpoint_dir)
        return {
            key: ShardedTensor.from_rank_offsets(
                key, torch.empty(stored.shape(key), dtype=stored.dtype(key), device="meta")
            ).without_data()
            for key in stored.tensors()
        }

    def load_sharded_metadata(self, checkpoint_dir: Path) -> ShardedStateDict:
        """As load_tensors_metadata, and the objects by their unique keys."""
        objects = {each.unique_key: each for each in StoredArrays(checkpoint_dir).objects()}
        return self.load_tensors_metadata(checkpoint_dir) | objects


def register_default_zarr_strategies() -> None:
    """Register zarr, version 1, for reading."""
    register_default_strategy(StrategyAction.LOAD_SHARDED, "zarr", 1, ZarrLoadShardedStrategy())


register_default_zarr_strategies()
