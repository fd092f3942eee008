"""Files that survive a crash: staged, flushed, renamed, and accompanied by checksums.

A directory is filled under a staging name next to its final one and renamed when every file is on the disk, so a
reader sees a whole checkpoint or none. `checksums.json` in it lists size and CRC-32 of its files and the versions of
the programs that wrote them; a checkpoint without that file (other programs' checkpoints) is simply not verified.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import platform
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch

from megatron.core.errors import CheckpointError
from megatron.core.package_info import __version__

MANIFEST_FNAME = "checksums.json"
_STAGING_SUFFIX = ".partial"
_REPLACED_SUFFIX = ".replaced"
# A thread's share of a file, and what it reads at a time (little enough to stay in a core's cache).
_SHARE_BYTES = 64 * 2**20
_BLOCK_BYTES = 2**20
# Pieces from this size on are left to torch to sum.
_LARGE_BYTES = 2**18
_MOST_THREADS = 8
# Where the header of a zip record says how long the rest of the header is.
_LENGTHS_IN_ZIP_HEADER = 26

_FIXES = {
    errno.ENOSPC: "free space on that file system or save elsewhere with --save",
    errno.EDQUOT: "raise the quota or save elsewhere with --save",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f) or save elsewhere with --save",
    errno.EACCES: "give this user permission there, or choose another directory",
    errno.EPERM: "give this user permission there, or choose another directory",
    errno.EROFS: "that file system is read-only: choose another directory",
    errno.ENOENT: "check the path",
}


@dataclass(frozen=True)
class Checksum:
    """Size in bytes and CRC-32 of a file's content."""

    size: int
    crc32: int


@contextmanager
def naming_path(path: str | Path, doing: str) -> Iterator[None]:
    """Turn an OSError of the block into a CheckpointError that names the path and what to do about it."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(str(path), f"{doing} failed: {reason}", _FIXES.get(error.errno or 0)) from error


@dataclass
class _Part:
    """Bytes of a file that is being written; `crc32` is None until it is known."""

    start: int
    size: int
    crc32: int | None


class ChecksumWriter:
    """A write-only file that knows the checksum of what passed through it; closing it flushes to the disk.

    Large tensors are not summed twice: torch.save makes a zip archive, which holds the CRC-32 of each tensor's data.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._file: IO[bytes] = open(path, "wb", buffering=0)  # noqa: SIM115 closed by close()
        self._size = 0
        self._parts: list[_Part] = [_Part(0, 0, 0)]
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Append `data` (anything with the buffer protocol); returns its length in bytes."""
        view = memoryview(data).cast("B")
        written = 0
        try:
            while written < len(view):
                written += self._file.write(view[written:])
        except OSError as error:
            self.failure = error
            raise
        last = self._parts[-1]
        if len(view) >= _LARGE_BYTES:
            self._parts.append(_Part(self._size, len(view), None))
        elif last.crc32 is None:
            self._parts.append(_Part(self._size, len(view), zlib.crc32(view)))
        else:
            last.crc32 = zlib.crc32(view, last.crc32)
            last.size += len(view)
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def flush(self) -> None:
        """Nothing is buffered here."""

    def save(self, obj: Any) -> None:
        """torch.save `obj` here; a failed write is raised as the OSError it was."""
        parts_before = len(self._parts)
        try:
            torch.save(obj, cast("IO[bytes]", self))
        except (RuntimeError, SystemError):
            # torch's archive writer reports a failed write as an error of its own.
            if self.failure is None:
                raise
            raise self.failure from None
        unsummed = [part for part in self._parts[parts_before:] if part.crc32 is None]
        if unsummed and torch.serialization.get_crc32_options():
            sums = _sums_of_archive(self._path)
            for part in unsummed:
                part.crc32 = sums.get((part.start, part.size))

    def checksum(self) -> Checksum:
        """Of everything written so far; what is not summed yet is read from the file, which must still be there."""
        unsummed = [part for part in self._parts if part.crc32 is None]
        if unsummed:
            with open(self._path, "rb", buffering=0) as file:
                for part in unsummed:
                    part.crc32 = _checksum_range(file.fileno(), part.start, part.size).crc32
        return functools.reduce(joined, (Checksum(part.size, part.crc32 or 0) for part in self._parts))

    def close(self) -> None:
        """Flush to the disk and close."""
        try:
            os.fsync(self._file.fileno())
        finally:
            self._file.close()


def _sums_of_archive(path: Path) -> dict[tuple[int, int], int]:
    """CRC-32 of each record of the zip archive at the end of the file, by (first byte, size)."""
    sums = {}
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        for record in archive.infolist():
            if record.compress_type == zipfile.ZIP_STORED:
                # The record's own header may be longer than the one in the archive's directory.
                file.seek(record.header_offset + _LENGTHS_IN_ZIP_HEADER)
                name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
                header_bytes = _LENGTHS_IN_ZIP_HEADER + 4 + name_bytes + extra_bytes
                sums[record.header_offset + header_bytes, record.file_size] = record.CRC
    return sums


def save_file(obj: Any, path: str | Path) -> Checksum:
    """torch.save `obj` to `path` and flush it to the disk; returns the checksum. CheckpointError names the path."""
    with naming_path(path, "writing"):
        writer = ChecksumWriter(path)
        try:
            writer.save(obj)
        finally:
            writer.close()
        return writer.checksum()


def save_torch_file(obj: Any, path: str | Path) -> Checksum:
    """As `save_file`, replacing an existing file in one step."""
    path = Path(path)
    staged = staging_path(path)
    checksum = save_file(obj, staged)
    with naming_path(path, "writing"):
        os.replace(staged, path)
        fsync_directory(path.parent)
    return checksum


def checksum_file(path: str | Path) -> Checksum:
    """Read the whole file, several parts of it at a time, and return its checksum."""
    with open(path, "rb", buffering=0) as file:
        return _checksum_range(file.fileno(), 0, os.fstat(file.fileno()).st_size)


def _checksum_range(descriptor: int, start: int, size: int) -> Checksum:
    """Of `size` bytes of a file, or fewer at its end."""
    shares = [
        (first, min(_SHARE_BYTES, start + size - first)) for first in range(start, start + size, _SHARE_BYTES)
    ]
    threads = min(len(shares), _MOST_THREADS, os.cpu_count() or 1)
    if threads <= 1:
        return _checksum_share(descriptor, start, size)
    with ThreadPoolExecutor(threads, thread_name_prefix="checksum") as pool:
        parts = pool.map(lambda share: _checksum_share(descriptor, *share), shares)
        return functools.reduce(joined, parts)


def _checksum_share(descriptor: int, start: int, size: int) -> Checksum:
    done = crc32 = 0
    buffer = memoryview(bytearray(min(size, _BLOCK_BYTES)))
    while done < size and (
        count := os.preadv(descriptor, [buffer[: min(size - done, len(buffer))]], start + done)
    ):
        crc32 = zlib.crc32(buffer[:count], crc32)
        done += count
    return Checksum(done, crc32)


def joined(first: Checksum, second: Checksum) -> Checksum:
    """Checksum of one text followed by another.

    A CRC is a remainder of polynomials over GF(2), so that n bytes behind a text multiply its remainder by x^(8n).
    """
    moved = _product(_power_of_x(8 * second.size), first.crc32)
    return Checksum(first.size + second.size, moved ^ second.crc32)


@functools.lru_cache(4096)
def _power_of_x(exponent: int) -> int:
    """x^exponent modulo CRC-32's polynomial; bit 31 stands for x^0, as in every reflected CRC."""
    power = 1 << 31
    for bit in range(exponent.bit_length()):
        if exponent >> bit & 1:
            power = _product(power, _square_of_x(bit))
    return power


@functools.cache
def _square_of_x(times: int) -> int:
    """x squared that many times."""
    return 1 << 30 if times == 0 else _product(_square_of_x(times - 1), _square_of_x(times - 1))


def _product(one: int, other: int) -> int:
    """Product of two polynomials of degree < 32 modulo CRC-32's."""
    product = 0
    while one:
        if one & 1 << 31:
            product ^= other
        one = one << 1 & 0xFFFFFFFF
        other = other >> 1 ^ (0xEDB88320 if other & 1 else 0)
    return product


def write_text(path: str | Path, text: str) -> Checksum:
    """Replace the file by `text` in one step: readers see the old content or the new one, never a part."""
    path = Path(path)
    staged = staging_path(path)
    with naming_path(path, "writing"):
        writer = ChecksumWriter(staged)
        try:
            writer.write(text.encode())
        finally:
            writer.close()
        os.replace(staged, path)
        fsync_directory(path.parent)
    return writer.checksum()


def fsync_file(path: str | Path) -> None:
    """Flush a file that something else wrote."""
    fsync_directory(path)


def fsync_directory(path: str | Path) -> None:
    """Flush the directory's own entries, so that files created or renamed in it stay after a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def staging_path(final: str | Path) -> Path:
    """Where the directory or file `final` is written before it is published."""
    final = Path(final)
    return final.with_name(f".{final.name}{_STAGING_SUFFIX}")


def stage(final: str | Path) -> Path:
    """Make an empty staging directory for `final`, removing what an interrupted attempt left; returns it."""
    staged = staging_path(final)
    with naming_path(staged, "preparing the directory"):
        if staged.exists():
            shutil.rmtree(staged)
        staged.mkdir(parents=True)
    return staged


def publish(final: str | Path) -> None:
    """Rename the staging directory of `final` to its name, replacing a directory of that name."""
    final = Path(final)
    staged, replaced = staging_path(final), _replaced_path(final)
    with naming_path(final, "publishing the directory"):
        for directory in (staged, *(entry for entry in staged.rglob("*") if entry.is_dir())):
            fsync_directory(directory)
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        staged.rename(final)
        fsync_directory(final.parent)
        shutil.rmtree(replaced, ignore_errors=True)


def heal(final: str | Path) -> None:
    """Undo a `publish` that was killed after moving the old directory away and before moving the new one in."""
    final = Path(final)
    if not final.exists() and _replaced_path(final).exists():
        with naming_path(final, "restoring the directory"):
            _replaced_path(final).rename(final)


def remove_directory(path: str | Path) -> None:
    """Delete a published directory; killed half-way, what is left no longer bears its name."""
    path = Path(path)
    doomed = staging_path(path)
    with naming_path(path, "removing the directory"):
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)


def _replaced_path(final: Path) -> Path:
    return final.with_name(f".{final.name}{_REPLACED_SUFFIX}")


def write_manifest(directory: str | Path, checksums: dict[str, Checksum]) -> None:
    """Write checksums.json: file name relative to `directory` -> [size, CRC-32 in hex], and who wrote them."""
    content: dict[str, Any] = {
        "algorithm": "crc32",
        "writer": {
            "megatron": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "files": {name: [c.size, f"{c.crc32:08x}"] for name, c in sorted(checksums.items())},
    }
    content["own"] = _own_checksum(content)
    write_text(Path(directory) / MANIFEST_FNAME, json.dumps(content, indent=1))


def _own_checksum(content: dict[str, Any]) -> str:
    rest = {name: value for name, value in content.items() if name != "own"}
    if "writer" not in content:
        # The first manifests named no writer and summed up only their files.
        rest = content["files"]
    return f"{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"


def read_manifest(directory: str | Path) -> dict[str, Checksum]:
    """The checksums of the directory; empty if it has none. CheckpointError if the manifest itself is damaged."""
    return _manifest(directory)[0]


def read_writer(directory: str | Path) -> dict[str, str]:
    """Versions of the programs that wrote the directory, by name; empty if it has no manifest. As `read_manifest`."""
    return _manifest(directory)[1]


def _manifest(directory: str | Path) -> tuple[dict[str, Checksum], dict[str, str]]:
    path = Path(directory) / MANIFEST_FNAME
    try:
        content = json.loads(path.read_text())
        if content["own"] != _own_checksum(content):
            raise ValueError("it contradicts its own checksum")
        files = {name: Checksum(size, int(crc32, 16)) for name, (size, crc32) in content["files"].items()}
        return files, {str(name): str(version) for name, version in content.get("writer", {}).items()}
    except FileNotFoundError:
        return {}, {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            str(path), f"the list of checksums is damaged ({error})", "use an earlier checkpoint"
        ) from error


def verify(directory: str | Path, names: Iterable[str] | None = None) -> None:
    """Compare files with the directory's manifest (all, or those of `names` that it lists).

    CheckpointError names the first file that is missing, cut short or changed.
    """
    manifest = read_manifest(directory)
    for name in manifest if names is None else names:
        if name not in manifest:
            continue
        path, expected = Path(directory) / name, manifest[name]
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise CheckpointError(str(path), "the file is missing", "use an earlier checkpoint") from None
        if size != expected.size:
            why = f"the file has {size} bytes instead of the {expected.size} that were saved"
            raise CheckpointError(str(path), why, "use an earlier checkpoint")
        with naming_path(path, "reading"):
            found = checksum_file(path)
        if found != expected:
            why = (
                f"its content changed since it was saved (CRC-32 {found.crc32:08x}, not {expected.crc32:08x})"
            )
            raise CheckpointError(str(path), why, "use an earlier checkpoint")
