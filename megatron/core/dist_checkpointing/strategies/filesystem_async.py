"""Write a rank's pieces into at most a few data files, each item a torch archive of its own at a known offset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.core.dist_checkpointing.durable import Checksum, ChecksumWriter, naming_path

_ALIGNMENT_BYTES = 64


@dataclass
class Item:
    """One thing to write: a tensor (exactly as large as its storage) or a picklable object."""

    key: str
    offset: tuple[int, ...] | None
    data: Any

    def nbytes(self) -> int:
        """Size of a tensor's data; 0 for objects."""
        return self.data.numel() * self.data.element_size() if isinstance(self.data, torch.Tensor) else 0


@dataclass(frozen=True)
class Written:
    """Where an item went."""

    key: str
    offset: tuple[int, ...] | None
    file: str
    start: int
    length: int


def own_copy(data: torch.Tensor, always: bool) -> torch.Tensor:
    """`data` on the CPU without the rest of a buffer that it may be a view of; a copy if `always`."""
    data = data.detach()
    if data.device.type != "cpu":
        return data.cpu()
    whole = data.untyped_storage().nbytes() == data.numel() * data.element_size()
    return data if whole and not always else data.clone()


def distribute_items(items: Sequence[Item], files: int) -> list[list[Item]]:
    """Objects in turn, then tensors, largest first, to the file that is smallest so far."""
    buckets: list[list[Item]] = [[] for _ in range(files)]
    objects = [item for item in items if item.offset is None]
    for index, item in enumerate(objects):
        buckets[index % files].append(item)
    sizes = [0] * files
    tensors = sorted((item for item in items if item.offset is not None), key=lambda item: -item.nbytes())
    for item in tensors:
        smallest = sizes.index(min(sizes))
        buckets[smallest].append(item)
        sizes[smallest] += item.nbytes()
    return [bucket for bucket in buckets if bucket]


def write_items(
    directory: Path, prefix: str, items: Sequence[Item], files: int
) -> tuple[list[Written], dict[str, Checksum]]:
    """Write the items to `<prefix><n>.distcp`, durably; returns where each went and the files' checksums.

    CheckpointError names the file that could not be written.
    """
    written: list[Written] = []
    checksums: dict[str, Checksum] = {}
    for number, bucket in enumerate(distribute_items(items, files)):
        name = f"{prefix}{number}.distcp"
        with naming_path(directory / name, "writing"):
            writer = ChecksumWriter(directory / name)
            try:
                for item in bucket:
                    written.append(write_item(writer, item, name))
            finally:
                writer.close()
        checksums[name] = writer.checksum()
    return written, checksums


def write_item(writer: ChecksumWriter, item: Item, name: str) -> Written:
    """Append an item to the data file `name` that `writer` writes; returns where it is."""
    start = writer.tell()
    data = item.data
    if isinstance(data, torch.Tensor):
        data = own_copy(data, always=False)
    writer.save(data)
    length = writer.tell() - start
    # Aligned starts let a reader map tensors from the file in place.
    writer.write(bytes(-writer.tell() % _ALIGNMENT_BYTES))
    return Written(item.key, item.offset, name, start, length)
