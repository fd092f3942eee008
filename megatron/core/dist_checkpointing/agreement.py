"""All ranks go on or all ranks stop: errors of one rank reach every rank before the next collective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from megatron.core.errors import CheckpointError

T = TypeVar("T")


def rank() -> int:
    """Rank in the world; 0 without process groups."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without process groups."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier()


def gather(value: T) -> list[T]:
    """The value of every rank, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value: T, source: int = 0) -> T:
    """The value of rank `source`, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def agree(error: CheckpointError | None) -> None:
    """Raise the first rank's error on every rank, or nothing if no rank has one. Every rank must call."""
    reports = gather(None if error is None else (type(error), error.subject, error.why, error.fix))
    for failed_rank, report in enumerate(reports):
        if report is not None:
            kind, subject, why, fix = report
            where = "" if len(reports) == 1 else f" (on rank {failed_rank})"
            raise kind(f"{subject}{where}", why, fix) from error


@contextmanager
def together() -> Iterator[None]:
    """Run the block on this rank, then `agree`. The block must not communicate; every rank must enter.

    OSErrors and CheckpointErrors are shared; any other error is a defect and ends this rank at once.
    """
    error: CheckpointError | None = None
    try:
        yield
    except CheckpointError as failed:
        error = failed
    except OSError as failed:
        subject = str(failed.filename or "checkpoint")
        error = CheckpointError(subject, failed.strerror or str(failed), "check the path and its permissions")
    agree(error)
