"""Token files: `prefix.bin` (tokens back to back) and `prefix.idx` (lengths, offsets, documents).

Layout of `.idx`, little endian: 9 bytes `MMIDIDX\\0\\0`; uint64 version 1; uint8 dtype code; uint64 S sequences;
uint64 K = documents + 1; int32[S] lengths in tokens; int64[S] byte offsets in `.bin`; int64[K] first sequence of
each document and S at the end; int8[S] modes, in multimodal datasets only.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import struct
import tempfile
from array import array
from typing import Any, BinaryIO, Protocol

import numpy
import torch

from megatron.core.datasets import utils_s3
from megatron.core.datasets.files import map_readonly, write_atomically
from megatron.core.datasets.token_types import DType
from megatron.core.datasets.utils_s3 import S3Config, is_object_storage_path
from megatron.core.errors import DataError
from megatron.core.utils import log_single_rank

logger = logging.getLogger(__name__)

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_REBUILD = "run tools/preprocess_data.py again, or copy both files again"


def get_idx_path(path_prefix: str) -> str:
    """The index file of a prefix."""
    return path_prefix + ".idx"


def get_bin_path(path_prefix: str) -> str:
    """The token file of a prefix."""
    return path_prefix + ".bin"


class _Index:
    """The parsed `.idx`: zero-copy views into its bytes, consistent in size with each other and with `.bin`."""

    def __init__(self, path: str, content: numpy.ndarray, bin_bytes: int, multimodal: bool) -> None:
        self.path = path
        self.content = content
        self.bin_bytes = bin_bytes
        if content.size < _HEADER.size:
            raise self._damaged(f"has {content.size} bytes, fewer than a header of {_HEADER.size}")
        magic, version, code, sequences, boundaries = _HEADER.unpack(content[: _HEADER.size].tobytes())
        if magic != _MAGIC:
            raise self._damaged("bad header, cannot read: it does not begin with MMIDIDX")
        if version != _VERSION:
            raise self._damaged(f"bad version, cannot read: it is {version}, not {_VERSION}")
        if code not in DType._value2member_map_:
            raise self._damaged(f"names token type {code}; the format has codes 1 to {len(DType)}")
        self.dtype = numpy.dtype(DType.dtype_from_code(code))
        self.sequences = sequences
        # Other writers may add modes that this reader was not told of, so S more bytes are always fine.
        needed = _HEADER.size + 12 * sequences + 8 * boundaries + (sequences if multimodal else 0)
        if content.size not in (needed, needed + sequences):
            raise self._damaged(
                f"has {content.size} bytes where {sequences} sequences and {boundaries - 1} documents take {needed}"
            )
        if boundaries == 0:
            raise self._damaged("has no document boundaries, not even the final one")
        start = _HEADER.size
        self.lengths = content[start : start + 4 * sequences].view("<i4")
        start += 4 * sequences
        self.pointers = content[start : start + 8 * sequences].view("<i8")
        start += 8 * sequences
        self.boundaries = content[start : start + 8 * boundaries].view("<i8")
        start += 8 * boundaries
        self.modes = content[start : start + sequences].view(numpy.int8) if multimodal else None
        if self.boundaries[0] != 0 or self.boundaries[-1] != sequences:
            raise self._damaged(
                f"document boundaries run from {self.boundaries[0]} to {self.boundaries[-1]}, not from 0 to {sequences}"
            )
        if sequences:
            self.extent(sequences - 1)

    def extent(self, i: int) -> tuple[int, int]:
        """Byte offset and token count of sequence i, checked against its successor or the end of `.bin`."""
        offset, length = int(self.pointers[i]), int(self.lengths[i])
        end = offset + length * self.dtype.itemsize
        last = i == self.sequences - 1
        limit = self.bin_bytes if last else int(self.pointers[i + 1])
        if offset < 0 or length < 0 or end > limit or (end != limit and not last):
            bound = f"{limit} bytes of the .bin" if last else f"offset {limit} of the next"
            raise self._damaged(
                f"sequence {i} has {length} tokens at byte {offset}, ending at {end}, which contradicts {bound}"
            )
        return offset, length

    def verify(self) -> None:
        """Check every length, offset and boundary. Reads the whole index; the constructor reads only its ends."""
        step = 1 << 22
        for start in range(0, self.sequences, step):
            lengths = self.lengths[start : start + step].astype(numpy.int64)
            pointers = self.pointers[start : start + step + 1].astype(numpy.int64)
            ends = pointers[: lengths.size] + lengths * self.dtype.itemsize
            wrong = numpy.flatnonzero((lengths < 0) | (pointers[: lengths.size] < 0))
            gaps = numpy.flatnonzero(ends[: pointers.size - 1] != pointers[1:])
            if wrong.size or gaps.size:
                self.extent(start + int(min([*wrong[:1], *gaps[:1]])))
        for start in range(0, self.boundaries.size, step):
            falls = numpy.flatnonzero(numpy.diff(self.boundaries[start : start + step + 1]) < 0)
            if falls.size:
                raise self._damaged(f"document {start + int(falls[0])} ends before it begins")

    def _damaged(self, why: str) -> DataError:
        return DataError(self.path, why, _REBUILD)


class _BinReader(Protocol):
    def read(self, dtype: numpy.dtype, count: int, offset: int) -> numpy.ndarray:
        """`count` items of `dtype` from byte `offset`."""


class _MMapBinReader:
    """Views into a memory map of the file."""

    def __init__(self, path: str) -> None:
        self._content = map_readonly(path)

    def read(self, dtype: numpy.dtype, count: int, offset: int) -> numpy.ndarray:
        return self._content[offset : offset + count * dtype.itemsize].view(dtype)


class _FileBinReader:
    """Fresh arrays, read at their offset without buffering; for file systems that map badly."""

    def __init__(self, path: str) -> None:
        self._path = path

    def read(self, dtype: numpy.dtype, count: int, offset: int) -> numpy.ndarray:
        sequence = numpy.empty(count, dtype=dtype)
        with open(self._path, "rb", buffering=0) as stream:
            stream.seek(offset)
            buffer = sequence.view(numpy.uint8).data
            done = 0
            while done < len(buffer):
                got = stream.readinto(buffer[done:])
                if not got:
                    raise DataError(
                        self._path, f"ends at byte {offset + done} while it is being read", _REBUILD
                    )
                done += got
        return sequence


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
        self.path_prefix, self.multimodal, self.mmap, self.s3_config = (
            path_prefix,
            multimodal,
            mmap,
            s3_config,
        )
        idx_path, bin_path = get_idx_path(path_prefix), get_bin_path(path_prefix)
        if not self.exists(path_prefix):
            raise DataError(
                path_prefix,
                f"One or both of the .idx and .bin files cannot be found at the path prefix {path_prefix}",
                "give the path without the .bin or .idx ending, for instance data/my_text_document",
            )
        log_single_rank(logger, logging.INFO, f"Load the _IndexReader from {idx_path}")
        self.bin_reader: _BinReader
        if is_object_storage_path(path_prefix):
            config = s3_config if s3_config is not None else S3Config(path_to_idx_cache=None)
            content = self._fetch_index(idx_path, config)
            bin_bytes = utils_s3.object_size_bytes(bin_path)
            self.bin_reader = utils_s3.ObjectBinReader(bin_path, config.bin_chunk_nbytes)
        else:
            content = map_readonly(idx_path)
            bin_bytes = os.path.getsize(bin_path)
            self.bin_reader = _MMapBinReader(bin_path) if mmap else _FileBinReader(bin_path)
        self.index = _Index(idx_path, content, bin_bytes, multimodal)
        log_single_rank(logger, logging.INFO, f"> total number of sequences: {len(self)}")
        log_single_rank(
            logger, logging.INFO, f"> total number of documents: {self.document_indices.size - 1}"
        )

    @staticmethod
    def _fetch_index(url: str, config: S3Config) -> numpy.ndarray:
        if config.path_to_idx_cache is None:
            return utils_s3.read_object(url)
        local_path = utils_s3.local_index_path(url, config)
        utils_s3.maybe_download_file(url, local_path)
        return map_readonly(local_path)

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
        paths = (get_idx_path(path_prefix), get_bin_path(path_prefix))
        if is_object_storage_path(path_prefix):
            return all(utils_s3.object_exists(path) for path in paths)
        return all(os.path.exists(path) for path in paths)

    def verify(self) -> None:
        """Check the whole index, which opening does not (it would read every page of it)."""
        self.index.verify()

    def fingerprint(self) -> dict[str, int | str]:
        """What identifies the content as far as sample indices depend on it, at the cost of a few page reads.

        Sizes of both files and a digest of the header and of 16 evenly spaced pages of the index.
        """
        content, page = self.index.content, 4096
        digest = hashlib.blake2b(content[: _HEADER.size].tobytes(), digest_size=16)
        for i in range(16):
            start = (content.size - page) * i // 15 if content.size > page else 0
            digest.update(content[start : start + page].tobytes())
        return {
            "idx_bytes": int(content.size),
            "bin_bytes": self.index.bin_bytes,
            "idx_digest": digest.hexdigest(),
        }


class _Column:
    """Integers collected for the index, kept on disk beyond a million so that memory stays constant."""

    _SPILL = 1 << 20

    def __init__(self, typecode: str, directory: str) -> None:
        self._recent = array(typecode)
        self._directory = directory
        self._spilled: BinaryIO | None = None

    def extend(self, values: numpy.ndarray | list[int]) -> None:
        if isinstance(values, numpy.ndarray) and values.dtype == self._recent.typecode:
            self._recent.frombytes(values.tobytes())
        else:
            self._recent.extend(values)
        if len(self._recent) >= self._SPILL:
            if self._spilled is None:
                self._spilled = tempfile.TemporaryFile(dir=self._directory)  # noqa: SIM115 - lives as long as self
            self._recent.tofile(self._spilled)
            del self._recent[:]

    def __len__(self) -> int:
        spilled_bytes = 0 if self._spilled is None else self._spilled.tell()
        return spilled_bytes // self._recent.itemsize + len(self._recent)

    def chunks(self) -> Any:
        """The values in order, as arrays."""
        dtype = numpy.dtype(self._recent.typecode)
        if self._spilled is not None:
            self._spilled.flush()
            self._spilled.seek(0)
            while raw := self._spilled.read(self._SPILL * dtype.itemsize):
                yield numpy.frombuffer(raw, dtype=dtype)
        yield numpy.frombuffer(self._recent, dtype=dtype) if self._recent else numpy.empty(0, dtype)


class IndexedDatasetBuilder:
    """Writes one prefix: tokens go to `bin_path` at once, `finalize` writes the index last and atomically."""

    def __init__(self, bin_path: str, dtype: Any = numpy.int32, multimodal: bool = False) -> None:
        self.dtype = numpy.dtype(dtype)
        self.multimodal = multimodal
        self._code = DType.code_from_dtype(self.dtype)
        self._bin_path = bin_path
        self._bin = open(bin_path, "wb", buffering=1 << 20)  # noqa: SIM115 - closed by finalize
        directory = os.path.dirname(os.path.abspath(bin_path))
        self._lengths = _Column("i", directory)
        self._boundaries = _Column("q", directory)
        self._boundaries.extend([0])
        self._modes = _Column("b", directory)

    def add_item(self, tensor: Any, mode: int = 0) -> None:
        """Append one sequence; the document stays open."""
        tokens = self._as_tokens(tensor)
        self._bin.write(tokens.tobytes())
        self._add_lengths([tokens.size], [mode])

    def add_document(self, tensor: Any, lengths: Any, modes: Any = None) -> None:
        """Append a document: its tokens, and the lengths (and modes) of its sequences. Both may be empty."""
        tokens = self._as_tokens(tensor)
        if tokens.size != sum(lengths):
            raise ValueError(
                f"{self._bin_path}: {tokens.size} tokens were given for lengths that sum to {sum(lengths)}"
            )
        self._bin.write(tokens.tobytes())
        self._add_lengths(lengths, modes)
        self.end_document()

    def add_documents(self, tokens: numpy.ndarray, lengths: numpy.ndarray, sequences: numpy.ndarray) -> None:
        """Append many documents at once.

        tokens [t] of all, lengths [n] of their n sequences, sequences [d] counts per document (summing to n).
        """
        tokens = self._as_tokens(tokens)
        if tokens.size != int(lengths.sum(dtype=numpy.int64)) or lengths.size != int(sequences.sum()):
            raise ValueError(
                f"{self._bin_path}: {tokens.size} tokens, {lengths.size} lengths and the given counts disagree"
            )
        first = len(self._lengths)
        self._bin.write(tokens.tobytes())
        self._add_lengths(lengths, None)
        self._boundaries.extend(first + numpy.cumsum(sequences, dtype=numpy.int64))

    def end_document(self) -> None:
        """Close the document: the sequences since the last call, possibly none."""
        self._boundaries.extend([len(self._lengths)])

    def add_index(self, path_prefix: str) -> None:
        """Append all of another prefix. It must have the same dtype."""
        other = IndexedDataset(path_prefix, multimodal=self.multimodal)
        if other.index.dtype != self.dtype:
            raise DataError(
                get_idx_path(path_prefix),
                f"holds {other.index.dtype} tokens and cannot be appended to {self.dtype} in {self._bin_path}",
                "preprocess both with the same tokenizer",
            )
        other.verify()
        first, step = len(self._lengths), 1 << 20
        for start in range(0, len(other), step):
            modes = None if other.sequence_modes is None else other.sequence_modes[start : start + step]
            self._add_lengths(other.sequence_lengths[start : start + step], modes)
        for start in range(1, other.document_indices.size, step):
            self._boundaries.extend(first + other.document_indices[start : start + step])
        with open(get_bin_path(path_prefix), "rb") as source:
            shutil.copyfileobj(source, self._bin, 1 << 24)

    def finalize(self, idx_path: str) -> None:
        """Close `.bin` and write `.idx`, which makes the dataset exist for readers."""
        self._bin.flush()
        os.fsync(self._bin.fileno())
        self._bin.close()
        write_atomically(idx_path, self._write_index)

    def _as_tokens(self, values: Any) -> numpy.ndarray:
        """Tokens in the file's dtype; OverflowError if one does not fit it."""
        tokens = numpy.asarray(values).reshape(-1)
        if tokens.dtype == self.dtype or tokens.size == 0:
            return tokens.astype(self.dtype, copy=False)
        if numpy.issubdtype(self.dtype, numpy.integer) and tokens.dtype.kind in "iu":
            limits = numpy.iinfo(self.dtype)
            if tokens.min() < limits.min or tokens.max() > limits.max:
                raise OverflowError(
                    f"{self._bin_path}: token ids {tokens.min()} to {tokens.max()} do not fit {self.dtype}"
                )
        return tokens.astype(self.dtype)

    def _add_lengths(self, lengths: Any, modes: Any) -> None:
        self._lengths.extend(lengths)
        if self.multimodal:
            self._modes.extend(modes if modes is not None else [0] * len(lengths))

    def _write_index(self, stream: BinaryIO) -> None:
        stream.write(_HEADER.pack(_MAGIC, _VERSION, self._code, len(self._lengths), len(self._boundaries)))
        for lengths in self._lengths.chunks():
            stream.write(lengths.tobytes())
        position = 0
        for lengths in self._lengths.chunks():
            # 64-bit throughout: 32-bit lengths times the item size pass 2 GiB in any real corpus.
            ends = position + numpy.cumsum(lengths, dtype=numpy.int64) * self.dtype.itemsize
            starts = ends - lengths.astype(numpy.int64) * self.dtype.itemsize
            stream.write(starts.tobytes())
            position = int(ends[-1]) if ends.size else position
        for boundaries in self._boundaries.chunks():
            stream.write(boundaries.tobytes())
        for modes in self._modes.chunks():
            stream.write(modes.tobytes())
