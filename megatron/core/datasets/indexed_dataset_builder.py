"""Writing token files, by sequence, document or batch of documents, in constant memory and without torch."""

from __future__ import annotations

import os
import tempfile
from array import array
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy

from megatron.core.datasets.files import write_atomically
from megatron.core.datasets.token_files import HEADER, MAGIC, VERSION, TokenIndex, get_bin_path, get_idx_path
from megatron.core.datasets.token_types import DType
from megatron.core.errors import DataError

# Read at once when one file is appended to another.
_COPY_BYTES = 1 << 24


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

    def chunks(self) -> Iterator[numpy.ndarray]:
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
        other = TokenIndex.of_prefix(path_prefix, self.multimodal)
        if other.dtype != self.dtype:
            raise DataError(
                get_idx_path(path_prefix),
                f"holds {other.dtype} tokens and cannot be appended to {self.dtype} in {self._bin_path}",
                "preprocess both with the same tokenizer",
            )
        other.verify()
        first, step = len(self._lengths), 1 << 20
        for start in range(0, other.sequences, step):
            modes = None if other.modes is None else other.modes[start : start + step]
            self._add_lengths(other.lengths[start : start + step], modes)
        for start in range(1, other.boundaries.size, step):
            self._boundaries.extend(first + other.boundaries[start : start + step])
        # Not to the end of the file: bytes that belong to no sequence would shift all that follows.
        remaining = other.token_bytes
        with open(get_bin_path(path_prefix), "rb", buffering=0) as source:
            while remaining:
                block = source.read(min(remaining, _COPY_BYTES))
                if not block:
                    raise other.damaged(f"needs {remaining} bytes more than its .bin has")
                self._bin.write(block)
                remaining -= len(block)

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
        stream.write(HEADER.pack(MAGIC, VERSION, self._code, len(self._lengths), len(self._boundaries)))
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
