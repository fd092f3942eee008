"""Saves in the background: started by save_checkpoint, finished between iterations, awaited at the end."""

from __future__ import annotations

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest
from megatron.core.errors import CheckpointError
from megatron.training.checkpointing.state import say

_queue = AsyncCallsQueue()


def schedule_async_save(async_request: AsyncRequest) -> None:
    """Start a save whose data was copied already; every rank must call."""
    _queue.schedule_async_request(async_request)


def maybe_finalize_async_save(blocking: bool = False) -> None:
    """Finish saves that are on the disk on every rank; every rank must call, once per iteration.

    A failed save is reported and training goes on: the next interval saves again. With `blocking` (the end of
    the run, where no next interval comes) all saves are awaited and a failure is raised as CheckpointError.
    """
    while _queue.get_num_unfinalized_calls():
        try:
            if not _queue.maybe_finalize_async_calls(blocking):
                return
        except CheckpointError as error:
            if blocking:
                raise
            _report(error)


def wait_for_saves() -> None:
    """Let saves in flight finish before another begins; failures are only reported, the next save repairs them."""
    while _queue.get_num_unfinalized_calls():
        try:
            _queue.maybe_finalize_async_calls(blocking=True)
        except CheckpointError as error:
            _report(error)


def _report(error: CheckpointError) -> None:
    say(
        f"WARNING: an asynchronous checkpoint save failed and is discarded: {error} The next save tries again."
    )
