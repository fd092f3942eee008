"""Where documents come from: files, directories, patterns and standard input, cut into chunks of whole lines."""

from __future__ import annotations

import glob
import gzip
import os
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from megatron.core.errors import DataError, FlagError

CHUNK_BYTES = 4 << 20
ROWS_PER_BATCH = 1000
STANDARD_INPUT = "-"
TEXT_SUFFIXES = (".jsonl", ".json", ".ndjson", ".txt")
GZIP_SUFFIXES = (".gz",)
ZSTD_SUFFIXES = (".zst", ".zstd")
PARQUET_SUFFIXES = (".parquet",)
KNOWN_SUFFIXES = TEXT_SUFFIXES + GZIP_SUFFIXES + ZSTD_SUFFIXES + PARQUET_SUFFIXES
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count` equal parts of the input, counted in bytes from 0."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`i/n` with 0 <= i < n. FlagError otherwise."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            raise FlagError(
                f"--shard {text}", "a shard is written i/n with i from 0 to n-1", "for instance --shard 0/16"
            )
        return cls(int(index), int(count))

    def bounds(self, total: int) -> tuple[int, int]:
        """First byte and end of this shard on an axis of `total` bytes."""
        return total * self.index // self.count, total * (self.index + 1) // self.count


WHOLE = Shard(0, 1)


@dataclass(frozen=True)
class Chunk:
    """Some consecutive documents of one file. Exactly one of size, data and batch says where they are.

    `offset` and `end` are positions in the file: bytes (after decompression), or rows of a table. `first_line` counts
    from 0 and is None where nobody had to read the bytes before.
    """

    file: int
    path: str
    offset: int
    end: int
    first_line: int | None = None
    data: bytes | None = None
    batch: Any = None

    def read(self) -> bytes:
        """The lines of a text chunk."""
        if self.data is not None:
            return self.data
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            parts = []
            missing = self.end - self.offset
            while missing and (part := file.read(missing)):
                parts.append(part)
                missing -= len(part)
        if missing:
            raise DataError(
                self.path, "became shorter while it was being read", "start again on the final file"
            )
        return parts[0] if len(parts) == 1 else b"".join(parts)


def find_inputs(specification: str) -> list[str]:
    """The files that `--input` names, in a fixed order: a file, a directory (recursively), a pattern, or `-`.

    Errors: FlagError when there are none.
    """
    if specification == STANDARD_INPUT or os.path.isfile(specification):
        return [specification]
    if os.path.isdir(specification):
        paths = sorted(
            os.path.join(folder, name)
            for folder, _, names in os.walk(specification)
            for name in names
            if name.endswith(KNOWN_SUFFIXES)
        )
        if not paths:
            raise FlagError(
                f"--input {specification}",
                f"the directory holds no file that ends in {' '.join(KNOWN_SUFFIXES)}",
                "give a pattern such as 'DIR/*' if the files are named otherwise",
            )
        return paths
    paths = sorted(path for path in glob.glob(specification, recursive=True) if os.path.isfile(path))
    if not paths and os.path.exists(specification):  # a named pipe or a device
        return [specification]
    if not paths:
        raise FlagError(
            f"--input {specification}", "no file has this name or matches this pattern", "check the path"
        )
    return paths


def input_bytes(paths: list[str]) -> int | None:
    """Size of all files on disk; None when it cannot be known beforehand."""
    if not all(os.path.isfile(path) for path in paths):
        return None
    return sum(os.path.getsize(path) for path in paths)


def read_chunks(
    paths: list[str],
    *,
    keys: list[str],
    shard: Shard = WHOLE,
    start: tuple[int, int] = (0, 0),
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[Chunk]:
    """The chunks of a shard in order, from position `start` = (file, offset) on.

    A line belongs to the shard in which it begins; a compressed file or a table to the one in which the file begins.
    Every file gives at least one chunk (perhaps empty), so that a reader of chunks sees each.
    """
    first, end = (0, 0) if shard == WHOLE else shard.bounds(_size_for_shards(paths))
    before = 0
    for number, path in enumerate(paths):
        size = os.path.getsize(path) if shard != WHOLE else 0
        here, before = before, before + size
        offset = start[1] if number == start[0] else 0
        if number < start[0]:
            continue
        if path.endswith(PARQUET_SUFFIXES):
            if shard == WHOLE or first <= here < end:
                yield from _table_chunks(number, path, keys, offset)
        elif _is_plain(path):
            low, high = (0, os.path.getsize(path)) if shard == WHOLE else (first - here, end - here)
            if shard == WHOLE or (low < size and high > 0):
                yield from _slices(
                    number, path, max(low, 0), min(high, os.path.getsize(path)), offset, chunk_bytes
                )
        elif shard == WHOLE or first <= here < end:
            with _open_stream(path) as stream:
                yield from _stream_chunks(number, path, stream, offset, chunk_bytes)


def _size_for_shards(paths: list[str]) -> int:
    total = input_bytes(paths)
    if total is None:
        raise FlagError("--shard", "the input is a pipe, which cannot be divided", "write it to a file first")
    return total


def _is_plain(path: str) -> bool:
    return os.path.isfile(path) and not path.endswith(GZIP_SUFFIXES + ZSTD_SUFFIXES)


def _slices(number: int, path: str, low: int, high: int, offset: int, chunk_bytes: int) -> Iterator[Chunk]:
    """Chunks of the lines that begin in [low, high), as positions: whoever encodes a chunk reads it."""
    with open(path, "rb") as file:
        position = offset
        if not offset and low:
            file.seek(low - 1)
            file.readline()
            position = file.tell()
        if position >= high:
            yield Chunk(number, path, position, position)
        while position < high:
            file.seek(min(position + chunk_bytes, high) - 1)
            file.readline()
            end = file.tell()
            yield Chunk(number, path, position, end)
            position = end


def _open_stream(path: str) -> Any:
    if path == STANDARD_INPUT:
        return sys.stdin.buffer
    if path.endswith(GZIP_SUFFIXES):
        return gzip.open(path, "rb")
    if path.endswith(ZSTD_SUFFIXES):
        return _pyarrow(path).input_stream(path, compression="zstd")
    return open(path, "rb")


def _pyarrow(path: str) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(
            path, "reading this format needs the package pyarrow", "pip install pyarrow"
        ) from error
    return pyarrow


def _stream_chunks(
    number: int, path: str, stream: IO[bytes], offset: int, chunk_bytes: int
) -> Iterator[Chunk]:
    """Chunks of a stream that can only be read forward; what precedes `offset` is read and dropped."""
    lines = position = 0
    while position < offset:
        skipped = _read(path, stream, min(chunk_bytes, offset - position))
        if not skipped:
            raise DataError(path, f"ends before byte {offset}, where the interrupted run stopped")
        lines += skipped.count(b"\n")
        position += len(skipped)
    parts: list[bytes] = []
    chunks = 0
    while True:
        block = _read(path, stream, chunk_bytes)
        cut = block.rfind(b"\n") + 1
        if block and not cut:  # a line longer than a block
            parts.append(block)
            continue
        data = b"".join([*parts, block[:cut] if block else b""])
        parts = [block[cut:]]
        if data or not (block or chunks):
            yield Chunk(number, path, position, position + len(data), lines, data)
            chunks += 1
            lines += data.count(b"\n")
            position += len(data)
        if not block:
            return


def _read(path: str, stream: IO[bytes], size: int) -> bytes:
    try:
        return stream.read(size)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            path, f"cannot be decompressed ({error})", "download or compress the file again"
        ) from error


def _table_chunks(number: int, path: str, keys: list[str], offset: int) -> Iterator[Chunk]:
    row = 0
    for batch in _table_batches(path, keys):
        start, row = row, row + batch.num_rows
        if row > offset:
            kept = batch.slice(max(0, offset - start))
            yield Chunk(number, path, max(start, offset), row, max(start, offset), batch=kept)
    if row <= offset:
        yield Chunk(number, path, row, row, row, data=b"")


def _table_batches(path: str, keys: list[str]) -> Iterator[Any]:
    _pyarrow(path)
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            missing = [key for key in keys if key not in table.schema_arrow.names]
            if missing:
                raise DataError(
                    path,
                    f"has no column {' '.join(missing)}; its columns are {' '.join(table.schema_arrow.names)}",
                    "name the columns with --json-keys",
                )
            yield from table.iter_batches(batch_size=ROWS_PER_BATCH, columns=keys)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(
            path, f"cannot be read as a table ({error})", "download or write the file again"
        ) from error


def count_lines(chunk: Chunk) -> int:
    """Documents in a chunk, without parsing them."""
    if chunk.batch is not None:
        return chunk.batch.num_rows
    data = chunk.read()
    return data.count(b"\n") + (bool(data) and not data.endswith(b"\n"))


def lines_before(path: str, offset: int, known: tuple[int, int] = (0, 0)) -> int:
    """Lines that end before byte `offset` of a plain file; `known` = (offset, lines) of an earlier answer."""
    position, lines = known if known[0] <= offset else (0, 0)
    with open(path, "rb", buffering=0) as file:
        file.seek(position)
        while position < offset:
            block = file.read(min(1 << 24, offset - position))
            if not block:
                break
            lines += block.count(b"\n")
            position += len(block)
    return lines
