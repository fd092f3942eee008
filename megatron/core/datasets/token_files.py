"""Token files: `prefix.bin` (tokens back to back) and `prefix.idx` (lengths, offsets, documents).

Layout of `.idx`, little endian: 9 bytes `MMIDIDX\\0\\0`; uint64 version 1; uint8 dtype code; uint64 S sequences;
uint64 K = documents + 1; int32[S] lengths in tokens; int64[S] byte offsets in `.bin`; int64[K] first sequence of
each document and S at the end; int8[S] modes, in multimodal datasets only.
"""

from __future__ import annotations

import hashlib
import os
import struct
from typing import Protocol

import numpy

from megatron.core.datasets.files import map_readonly
from megatron.core.datasets.token_types import DType
from megatron.core.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
_REBUILD = "run tools/preprocess_data.py again, or copy both files again"


def get_idx_path(path_prefix: str) -> str:
    """The index file of a prefix."""
    return path_prefix + ".idx"


def get_bin_path(path_prefix: str) -> str:
    """The token file of a prefix."""
    return path_prefix + ".bin"


def files_exist(path_prefix: str) -> bool:
    """Whether both files of a local prefix are there."""
    return os.path.exists(get_idx_path(path_prefix)) and os.path.exists(get_bin_path(path_prefix))


def missing_files(path_prefix: str) -> DataError:
    """The error for a prefix without its two files."""
    return DataError(
        path_prefix,
        f"One or both of the .idx and .bin files cannot be found at the path prefix {path_prefix}",
        "give the path without the .bin or .idx ending, for instance data/my_text_document",
    )


class TokenIndex:
    """The parsed `.idx`: zero-copy views into its bytes, consistent in size with each other and with `.bin`."""

    def __init__(self, path: str, content: numpy.ndarray, bin_bytes: int, multimodal: bool) -> None:
        self.path = path
        self.content = content
        self.bin_bytes = bin_bytes
        if content.size < HEADER.size:
            raise self.damaged(f"has {content.size} bytes, fewer than a header of {HEADER.size}")
        magic, version, code, sequences, boundaries = HEADER.unpack(content[: HEADER.size].tobytes())
        if magic != MAGIC:
            raise self.damaged("bad header, cannot read: it does not begin with MMIDIDX")
        if version != VERSION:
            raise self.damaged(f"bad version, cannot read: it is {version}, not {VERSION}")
        if code not in DType._value2member_map_:
            raise self.damaged(f"names token type {code}; the format has codes 1 to {len(DType)}")
        self.dtype = numpy.dtype(DType.dtype_from_code(code))
        self.sequences = sequences
        # Other writers may add modes that this reader was not told of, so S more bytes are always fine.
        needed = HEADER.size + 12 * sequences + 8 * boundaries + (sequences if multimodal else 0)
        if content.size not in (needed, needed + sequences):
            raise self.damaged(
                f"has {content.size} bytes where {sequences} sequences and {boundaries - 1} documents take {needed}"
            )
        if boundaries == 0:
            raise self.damaged("has no document boundaries, not even the final one")
        start = HEADER.size
        self.lengths = content[start : start + 4 * sequences].view("<i4")
        start += 4 * sequences
        self.pointers = content[start : start + 8 * sequences].view("<i8")
        start += 8 * sequences
        self.boundaries = content[start : start + 8 * boundaries].view("<i8")
        start += 8 * boundaries
        self.modes = content[start : start + sequences].view(numpy.int8) if multimodal else None
        if self.boundaries[0] != 0 or self.boundaries[-1] != sequences:
            raise self.damaged(
                f"document boundaries run from {self.boundaries[0]} to {self.boundaries[-1]}, not from 0 to {sequences}"
            )
        if sequences:
            self.extent(sequences - 1)

    @classmethod
    def of_prefix(cls, path_prefix: str, multimodal: bool = False) -> TokenIndex:
        """The index of a local prefix; DataError if files are missing, damaged or do not belong together."""
        if not files_exist(path_prefix):
            raise missing_files(path_prefix)
        idx_path = get_idx_path(path_prefix)
        return cls(idx_path, map_readonly(idx_path), os.path.getsize(get_bin_path(path_prefix)), multimodal)

    @property
    def token_bytes(self) -> int:
        """Bytes of `.bin` that belong to sequences."""
        if not self.sequences:
            return 0
        offset, length = self.extent(self.sequences - 1)
        return offset + length * self.dtype.itemsize

    def extent(self, i: int) -> tuple[int, int]:
        """Byte offset and token count of sequence i, checked against its successor or the end of `.bin`."""
        offset, length = int(self.pointers[i]), int(self.lengths[i])
        end = offset + length * self.dtype.itemsize
        last = i == self.sequences - 1
        limit = self.bin_bytes if last else int(self.pointers[i + 1])
        if offset < 0 or length < 0 or end > limit or (end != limit and not last):
            bound = f"{limit} bytes of the .bin" if last else f"offset {limit} of the next"
            raise self.damaged(
                f"sequence {i} has {length} tokens at byte {offset}, ending at {end}, which contradicts {bound}"
            )
        return offset, length

    def verify(self) -> None:
        """Check every length, offset and boundary. Reads the whole index; the constructor reads only its ends."""
        step = 1 << 22
        if self.sequences and self.pointers[0] != 0:
            raise self.damaged(
                f"the first sequence begins at byte {self.pointers[0]} of the .bin, not at its start"
            )
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
                raise self.damaged(f"document {start + int(falls[0])} ends before it begins")

    def fingerprint(self) -> dict[str, int | str]:
        """What identifies the content as far as sample indices depend on it, at the cost of a few page reads.

        Sizes of both files and a digest of the header and of 16 evenly spaced pages of the index.
        """
        content, page = self.content, 4096
        digest = hashlib.blake2b(content[: HEADER.size].tobytes(), digest_size=16)
        for i in range(16):
            start = (content.size - page) * i // 15 if content.size > page else 0
            digest.update(content[start : start + page].tobytes())
        return {
            "idx_bytes": int(content.size),
            "bin_bytes": self.bin_bytes,
            "idx_digest": digest.hexdigest(),
        }

    def damaged(self, why: str) -> DataError:
        """The error for a file that cannot be trusted."""
        return DataError(self.path, why, _REBUILD)


class BinReader(Protocol):
    """How the bytes of a `.bin` file are read."""

    def read(self, dtype: numpy.dtype, count: int, offset: int) -> numpy.ndarray:
        """`count` items of `dtype` from byte `offset`."""


class MMapBinReader:
    """Views into a memory map of the file."""

    def __init__(self, path: str) -> None:
        self._content = map_readonly(path)

    def read(self, dtype: numpy.dtype, count: int, offset: int) -> numpy.ndarray:
        return self._content[offset : offset + count * dtype.itemsize].view(dtype)


class FileBinReader:
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
