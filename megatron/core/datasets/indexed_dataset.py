"""The sequences of a pair of token files as a dataset; see token_files for the format."""

from __future__ import annotations

import logging
from typing import Any

import numpy
import torch

from megatron.core.datasets import utils_s3
from megatron.core.datasets.files import map_readonly
from megatron.core.datasets.indexed_dataset_builder import IndexedDatasetBuilder
from megatron.core.datasets.token_files import (
    BinReader,
    FileBinReader,
    MMapBinReader,
    TokenIndex,
    files_exist,
    get_bin_path,
    get_idx_path,
    missing_files,
)
from megatron.core.datasets.token_types import DType
from megatron.core.datasets.utils_s3 import S3Config, is_object_storage_path
from megatron.core.errors import DataError
from megatron.core.utils import log_single_rank

__all__ = ["DType", "IndexedDataset", "IndexedDatasetBuilder", "get_bin_path", "get_idx_path"]

logger = logging.getLogger(__name__)

#: What v0.9 calls them; its users ask which one a dataset chose.
_MMapBinReader, _FileBinReader, _S3BinReader = MMapBinReader, FileBinReader, utils_s3.ObjectBinReader


class IndexedDataset(torch.utils.data.Dataset):
    """The sequences of one prefix.

    `ds[i]` is sequence i as a 1-D array of the file's dtype, `ds[a:b]` a list of them; multimodal datasets pair
    each with its mode. A prefix with a URL scheme is read from object storage, see utils_s3.
    DataError if the two files are missing, damaged or do not belong together.
    """

    def __init__(
        self, path_prefix: str, multimodal: bool = False, mmap: bool = True, s3_config: S3Config | None = None
    ) -> None:
        super().__init__()
        self.initialize(path_prefix, multimodal, mmap, s3_config)

    def initialize(self, path_prefix: str, multimodal: bool, mmap: bool, s3_config: S3Config | None) -> None:
        """Open the files; also how an unpickled copy reopens them."""
        if not path_prefix:
            raise DataError(
                "--data-path",
                "no data path is given, and this kind of dataset has no synthetic data",
                "give --data-path, or --mock-data where the model has it",
            )
        self.path_prefix, self.multimodal, self.mmap, self.s3_config = (
            path_prefix,
            multimodal,
            mmap,
            s3_config,
        )
        log_single_rank(logger, logging.INFO, f"Load the _IndexReader from {get_idx_path(path_prefix)}")
        self.bin_reader: BinReader
        bin_path = get_bin_path(path_prefix)
        if is_object_storage_path(path_prefix):
            config = s3_config if s3_config is not None else S3Config(path_to_idx_cache=None)
            self.index = self._fetch_index(path_prefix, multimodal, config)
            self.bin_reader = utils_s3.ObjectBinReader(bin_path, config.bin_chunk_nbytes)
        else:
            self.index = TokenIndex.of_prefix(path_prefix, multimodal)
            self.bin_reader = MMapBinReader(bin_path) if mmap else FileBinReader(bin_path)
        log_single_rank(logger, logging.INFO, f"> total number of sequences: {len(self)}")
        log_single_rank(
            logger, logging.INFO, f"> total number of documents: {self.document_indices.size - 1}"
        )

    @staticmethod
    def _fetch_index(path_prefix: str, multimodal: bool, config: S3Config) -> TokenIndex:
        """The index of files in object storage, through the local cache if there is one."""
        if not IndexedDataset.exists(path_prefix):
            raise missing_files(path_prefix)
        url = get_idx_path(path_prefix)
        if config.path_to_idx_cache is None:
            content = utils_s3.read_object(url)
        else:
            local_path = utils_s3.local_index_path(url, config)
            utils_s3.maybe_download_file(url, local_path)
            content = map_readonly(local_path)
        return TokenIndex(url, content, utils_s3.object_size_bytes(get_bin_path(path_prefix)), multimodal)

    def __getstate__(self) -> tuple[str, bool, bool, S3Config | None]:
        return self.path_prefix, self.multimodal, self.mmap, self.s3_config

    def __setstate__(self, state: tuple[str, bool, bool, S3Config | None]) -> None:
        self.initialize(*state)

    def __len__(self) -> int:
        return self.index.sequences

    def __getitem__(self, idx: Any) -> Any:
        """Sequence idx, or the list of a slice of step 1; with modes for a multimodal dataset."""
        if isinstance(idx, slice):
            start, stop, step = idx.indices(len(self))
            if step != 1:
                raise ValueError("Slices into indexed_dataset must be contiguous")
            sequences = [self._read(i) for i in range(start, stop)]
            return sequences if self.index.modes is None else (sequences, self.index.modes[idx])
        if not isinstance(idx, int | numpy.integer):
            raise TypeError(f"Unexpected type received for idx: {type(idx)}")
        return self.get(int(idx))

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> Any:
        """`length` tokens of sequence idx from token `offset`; to its end if length is None."""
        if not -len(self) <= idx < len(self):
            raise IndexError(f"sequence {idx} of {len(self)} in {self.path_prefix}")
        i = int(idx) % len(self)
        sequence = self._read(i, offset, length)
        return sequence if self.index.modes is None else (sequence, self.index.modes[i])

    def _read(self, i: int, offset: int = 0, length: int | None = None) -> numpy.ndarray:
        position, available = self.index.extent(i)
        count = available - offset if length is None else length
        if offset < 0 or count < 0 or offset + count > available:
            raise IndexError(
                f"tokens {offset} to {offset + count} of sequence {i} in {self.path_prefix}, which has {available}"
            )
        return self.bin_reader.read(self.index.dtype, count, position + offset * self.index.dtype.itemsize)

    @property
    def sequence_lengths(self) -> numpy.ndarray:
        """Tokens per sequence, int32 [S]."""
        return self.index.lengths

    @property
    def document_indices(self) -> numpy.ndarray:
        """First sequence of each document, and S at the end: int64 [documents + 1]."""
        return self.index.boundaries

    def get_document_indices(self) -> numpy.ndarray:
        """The same as `document_indices`."""
        return self.index.boundaries

    def set_document_indices(self, document_indices: numpy.ndarray) -> None:
        """Replace the document boundaries of this object; the file stays."""
        self.index.boundaries = document_indices

    @property
    def sequence_modes(self) -> numpy.ndarray | None:
        """Mode per sequence, int8 [S]; None unless multimodal."""
        return self.index.modes

    @staticmethod
    def exists(path_prefix: str) -> bool:
        """Whether both files are there."""
        if is_object_storage_path(path_prefix):
            return all(utils_s3.url_exists(path(path_prefix)) for path in (get_idx_path, get_bin_path))
        return files_exist(path_prefix)

    def verify(self) -> None:
        """Check the whole index, which opening does not (it would read every page of it)."""
        self.index.verify()

    def fingerprint(self) -> dict[str, int | str]:
        """What identifies the content as far as sample indices depend on it, at the cost of a few page reads."""
        return self.index.fingerprint()
