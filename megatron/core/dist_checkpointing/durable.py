"""Files that survive a crash: staged, flushed, renamed, and accompanied by checksums.

A directory is filled under a staging name next to its final one and renamed when every file is on the disk, so a
reader sees a whole checkpoint or none. `checksums.json` in it lists size and CRC-32 of its files; a checkpoint
without that file (other programs' checkpoints) is simply not verified.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch

from megatron.core.errors import CheckpointError

MANIFEST_FNAME = "checksums.json"
_STAGING_SUFFIX = ".partial"
_REPLACED_SUFFIX = ".replaced"
_BLOCK_BYTES = 16 * 2**20

_FIXES = {
    errno.ENOSPC: "free space on that file system or save elsewhere with --save",
    errno.EDQUOT: "raise the quota or save elsewhere with --save",
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


class ChecksumWriter:
    """A write-only file that knows the checksum of what passed through it; closing it flushes to the disk."""

    def __init__(self, path: str | Path) -> None:
        self._file: IO[bytes] = open(path, "wb", buffering=0)  # noqa: SIM115 closed by close()
        self._size = 0
        self._crc32 = 0
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
        self._crc32 = zlib.crc32(view, self._crc32)
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def flush(self) -> None:
        """Nothing is buffered here."""

    def save(self, obj: Any) -> None:
        """torch.save `obj` here; a failed write is raised as the OSError it was."""
        try:
            torch.save(obj, cast("IO[bytes]", self))
        except (RuntimeError, SystemError):
            # torch's archive writer reports a failed write as an error of its own.
            if self.failure is None:
                raise
            raise self.failure from None

    def checksum(self) -> Checksum:
        """Of everything written so far."""
        return Checksum(self._size, self._crc32)

    def close(self) -> None:
        """Flush to the disk and close."""
        try:
            os.fsync(self._file.fileno())
        finally:
            self._file.close()


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
    """Read the whole file and return its checksum."""
    size = crc32 = 0
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            crc32 = zlib.crc32(buffer[:count], crc32)
            size += count
    return Checksum(size, crc32)


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
    """Write checksums.json: file name relative to `directory` -> [size, CRC-32 in hex]."""
    files = {name: [c.size, f"{c.crc32:08x}"] for name, c in sorted(checksums.items())}
    content = {"algorithm": "crc32", "files": files, "own": _own_checksum(files)}
    write_text(Path(directory) / MANIFEST_FNAME, json.dumps(content, indent=1))


def _own_checksum(files: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(files, sort_keys=True).encode()):08x}"


def read_manifest(directory: str | Path) -> dict[str, Checksum]:
    """The checksums of the directory; empty if it has none. CheckpointError if the manifest itself is damaged."""
    path = Path(directory) / MANIFEST_FNAME
    try:
        content = json.loads(path.read_text())
        files = content["files"]
        if content["own"] != _own_checksum(files):
            raise ValueError("it contradicts its own checksum")
        return {name: Checksum(size, int(crc32, 16)) for name, (size, crc32) in files.items()}
    except FileNotFoundError:
        return {}
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
