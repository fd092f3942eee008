"""Requests to a model that several ranks hold: answered one at a time, by all of them.

Global rank 0 takes a turn, announces what is to be done and does it; the other ranks follow.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist

from megatron.core import device
from megatron.inference.text_generation.api import (
    beam_search_and_post_process,
    generate_and_post_process,
    score_prompts,
)


class Task(IntEnum):
    """What the ranks are to do next; the first two numbers are v0.9's."""

    GENERATE = 0
    BEAM = 1
    SCORE = 2
    NOTHING = 3
    END = 4


_CALLS: dict[Task, Callable[..., Any]] = {
    Task.GENERATE: generate_and_post_process,
    Task.BEAM: beam_search_and_post_process,
    Task.SCORE: score_prompts,
}


def announce(task: Task) -> None:
    """Tell the ranks that `follow` what to do; called by global rank 0."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(torch.tensor(task, dtype=torch.long, device=device.current()), 0)


def follow(model: torch.nn.Module) -> None:
    """Take part in what global rank 0 announces until it ends. Its signals are for rank 0 to heed."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    announced = torch.zeros((), dtype=torch.long, device=device.current())
    while True:
        dist.broadcast(announced, 0)
        task = Task(int(announced))
        if task == Task.END:
            return
        try:
            if task in _CALLS:
                _CALLS[task](model)
        except ValueError:
            continue  # every rank refuses such a request, and rank 0 answers it


class Closed(Exception):
    """There are no more turns."""


class Turns:
    """Whose turn it is on rank 0: threads that answer requests take one after the other."""

    def __init__(self) -> None:
        #: Set once there are no more turns: the server ends, or a failure has left the ranks out of step.
        self.closed = threading.Event()
        self.failure: RuntimeError | None = None
        self._lock = threading.Lock()

    @contextmanager
    def take(self) -> Iterator[None]:
        """Run the block while no other thread does; Closed if there are no more turns."""
        with self._lock:
            if self.closed.is_set():
                raise Closed
            try:
                yield
            except RuntimeError as failure:
                # The ranks may be anywhere by now; with a single one nothing is lost.
                if dist.is_initialized() and dist.get_world_size() > 1:
                    self.failure = failure
                    self.closed.set()
                raise

    def wait_until_closed(self, keep_awake_s: float) -> None:
        """Return when there are no more turns; until then the other ranks hear at least this often of this one."""
        while not self.closed.wait(keep_awake_s):
            with self._lock:
                announce(Task.NOTHING)

    def end(self) -> None:
        """Release the other ranks, after the turn that may be under way; raises what left them out of step."""
        self.closed.set()
        with self._lock:
            if self.failure is not None:
                raise self.failure
            announce(Task.END)
