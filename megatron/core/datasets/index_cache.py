"""Index files on disk: found by the hash of what they depend on, refused when the data behind them changed."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, BinaryIO

import numpy

from megatron.core.datasets.coordination import heartbeat
from megatron.core.datasets.files import exclusive_lock, write_atomically
from megatron.core.errors import DataError
from megatron.core.utils import log_single_rank

logger = logging.getLogger(__name__)

# Smaller arrays are read instead of mapped: a blend of thousands of datasets would exhaust maps and descriptors.
_MAP_FROM_BYTES = 1 << 20
_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)


class IndexCache:
    """The arrays `{directory}/{stem}-{name}.npy` with their `description.txt` and `fingerprint.json`.

    `stem` contains the hash of the description. The fingerprint records the data files and the settings that the
    description leaves out; a cache written without one is accepted if `check` finds nothing wrong with its
    arrays. `directory` None keeps nothing.
    """

    def __init__(
        self,
        directory: str | None,
        stem: str,
        names: Sequence[str],
        description: str,
        fingerprint: Mapping[str, int | str | bool],
    ) -> None:
        self.directory, self.stem, self.names = directory, stem, tuple(names)
        self.description, self.fingerprint = description, dict(fingerprint)

    def load_or_build(
        self,
        build: Callable[[], Iterable[tuple[str, numpy.ndarray]]],
        check: Callable[[Mapping[str, numpy.ndarray]], str | None] = lambda arrays: None,
    ) -> tuple[dict[str, numpy.ndarray], bool]:
        """The arrays by name, and whether they were built now.

        `build` yields (name, array) so that each can be written and released before the next is made.
        `check` returns what is wrong with the arrays of a cache without fingerprint, or None.
        """
        if self.directory is None:
            return self._in_memory(build, "path_to_cache is None"), True
        if self._complete():
            return self._load(check), False
        try:
            os.makedirs(self.directory, exist_ok=True)
            with exclusive_lock(self._path("lock")):
                # Whoever held the lock before may have built it.
                built_now = not self._complete()
                if built_now:
                    self._build_and_save(build)
        except OSError as error:
            if error.errno in _NOT_WRITABLE:
                return self._in_memory(build, f"{self.directory} is not writable ({error.strerror})"), True
            raise DataError(
                self.directory,
                f"the index files cannot be written ({error.strerror})",
                "set --data-cache-path to a writable directory with free space",
            ) from error
        return self._load(check), built_now

    def _build_and_save(self, build: Callable[[], Iterable[tuple[str, numpy.ndarray]]]) -> None:
        with heartbeat(logger, lambda: f"still building {self.stem}"):
            for name, values in build():
                write_atomically(self._path(f"{name}.npy"), partial(_save, values))
                del values
        self._write_text("fingerprint.json", json.dumps(self.fingerprint, indent=4))
        # Last, because readers take it for the sign that all is there.
        self._write_text("description.txt", self.description)
        os.unlink(self._path("lock"))

    def _path(self, suffix: str) -> str:
        assert self.directory is not None, "only called with a directory"
        return os.path.join(self.directory, f"{self.stem}-{suffix}")

    def _complete(self) -> bool:
        return all(
            os.path.isfile(self._path(suffix))
            for suffix in ["description.txt", *(f"{name}.npy" for name in self.names)]
        )

    def _write_text(self, suffix: str, text: str) -> None:
        write_atomically(self._path(suffix), lambda stream: stream.write(text.encode("utf-8")))

    def _in_memory(
        self, build: Callable[[], Iterable[tuple[str, numpy.ndarray]]], why: str
    ) -> dict[str, numpy.ndarray]:
        log_single_rank(logger, logging.WARNING, f"Unable to save the {self.stem} indexes because {why}")
        with heartbeat(logger, lambda: f"still building {self.stem}"):
            return dict(build())

    def _load(self, check: Callable[[Mapping[str, numpy.ndarray]], str | None]) -> dict[str, numpy.ndarray]:
        fingerprinted = os.path.isfile(self._path("fingerprint.json"))
        if fingerprinted:
            self._refuse(self._changed())
        arrays = {name: self._load_array(self._path(f"{name}.npy")) for name in self.names}
        if not fingerprinted:
            self._refuse(check(arrays))
        return arrays

    def _changed(self) -> str | None:
        with open(self._path("fingerprint.json"), encoding="utf-8") as stream:
            recorded: dict[str, Any] = json.load(stream)
        differences = [
            f"{key} was {recorded.get(key)} and is {value}"
            for key, value in self.fingerprint.items()
            if recorded.get(key) != value
        ]
        return ", ".join(differences) or None

    def _refuse(self, why: str | None) -> None:
        if why is not None:
            raise DataError(
                self._path("*"),
                f"this cache was built from other data or settings: {why}",
                "delete these files, or set another --data-cache-path",
            )

    def _load_array(self, path: str) -> numpy.ndarray:
        log_single_rank(logger, logging.DEBUG, f"\tLoad {path}")
        try:
            return numpy.load(path, mmap_mode="r" if os.path.getsize(path) >= _MAP_FROM_BYTES else None)
        except (ValueError, EOFError) as error:
            raise DataError(path, f"is damaged ({error})", "delete it, it will be built again") from error


def _save(values: numpy.ndarray, stream: BinaryIO) -> None:
    numpy.save(stream, values)
