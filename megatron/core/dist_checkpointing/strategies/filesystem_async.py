"""Write a rank's pieces into at most a few data files, each item a torch archive of its own at a known offset."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
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


def own_data(data: torch.Tensor) -> torch.Tensor:
    """`data` on the CPU without the rest of a buffer that it may be a view of; a copy only if it must be."""
    data = data.detach()
    if data.device.type != "cpu":
        return data.cpu()
    whole = data.untyped_storage().nbytes() == data.numel() * data.element_size()
    return data if whole else data.clone()


class CopyMemory:
    """CPU memory that asynchronous saves copy into, kept from one save to the next.

    Training waits for the copy, and filling fresh pages takes several times longer than filling used ones. What is kept
    is what the next save needs anyway.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[torch.Tensor]] = {}

    def copy(self, data: torch.Tensor) -> torch.Tensor:
        """A copy of `data` that nothing else uses until it is given back."""
        free = self._free.get(data.numel() * data.element_size())
        memory = free.pop() if free else torch.empty(data.numel() * data.element_size(), dtype=torch.uint8)
        return memory.view(data.dtype).view(data.shape).copy_(data.detach())

    def keep_only(self, copies: Iterable[torch.Tensor]) -> None:
        """Take these copies back for the next save, and free what this one did not need."""
        self._free = {}
        for copy in copies:
            memory = copy.view(-1).view(torch.uint8)
            self._free.setdefault(memory.numel(), []).append(memory)


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
    """Write the items to `<prefix><n>.distcp`, durably, all files at once; returns where each went and their checksums.

    CheckpointError names the file that could not be written.
    """
    buckets = distribute_items(items, files)
    names = [f"{prefix}{number}.distcp" for number in range(len(buckets))]
    if len(buckets) <= 1:
        results = [_write_file(directory, name, bucket) for name, bucket in zip(names, buckets)]
    else:
        with ThreadPoolExecutor(len(buckets), thread_name_prefix="checkpoint-file") as pool:
            results = list(
                pool.map(lambda name, bucket: _write_file(directory, name, bucket), names, buckets)
            )
    written = [one for file, _ in results for one in file]
    return written, {name: checksum for name, (_, checksum) in zip(names, results)}


def _write_file(directory: Path, name: str, items: Sequence[Item]) -> tuple[list[Written], Checksum]:
    with naming_path(directory / name, "writing"):
        writer = ChecksumWriter(directory / name)
        try:
            written = [write_item(writer, item, name) for item in items]
        finally:
            writer.close()
    return written, writer.checksum()


def write_item(writer: ChecksumWriter, item: Item, name: str) -> Written:
    """Append an item to the data file `name` that `writer` writes; returns where it is."""
    start = writer.tell()
    data = item.data
    if isinstance(data, torch.Tensor):
        data = own_data(data)
    writer.save(data)
    length = writer.tell() - start
    # Aligned starts let a reader map tensors from the file in place.
    writer.write(bytes(-writer.tell() % _ALIGNMENT_BYTES))
    return Written(item.key, item.offset, name, start, length)
