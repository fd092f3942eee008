"""Doing one thing on all ranks: in turn, failing together, and saying that it is still going on."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

import torch

from megatron.core.errors import DataError

T = TypeVar("T")


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


class FailTogether:
    """A body that every rank of the world runs: if it raises on one rank, it raises on all, naming the cause.

    Also a barrier. Without it the other ranks would wait for the failed one until the collective timeout.
    """

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupted = error is not None and not isinstance(error, Exception)
        if interrupted or not torch.distributed.is_initialized():
            return
        causes: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(
            causes, None if error is None else f"{type(error).__name__}: {error}"
        )
        if error is not None:
            return
        for rank, cause in enumerate(causes):
            if cause is not None:
                raise DataError(f"rank {rank} stopped while building datasets", cause)


def build_in_turns(build: Callable[[], T], wanted: bool) -> T | None:
    """Build on rank 0, then on the other ranks that want the result. All ranks must call.

    The first turn fills the cache that the second reads. Where a rank does not see rank 0's files, because the
    cache lies on a disk of its node, it builds them under the cache's lock: once per file system.
    """
    result = None
    for rank_zero_turn in (True, False):
        with FailTogether():
            if wanted and (_rank() == 0) == rank_zero_turn:
                result = build()
    return result


@contextmanager
def heartbeat(logger: logging.Logger, message: Callable[[], str], every_s: float = 10.0) -> Iterator[None]:
    """Log `message()` every ten seconds while the body runs, with the time since it began."""
    done = threading.Event()
    start = time.monotonic()

    def beat() -> None:
        while not done.wait(every_s):
            logger.info(f"{message()} ({time.monotonic() - start:.0f} s so far)")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
