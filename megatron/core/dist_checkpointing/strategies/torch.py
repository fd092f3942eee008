"""The torch_dist format: PyTorch's distributed checkpoint files, under Megatron's key names.

Writing: every rank writes its main replicas and rank 0 the index `.metadata`. Reading: every rank looks up which
stored chunks overlap what it asks for, in whatever layout they were written. Plain
`torch.distributed.checkpoint` reads the same files; keys listed in `mcore_data` with a shape hold flattened pieces.
"""

from __future__ import annotations

import io
import math
import pickle
import uuid
from collections import defaultdict
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron.core.dist_checkpointing import durable
from megatron.core.dist_checkpointing.agreement import gather, rank, together
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.durable import Checksum
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    is_main_replica,
)
from megatron.core.dist_checkpointing.safe_load import UnsafeFileError, load_stream
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.base import (
    AsyncSaveShardedStrategy,
    StrategyAction,
    register_default_strategy,
)
from megatron.core.dist_checkpointing.strategies.filesystem_async import (
    CopyMemory,
    Item,
    Written,
    own_data,
    write_items,
)
from megatron.core.dist_checkpointing.strategies.mapped import MappedFile
from megatron.core.dist_checkpointing.strategies.reading import StoredLoadStrategy
from megatron.core.dist_checkpointing.strategies.resharding import (
    Box,
    is_nd_flattened_tensor,
    reformulated_cell,
    stored_box,
)

METADATA_FNAME = ".metadata"
_COPY_MEMORY = CopyMemory()
_REFORMULATED = "nd_reformulated_orig_global_shape"


@dataclass(frozen=True)
class Described:
    """What rank 0 must know of an item to index it."""

    key: str
    offset: tuple[int, ...] | None
    shape: tuple[int, ...] = ()
    global_shape: tuple[int, ...] = ()
    original_shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None


@dataclass
class _RankResult:
    """What a rank wrote; filled by the writer thread, read when all ranks are done."""

    described: list[Described]
    written: list[Written] = field(default_factory=list)
    checksums: dict[str, Checksum] = field(default_factory=dict)


class TorchDistSaveShardedStrategy(AsyncSaveShardedStrategy):
    """Writes torch_dist: per rank at most `thread_count` data files, the index by rank 0.

    `cached_metadata` is accepted for callers of older versions: what it cached is cheap here.
    """

    def __init__(
        self,
        backend: str = "torch_dist",
        version: int = 1,
        keep_only_main_replica: bool = True,
        thread_count: int = 2,
        cached_metadata: bool = False,
    ) -> None:
        super().__init__(backend, version)
        self.keep_only_main_replica = keep_only_main_replica
        self.thread_count = thread_count

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Objects lie in the same files."""
        return True

    def async_save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> AsyncRequest:
        """Copy the data to the CPU and return the writing and indexing; every rank must call."""
        return self._request(sharded_state_dict, Path(checkpoint_dir), copy=True)

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> None:
        """Write now, without copying what is on the CPU already."""
        self._request(sharded_state_dict, Path(checkpoint_dir), copy=False).execute_sync()

    def _request(self, sharded_state_dict: ShardedStateDict, directory: Path, copy: bool) -> AsyncRequest:
        items: list[Item] = []
        described: list[Described] = []
        for record in nested_values(sharded_state_dict):
            if self.keep_only_main_replica and not is_main_replica(record.replica_id):
                continue
            for item, description in _items_of(record, copy):
                items.append(item)
                described.append(description)
        result = _RankResult(described)

        def write() -> None:
            prefix = f"__{rank()}_"
            result.written, result.checksums = write_items(directory, prefix, items, self.thread_count)
            if copy:
                _COPY_MEMORY.keep_only(item.data for item in items if item.offset is not None)
            items.clear()

        return AsyncRequest(write, (), [lambda: _write_joint_index(directory, result)])


def _items_of(record: ShardedBase, copy: bool) -> list[tuple[Item, Described]]:
    if isinstance(record, ShardedObject):
        key = record.unique_key
        # An object may hold live tensors, which training changes while the background writes.
        data = deepcopy(record.data) if copy else record.data
        return [(Item(key, None, [data]), Described(key, None))]
    assert isinstance(record, ShardedTensor), "factories were applied before"
    if record.data is None:
        raise CheckpointingException(f"sharded tensor {record.key}", "there is no data to save")
    global_shape, box = stored_box(record)
    if box.numel() == 0 and 0 not in global_shape:
        return []
    data = (_COPY_MEMORY.copy(record.data) if copy else own_data(record.data)).reshape(box.shape)
    original = tuple(record.global_shape) if is_nd_flattened_tensor(record) else None
    description = Described(record.key, box.offset, box.shape, global_shape, original, record.dtype)
    return [(Item(record.key, box.offset, data), description)]


def _write_joint_index(directory: Path, result: _RankResult) -> None:
    """Collect what all ranks wrote and index it; every rank must call."""
    everyone = gather((result.described, result.written, result.checksums))
    with together():
        if rank() == 0:
            write_index(
                directory,
                [described for part in everyone for described in part[0]],
                [written for part in everyone for written in part[1]],
                {name: checksum for part in everyone for name, checksum in part[2].items()},
            )


def write_index(
    directory: Path, described: list[Described], written: list[Written], checksums: dict[str, Checksum]
) -> None:
    """Write `.metadata` for items that are in data files, and the checksums of all files."""
    with durable.naming_path(directory / METADATA_FNAME, "writing"):
        writer = durable.ChecksumWriter(directory / METADATA_FNAME)
        try:
            writer.write(pickle.dumps(_index(described, written)))
        finally:
            writer.close()
    durable.write_manifest(directory, {**checksums, METADATA_FNAME: writer.checksum()})


def _index(described: list[Described], written: list[Written]) -> Metadata:
    entries: dict[str, Any] = {}
    mcore_data: dict[str, dict[str, Any]] = {}
    positions: dict[tuple[str, tuple[int, ...] | None], int | None] = {}
    for one in described:
        if one.offset is None:
            entries[one.key] = BytesStorageMetadata()
            positions[one.key, None] = None
            continue
        if one.key not in entries:
            properties = TensorProperties(dtype=one.dtype)  # type: ignore[arg-type]
            entries[one.key] = TensorStorageMetadata(properties, torch.Size(one.global_shape), [])
            mcore_data[one.key] = {} if one.original_shape is None else {_REFORMULATED: one.original_shape}
        chunks = entries[one.key].chunks
        positions[one.key, one.offset] = len(chunks)
        chunks.append(ChunkStorageMetadata(torch.Size(one.offset), torch.Size(one.shape)))
    storage = {
        MetadataIndex(w.key, w.offset, positions[w.key, w.offset]): _StorageInfo(w.file, w.start, w.length)
        for w in written
    }
    metadata = Metadata(
        entries,
        planner_data={key: (key,) for key in entries},
        storage_data=storage,
        # Not random: the same run writes the same bytes.
        storage_meta=StorageMeta(save_id=str(uuid.uuid5(uuid.NAMESPACE_OID, repr(written)))),
    )
    metadata.mcore_data = mcore_data  # type: ignore[attr-defined]
    return metadata


_METADATA_GLOBALS: dict[tuple[str, str], Any] = {
    **{
        ("torch.distributed.checkpoint.metadata", kind.__name__): kind
        for kind in (
            BytesStorageMetadata,
            ChunkStorageMetadata,
            Metadata,
            MetadataIndex,
            StorageMeta,
            TensorProperties,
            TensorStorageMetadata,
        )
    },
    (
        "torch.distributed.checkpoint.metadata",
        "_MEM_FORMAT_ENCODING",
    ): _MEM_FORMAT_ENCODING,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib", "PurePosixPath"): PurePosixPath,
}


class _MetadataUnpickler(pickle.Unpickler):
    """Rebuilds an index and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """The named type if an index may contain it. UnsafeFileError otherwise."""
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        try:
            return _METADATA_GLOBALS[module, name]
        except KeyError:
            why = f"it refers to {module}.{name}, and loading it could run code"
            raise UnsafeFileError(METADATA_FNAME, why, "get the checkpoint from a source you trust") from None


def read_metadata(directory: Path) -> Metadata:
    """The index of a torch_dist directory. CheckpointingException if it is missing, damaged or unsafe."""
    path = Path(directory) / METADATA_FNAME
    with durable.naming_path(path, "reading"):
        content = path.read_bytes()
    try:
        metadata = _MetadataUnpickler(io.BytesIO(content)).load()
    except UnsafeFileError as error:
        raise UnsafeFileError(str(path), error.why, error.fix) from None
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        OverflowError,
    ) as error:
        raise CheckpointingException(
            str(path), f"the index is damaged ({error})", "use an earlier checkpoint"
        ) from error
    if not isinstance(metadata, Metadata):
        raise CheckpointingException(
            str(path), "it is not the index of a checkpoint", "use an earlier checkpoint"
        )
    return metadata


@dataclass(frozen=True)
class _Chunk:
    """A stored chunk: the cell of the original tensor it belongs to and, if flattened, its range of that cell."""

    cell: Box
    flat: slice | None
    index: MetadataIndex


class StoredTensors:
    """Random access to the tensors and objects of a torch_dist directory."""

    def __init__(self, directory: Path, allow_unsafe_pickle: bool = False) -> None:
        self.directory = Path(directory)
        self.metadata = read_metadata(self.directory)
        self._allow_unsafe_pickle = allow_unsafe_pickle
        self._reformulated: dict[str, dict[str, Any]] = getattr(self.metadata, "mcore_data", {})
        self._chunks: dict[str, list[_Chunk]] = {}
        self._files: dict[Path, MappedFile] = {}

    def __contains__(self, key: str) -> bool:
        return key in self.metadata.state_dict_metadata

    def keys(self) -> list[str]:
        """Every stored key; objects under their unique keys."""
        return list(self.metadata.state_dict_metadata)

    def is_tensor(self, key: str) -> bool:
        """Whether the key is a tensor, not an object."""
        return isinstance(self.metadata.state_dict_metadata[key], TensorStorageMetadata)

    def shape(self, key: str) -> tuple[int, ...]:
        """Global shape of the tensor, without reformulation."""
        original = self._reformulated.get(key, {}).get(_REFORMULATED)
        return tuple(self._tensor(key).size if original is None else original)

    def is_flattened(self, key: str) -> bool:
        """Whether the tensor is stored as flat pieces of its cells."""
        return _REFORMULATED in self._reformulated.get(key, {})

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of the tensor."""
        return self._tensor(key).properties.dtype

    def _tensor(self, key: str) -> TensorStorageMetadata:
        entry = self.metadata.state_dict_metadata[key]
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointingException(str(self.directory), f"{key} is an object, not a tensor")
        return entry

    def read_object(self, key: str) -> Any:
        """The object; old and new writers wrap it in a list."""
        value = self._load(MetadataIndex(key))
        return value[0] if isinstance(value, list) and len(value) == 1 else value

    def read_box(self, key: str, box: Box, target: torch.Tensor) -> int:
        """Copy what is stored of `box` into `target` (of the box's shape); returns the number of elements found."""
        by_cell: dict[Box, list[_Chunk]] = defaultdict(list)
        for chunk in self._chunks_of(key):
            if chunk.cell.overlap(box) is not None:
                by_cell[chunk.cell].append(chunk)
        found = 0
        for cell, chunks in by_cell.items():
            common = cell.overlap(box)
            assert common is not None, "cells without overlap were skipped"
            stored = self._cell(key, cell, chunks)
            target[common.slices_in(box)].copy_(stored[common.slices_in(cell)])
            found += common.numel()
        return found

    def read_flat(self, key: str, cell: Box, wanted: slice, target: torch.Tensor) -> bool:
        """Fill 1-D `target` with the slice `wanted` of the flattened `cell` if it is stored flattened, in the same cells.

        Returns False, having done nothing, if the file is cut in another way.
        """
        pieces = [chunk for chunk in self._chunks_of(key) if chunk.cell == cell and chunk.flat is not None]
        if not pieces:
            return False
        found = 0
        for chunk in pieces:
            assert chunk.flat is not None, "only flattened chunks were kept"
            start, stop = max(chunk.flat.start, wanted.start), min(chunk.flat.stop, wanted.stop)
            if start < stop:
                stored = self._load(chunk.index).flatten()
                target[start - wanted.start : stop - wanted.start].copy_(
                    stored[start - chunk.flat.start : stop - chunk.flat.start]
                )
                found += stop - start
        self._demand(key, found, wanted.stop - wanted.start)
        return True

    def _cell(self, key: str, cell: Box, chunks: list[_Chunk]) -> torch.Tensor:
        if chunks[0].flat is None:
            return self._load(chunks[0].index).reshape(cell.shape)
        whole = torch.empty(cell.numel(), dtype=self.dtype(key))
        for chunk in chunks:
            assert chunk.flat is not None, "a tensor is flattened everywhere or nowhere"
            whole[chunk.flat] = self._load(chunk.index).flatten()
        self._demand(key, sum(c.flat.stop - c.flat.start for c in chunks if c.flat is not None), cell.numel())
        return whole.view(cell.shape)

    def _demand(self, key: str, found: int, wanted: int) -> None:
        if found != wanted:
            why = f"only {found} of {wanted} elements of a piece of {key} are stored"
            raise CheckpointingException(str(self.directory), why, "use an earlier checkpoint")

    def _chunks_of(self, key: str) -> list[_Chunk]:
        if key not in self._chunks:
            entry = self._tensor(key)
            original = self._reformulated.get(key, {}).get(_REFORMULATED)
            chunks = []
            for position, chunk in enumerate(entry.chunks):
                offset, shape = tuple(chunk.offsets), tuple(chunk.sizes)
                index = MetadataIndex(key, chunk.offsets, position)
                if original is None:
                    chunks.append(_Chunk(Box(offset, shape), None, index))
                else:
                    cell = reformulated_cell(original, entry.size, offset)
                    chunks.append(_Chunk(cell, slice(offset[-1], offset[-1] + shape[-1]), index))
            self._chunks[key] = chunks
        return self._chunks[key]

    def _load(self, index: MetadataIndex) -> Any:
        info = self.metadata.storage_data.get(index)
        if info is None:
            raise CheckpointingException(str(self.directory), f"the index does not say where {index.fqn} is")
        relative = PurePosixPath(info.relative_path)
        if relative.is_absolute() or ".." in relative.parts:
            raise UnsafeFileError(str(self.directory), f"its index points outside of it, to {relative}")
        path = self.directory / relative
        with durable.naming_path(path, "reading"):
            if path not in self._files:
                self._files[path] = MappedFile(path)
            mapped = self._files[path].tensor(info.offset, info.length) if index.offset is not None else None
        if mapped is not None:
            return mapped
        with durable.naming_path(path, "reading"), open(path, "rb", buffering=0) as file:
            part = _FilePart(file, info.offset, info.length)
            value = load_stream(
                cast("IO[bytes]", part), str(path), allow_unsafe_pickle=self._allow_unsafe_pickle
            )
        if index.offset is not None and not isinstance(value, torch.Tensor):
            raise CheckpointingException(
                str(path), f"the entry of {index.fqn} is not a tensor", "use an earlier checkpoint"
            )
        return value


class _FilePart(io.RawIOBase):
    """A read-only window of a file, as a stream."""

    def __init__(self, file: io.RawIOBase, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = origin + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(self._length - self._position, 0)]
        self._file.seek(self._start + self._position)
        count = self._file.readinto(view) or 0
        self._position += count
        return count


class TorchDistLoadShardedStrategy(StoredLoadStrategy):
    """Reads torch_dist in any layout."""

    backend = "torch_dist"

    def open(self, checkpoint_dir: Path) -> StoredTensors:
        """Random access to the files."""
        return StoredTensors(checkpoint_dir, self.allow_unsafe_pickle)

    def load_tensors_metadata(
        self, checkpoint_dir: Path, metadata: Metadata | None = None
    ) -> ShardedStateDict:
        """key -> a ShardedTensor without data that covers the whole stored tensor, flattened if its pieces are."""
        return {
            key: r
            for key, r in self.load_sharded_metadata(checkpoint_dir).items()
            if isinstance(r, ShardedTensor)
        }

    def load_sharded_metadata(self, checkpoint_dir: Path) -> ShardedStateDict:
        """As load_tensors_metadata, and the objects by their unique keys."""
        stored = StoredTensors(checkpoint_dir)
        records: ShardedStateDict = {}
        for key in stored.keys():  # noqa: SIM118 not a mapping
            if stored.is_tensor(key):
                shape, whole = stored.shape(key), slice(0, math.prod(stored.shape(key)))
                data = torch.empty(shape, dtype=stored.dtype(key), device="meta")
                record = (
                    ShardedTensor.from_rank_offsets_flat(key, data.flatten(), shape, flattened_range=whole)
                    if stored.is_flattened(key)
                    else ShardedTensor.from_rank_offsets(key, data)
                )
                records[key] = record.without_data()
            else:
                records[key] = ShardedObject.empty_from_unique_key(key)
        return records


def register_default_torch_strategies() -> None:
    """Register torch_dist, version 1."""
    register_default_strategy(StrategyAction.LOAD_SHARDED, "torch_dist", 1, TorchDistLoadShardedStrategy())
    register_default_strategy(StrategyAction.SAVE_SHARDED, "torch_dist", 1, TorchDistSaveShardedStrategy())


register_default_torch_strategies()
