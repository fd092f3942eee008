"""From what a checkpoint stores to what a run asks for, in whatever layout it was written; the same for every format."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch.distributed.checkpoint.api import CheckpointException as TorchCheckpointException

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    StateDict,
)
from megatron.core.dist_checkpointing.strategies.base import LoadShardedStrategy
from megatron.core.dist_checkpointing.strategies.resharding import Box, cell_box


class Stored(Protocol):
    """Random access to the tensors and objects of a checkpoint directory."""

    directory: Path

    def __contains__(self, key: str) -> bool:
        """Whether a tensor of this key, or an object of this unique key, is stored."""

    def keys(self) -> list[str]:
        """Every stored key; objects under their unique keys."""

    def is_tensor(self, key: str) -> bool:
        """Whether the key is a tensor, not an object."""

    def shape(self, key: str) -> tuple[int, ...]:
        """Global shape of a tensor."""

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of a tensor."""

    def read_object(self, key: str) -> Any:
        """An object."""

    def read_box(self, key: str, box: Box, target: torch.Tensor) -> int:
        """Copy what is stored of `box` into `target` (of the box's shape); returns the number of elements found."""

    def read_flat(self, key: str, cell: Box, wanted: slice, target: torch.Tensor) -> bool:
        """Fill 1-D `target` with a slice of the flattened `cell`, if it is stored flattened; else return False."""


class StoredLoadStrategy(LoadShardedStrategy):
    """Reads, in any layout, version 1 of a format whose files can be read at random; `open` says how."""

    backend: ClassVar[str]

    def __init__(self, allow_unsafe_pickle: bool = False) -> None:
        self.allow_unsafe_pickle = allow_unsafe_pickle

    def with_unsafe_pickle(self, allow: bool) -> StoredLoadStrategy:
        """The same strategy, which loads even files that could run code if `allow`."""
        return type(self)(allow)

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Objects lie beside the tensors."""
        return True

    def load(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> StateDict:
        """The tree with every record replaced by its data; tensors are read into the records' own `data`."""
        stored = self.open(checkpoint_dir)
        return dict_list_map_outplace(lambda record: read_record(stored, record), sharded_state_dict)

    def check_backend_compatibility(self, loaded_version: str) -> None:
        """Only this format."""
        if loaded_version != self.backend:
            raise CheckpointingException(
                "sharded part of the checkpoint", f"it is in the format {loaded_version}"
            )

    def check_version_compatibility(self, loaded_version: int) -> None:
        """Only version 1 exists."""
        if loaded_version > 1:
            why = f"version {loaded_version} of its format is newer than 1"
            raise CheckpointingException("sharded part of the checkpoint", why, "update this program")


def read_record(stored: Stored, record: Any) -> Any:
    """The data of a record; a tensor is read into the record's own `data`. CheckpointingException if it cannot be had."""
    if isinstance(record, ShardedObject):
        if record.unique_key not in stored:
            if record.key.endswith("_extra_state"):
                # Of a module that another implementation does not have, or that kept no fp8 scales.
                return None
            raise _absent(stored, record.unique_key)
        return stored.read_object(record.unique_key)
    assert isinstance(record, ShardedTensor), "only tensors and objects are read"
    if record.key not in stored:
        raise _absent(stored, record.key)
    shape = stored.shape(record.key)
    same_rank = len(shape) == len(record.global_shape)
    if not same_rank or (shape != tuple(record.global_shape) and not record.allow_shape_mismatch):
        raise CheckpointingException(
            f"Global shape mismatch for {record.key}",
            f"{shape} in {stored.directory}, {tuple(record.global_shape)} in this run",
            "give the run the checkpoint's architecture",
        )
    record.init_data("cpu")
    assert record.data is not None, "data was allocated"
    _read_tensor(stored, record)
    return record.data


def _read_tensor(stored: Stored, record: ShardedTensor) -> None:
    assert record.data is not None, "data was allocated"
    target, cell = record.data.detach(), cell_box(record)
    if record.flattened_range is not None:
        if target.numel() == 0:
            return
        if not record.allow_shape_mismatch and stored.read_flat(
            record.key, cell, record.flattened_range, target
        ):
            return
        whole = torch.zeros(cell.shape, dtype=stored.dtype(record.key))
        found = stored.read_box(record.key, cell, whole)
        target.copy_(whole.flatten()[record.flattened_range])
    else:
        view = target.view(cell.shape) if target.is_contiguous() else target.reshape(cell.shape)
        if record.allow_shape_mismatch and stored.shape(record.key) != tuple(record.global_shape):
            view.zero_()
        found = stored.read_box(record.key, cell, view)
        if view.data_ptr() != target.data_ptr():
            target.copy_(view.view(target.shape))
    if found != cell.numel() and not record.allow_shape_mismatch:
        why = f"only {found} of the {cell.numel()} elements of a piece of {record.key} are stored"
        raise CheckpointingException(str(stored.directory), why, "use an earlier checkpoint")


class NotStoredError(CheckpointingException, TorchCheckpointException):
    """A requested key is not in the checkpoint: torch's own error too, which v0.9 lets its callers catch here."""

    failures = {}
    __str__ = Exception.__str__


def _absent(stored: Stored, key: str) -> NotStoredError:
    return NotStoredError(
        str(stored.directory),
        f"it does not contain {key}",
        "give the run the checkpoint's architecture, or choose another --dist-ckpt-strictness",
    )
