"""Saves that finish later: a writer thread per request, and a queue that finalises them in order on all ranks.

The data was copied before a request is made, so training may go on. A thread serves better than a forked process:
it shares the copied buffers, its errors arrive as exceptions, and it lives with any device runtime.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from megatron.core.dist_checkpointing.agreement import agree, gather, together
from megatron.core.errors import CheckpointError


class AsyncRequest(NamedTuple):
    """Work for the background and what all ranks do, in order, once every rank's work is done.

    `async_fn(*async_fn_args)` must not communicate. `abandon_fns` run instead of `finalize_fns` if any rank failed.
    """

    async_fn: Callable[..., None] | None
    async_fn_args: tuple[Any, ...]
    finalize_fns: list[Callable[[], None]]
    is_frozen: bool = False
    abandon_fns: tuple[Callable[[], None], ...] = ()

    def add_finalize_fn(self, fn: Callable[[], None]) -> None:
        """Append to the finalisation. RuntimeError once the request is frozen."""
        if self.is_frozen:
            raise RuntimeError("a frozen request takes no more finalisation functions")
        self.finalize_fns.append(fn)

    def execute_sync(self) -> None:
        """Do everything now; every rank must call."""
        caller = DistributedAsyncCaller()
        caller.schedule_async_call(self.async_fn, self.async_fn_args)
        caller.is_current_async_call_done(blocking=True)
        _finalize(self, caller.failure)

    def freeze(self) -> AsyncRequest:
        """The same request, closed to further finalisation functions."""
        return self._replace(is_frozen=True)


class DistributedAsyncCaller:
    """One background call on every rank; done when it is done on all of them."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self.failure: CheckpointError | None = None

    def schedule_async_call(self, async_fn: Callable[..., None] | None, save_args: tuple[Any, ...]) -> None:
        """Start `async_fn(*save_args)` in the background; None means that this rank has nothing to do."""
        if async_fn is None:
            return

        def work() -> None:
            try:
                async_fn(*save_args)
            except CheckpointError as error:
                self.failure = error
            except OSError as error:
                self.failure = CheckpointError(str(error.filename), error.strerror or str(error))

        self._thread = threading.Thread(target=work, name="checkpoint-writer")
        self._thread.start()

    def is_current_async_call_done(self, blocking: bool = False) -> bool:
        """Whether all ranks are done, waiting for them if `blocking`. A collective."""
        if self._thread is not None:
            self._thread.join(None if blocking else 0)
        alive = self._thread is not None and self._thread.is_alive()
        return not any(gather(alive))


class AsyncCallsQueue:
    """Requests in flight, finalised first in, first out. All methods but `get_num_unfinalized_calls` are collective."""

    def __init__(self) -> None:
        self._calls: deque[tuple[int, DistributedAsyncCaller, AsyncRequest]] = deque()
        self._next_index = 0

    def schedule_async_request(self, async_request: AsyncRequest) -> int:
        """Start a request; returns its number."""
        caller = DistributedAsyncCaller()
        caller.schedule_async_call(async_request.async_fn, async_request.async_fn_args)
        self._next_index += 1
        self._calls.append((self._next_index, caller, async_request.freeze()))
        return self._next_index

    def maybe_finalize_async_calls(self, blocking: bool = False) -> list[int]:
        """Finalise what is done on all ranks (everything, if `blocking`); returns the numbers.

        CheckpointError, on every rank, if the work of any rank or a finalisation failed.
        """
        finished = []
        while self._calls and self._calls[0][1].is_current_async_call_done(blocking):
            index, caller, request = self._calls.popleft()
            _finalize(request, caller.failure)
            finished.append(index)
        return finished

    def get_num_unfinalized_calls(self) -> int:
        """How many requests are in flight."""
        return len(self._calls)

    def close(self) -> None:
        """Wait for everything and finalise it."""
        self.maybe_finalize_async_calls(blocking=True)


def _finalize(request: AsyncRequest, failure: CheckpointError | None) -> None:
    try:
        agree(failure)
        for finalize in request.finalize_fns:
            finalize()
    except CheckpointError:
        with together():
            for abandon in request.abandon_fns:
                abandon()
        raise
