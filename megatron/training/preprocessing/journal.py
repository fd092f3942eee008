"""What an interrupted run has written, so that `--resume` continues to the same bytes.

A journal is one line of JSON that identifies the run, then records. A record is a line of JSON (position after a
chunk, counters, sizes, checksum) and the raw lengths and document sizes of the chunk for every output. Every line
begins with its own checksum. Tokens are not in it: they are the `.bin` files, and a record counts only as far as
those reach.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import numpy

from megatron.core.errors import DataError


@dataclass
class Progress:
    """Where a run stands: the next position in the input and what lies behind it."""

    file: int = 0
    offset: int = 0
    lines: int = 0
    characters: int = 0
    skipped: int = 0


@dataclass
class Record:
    """One chunk: progress after it; per output the tokens written, lengths [n] and sequences per document [d]."""

    progress: Progress
    tokens: list[int]
    lengths: list[numpy.ndarray]
    sequences: list[numpy.ndarray]


class JournalWriter:
    """Appends records; what `commit` returned from is on disk."""

    def __init__(self, path: str, identity: dict[str, Any]) -> None:
        self.path = path
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 - closed by close
        self._file.write(_line(identity))

    def add(self, record: Record) -> None:
        """Append one record."""
        body = b"".join(array.tobytes() for array in (*record.lengths, *record.sequences))
        header = {
            "progress": asdict(record.progress),
            "tokens": record.tokens,
            "lengths": [array.size for array in record.lengths],
            "sequences": [array.size for array in record.sequences],
            "crc": zlib.crc32(body),
        }
        self._file.write(_line(header) + body)

    def commit(self) -> None:
        """Put all records on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.commit()
        self._file.close()


def _line(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, sort_keys=True).encode("utf-8")
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _content(line: bytes) -> dict[str, Any] | None:
    """What a line says; None when it is cut off or damaged, and at the end of the file."""
    checksum, _, text = line.removesuffix(b"\n").partition(b" ")
    return json.loads(text) if checksum == b"%08x" % zlib.crc32(text) else None


def read_journal(path: str, identity: dict[str, Any]) -> Iterator[Record]:
    """The complete records of a journal, up to the first that is cut off or damaged.

    Errors: DataError when the journal belongs to a run over other data or with other options.
    """
    with open(path, "rb") as file:
        found = _content(file.readline())
        if found is None:
            return  # damaged in its first line: nothing can be told
        differing = sorted(key for key in {*identity, *found} if identity.get(key) != found.get(key))
        if differing:
            raise DataError(
                path,
                f"the interrupted run differs from this one in {', '.join(differing)}",
                "give the same options and input, or drop --resume to start over",
            )
        while (header := _content(file.readline())) is not None:
            sizes = [*header["lengths"], *header["sequences"]]
            body = file.read(4 * sum(sizes))
            if len(body) < 4 * sum(sizes) or zlib.crc32(body) != header["crc"]:
                return
            arrays = numpy.split(numpy.frombuffer(body, numpy.int32), numpy.cumsum(sizes)[:-1])
            outputs = len(header["lengths"])
            yield Record(Progress(**header["progress"]), header["tokens"], arrays[:outputs], arrays[outputs:])
