"""Files as the data pipeline uses them: read-only maps, atomic writes, a lock between processes."""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy

from megatron.core.errors import DataError


def map_readonly(path: str) -> numpy.ndarray:
    """Map a file into memory as uint8. The map lives as long as any array taken from it."""
    try:
        return _map(path)
    except OSError as error:
        if not _may_open_more_files():
            raise DataError(
                path, f"cannot be mapped into memory ({error.strerror})", "raise `ulimit -n`"
            ) from error
    return _map(path)


def _map(path: str) -> numpy.ndarray:
    with open(path, "rb") as stream:
        if os.fstat(stream.fileno()).st_size == 0:
            return numpy.empty(0, dtype=numpy.uint8)
        # A map needs no descriptor once it exists; keeping one would cost two per dataset of a large blend.
        keep = {"trackfd": False} if sys.version_info >= (3, 13) else {}
        buffer = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ, **keep)
    return numpy.frombuffer(buffer, dtype=numpy.uint8)


def _may_open_more_files() -> bool:
    """Raise the soft limit on open files to the hard one; False if it was there already."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return True


def write_atomically(path: str, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to disk, and rename it to `path`."""
    temporary = f"{path}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}.tmp"
    try:
        with open(temporary, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


@contextmanager
def exclusive_lock(path: str) -> Iterator[None]:
    """Hold an advisory lock on `path` while the body runs; it ends with the process, however that ends.

    On a file system without locks the body runs unlocked: everything done under this lock writes atomically and
    always writes the same bytes, so the lock only spares repeated work.
    """
    with open(path, "ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError:
            yield
            return
        try:
            yield
        finally:
            fcntl.flock(stream, fcntl.LOCK_UN)
