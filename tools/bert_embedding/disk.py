"""Vectors of a large data set, as blocks in HDF5 files that every data-parallel rank writes some of."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron.core import parallel_state
from megatron.core.dist_checkpointing import durable
from megatron.core.errors import DataError, MegatronError
from tools.bert_embedding.embed import BertEmbedder, TextDataset

#: The name of the vectors in a file.
KEY = "data"


class DiskDataParallelBertEmbedder:
    """Embeds a data set in blocks of `block_size` texts; what an earlier run finished stays."""

    def __init__(self, embedder: BertEmbedder, block_size: int) -> None:
        if block_size < 1:
            raise ValueError(f"a block of {block_size} texts")
        self.embedder = embedder
        self.block_size = block_size
        self._h5py = import_h5py()

    def embed_text_dataset(self, name: str, dirpath: str, text_dataset: TextDataset) -> None:
        """Write `START-END.hdf5` [END - START, h] in `dirpath` for each missing block. All ranks must call.

        Damaged blocks are made anew. DataError where the directory holds blocks of other bounds.
        """
        folder = Path(dirpath)
        folder.mkdir(parents=True, exist_ok=True)
        blocks = block_names(len(text_dataset), self.block_size)
        foreign = sorted({path.name for path in folder.glob("*.hdf5")} - set(blocks))
        if foreign:
            raise DataError(
                str(folder),
                f"it holds {foreign[0]}, which is no block of {len(text_dataset)} texts, {self.block_size} each",
                "give an empty directory, or the number and block size of the earlier run",
            )  # fmt: skip
        missing = [block for block in blocks if not self._is_whole(folder / block, *blocks[block])]
        # A rank that is quicker must not write what another has yet to look at.
        dist.barrier()
        rank, ranks = (
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
        )
        own = missing[rank::ranks]
        for number, block in enumerate(own, 1):
            start, end = blocks[block]
            self._write(folder / block, self.embedder.embed_text_dataset(_Part(text_dataset, start, end)))
            if rank == 0:
                print(f"{name}: block {block}, {number} of {len(own)} on this rank", flush=True)
        dist.barrier()

    def _is_whole(self, path: Path, start: int, end: int) -> bool:
        """Whether a block is there and sound."""
        if not path.exists():
            return False
        try:
            with self._h5py.File(path, "r") as file:
                return file[KEY].shape == (end - start, self.embedder.hidden_size)
        except (OSError, KeyError, AttributeError):
            return False

    def _write(self, path: Path, vectors: Any) -> None:
        """Write a block, replacing a damaged one, in one step."""
        staged = durable.staging_path(path)
        with self._h5py.File(staged, "w") as file:
            file.create_dataset(KEY, data=vectors)
        durable.fsync_file(staged)
        os.replace(staged, path)
        durable.fsync_directory(path.parent)


class _Part:
    """Samples `start` .. `end` - 1 of a data set."""

    def __init__(self, dataset: TextDataset, start: int, end: int) -> None:
        self.dataset, self.start, self.end = dataset, start, end

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[self.start + index]


def block_names(count: int, block_size: int) -> dict[str, tuple[int, int]]:
    """File names of the blocks of `count` texts, with the first text of each and the one after its last."""
    digits = math.ceil(math.log10(count)) + 1 if count else 1
    bounds = ((start, min(start + block_size, count)) for start in range(0, count, block_size))
    return {f"{start:0{digits}d}-{end:0{digits}d}.hdf5": (start, end) for start, end in bounds}


def import_h5py() -> Any:
    """h5py, or an error that says what it is for."""
    try:
        import h5py
    except ImportError as error:
        raise MegatronError("h5py", "blocks of embeddings are written with it", "pip install h5py") from error
    return h5py
