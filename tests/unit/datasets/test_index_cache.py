"""The cache between processes: built once, whole or not at all, with signs of life."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron.core.datasets.coordination import heartbeat
from megatron.core.datasets.files import write_atomically
from megatron.core.datasets.index_cache import IndexCache
from megatron.core.errors import DataError


def cache_in(directory: Path) -> IndexCache:
    return IndexCache(str(directory), "stem", ["numbers"], "description", {"bin_bytes": 5})


def test_two_builders_at_the_same_time_build_once(tmp_path: Path) -> None:
    calls: list[int] = []

    def build() -> Iterator[tuple[str, np.ndarray]]:
        calls.append(1)
        time.sleep(0.2)
        yield "numbers", np.arange(5)

    results: list[tuple[dict[str, np.ndarray], bool]] = []
    threads = [
        threading.Thread(target=lambda: results.append(cache_in(tmp_path).load_or_build(build)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert sorted(built for _, built in results) == [False, False, True]
    assert all(arrays["numbers"].tolist() == [0, 1, 2, 3, 4] for arrays, _ in results)


def test_interrupted_build_leaves_nothing_that_looks_complete(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, np.ndarray]]:
        yield "numbers", np.arange(5)
        raise ValueError("deliberate")

    with pytest.raises(ValueError, match="deliberate"):
        cache_in(tmp_path).load_or_build(broken)
    arrays, built = cache_in(tmp_path).load_or_build(lambda: [("numbers", np.arange(3))])
    assert built and arrays["numbers"].tolist() == [0, 1, 2]


def test_complete_cache_is_read_without_writing(tmp_path: Path) -> None:
    cache_in(tmp_path).load_or_build(lambda: [("numbers", np.arange(5))])
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    _, built = cache_in(tmp_path).load_or_build(lambda: pytest.fail("built although cached"))
    assert not built
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_full_disk_names_the_directory(tmp_path: Path) -> None:
    def full() -> Iterator[tuple[str, np.ndarray]]:
        raise OSError(28, os.strerror(28))
        yield

    with pytest.raises(
        DataError, match=r"cannot be written \(No space left on device\). Fix: set --data-cache-path"
    ):
        cache_in(tmp_path).load_or_build(full)


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(stream: object) -> None:
        raise ValueError("deliberate")

    with pytest.raises(ValueError, match="deliberate"):
        write_atomically(str(path), fail)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_heartbeat_says_what_goes_on_and_for_how_long(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    done: list[int] = []
    with heartbeat(logging.getLogger("test"), lambda: f"built {len(done)} of 2", every_s=0.02):
        done.append(1)
        while len(caplog.messages) < 2:
            time.sleep(0.01)
    said = len(caplog.messages)
    time.sleep(0.1)
    assert len(caplog.messages) == said, "the heart goes on beating after the work is done"
    assert re.fullmatch(r"built [01] of 2 \(0 s so far\)", caplog.messages[0])
