"""Who waited for whom: when a rank gives up waiting in a collective, every other rank says where it is.

A thread on each rank asks the rendezvous store now and then whether a rank gave up; the first to do so names itself there,
and the others answer with the place their main thread is at.
"""

from __future__ import annotations

import sys
import sysconfig
import threading
import time
import traceback
from types import FrameType

import torch.distributed as dist

_ROOT = "megatron/watch"
_POLL_SECONDS = 2.0
#: How long the rank that gave up waits for the others' answers.
_ANSWER_SECONDS = 3 * _POLL_SECONDS

#: Where code lives that is neither this project's nor its user's.
_FOREIGN = ("site-packages", "dist-packages", sysconfig.get_path("stdlib"), "<frozen")

_store: dist.Store | None = None


def start(store: dist.Store, rank: int) -> None:
    """Watch over this rank from a thread; `store` must be a connection of the thread's own."""
    global _store
    _store = store
    main = threading.main_thread().ident
    thread = threading.Thread(target=_answer_when_asked, args=(store, rank, main), name="watch", daemon=True)
    thread.start()


def _answer_when_asked(store: dist.Store, rank: int, main: int | None) -> None:
    try:
        while not store.check([f"{_ROOT}/asked"]):
            time.sleep(_POLL_SECONDS)
        frame = sys._current_frames().get(main or 0)
        place = "gone" if frame is None else _describe(traceback.extract_stack(frame))
        store.set(f"{_ROOT}/{rank}", f"Rank {rank} was {place}.")
        if frame is not None:
            _print_stack(rank, frame)
    except (RuntimeError, OSError):
        return  # the store went down with the run


def _print_stack(rank: int, frame: FrameType) -> None:
    stack = "".join(traceback.format_stack(frame))
    print(f"rank {rank} was here when another rank gave up waiting:\n{stack}", file=sys.stderr, flush=True)


def announce_timeout(error: BaseException) -> list[str]:
    """Say that this rank gave up waiting; returns where the others say they are, in order of rank."""
    if _store is None:
        return []
    rank, size = dist.get_rank(), dist.get_world_size()
    try:
        _store.set(f"{_ROOT}/{rank}", f"Rank {rank} waited {place_of(error)}.")
        _store.set(f"{_ROOT}/asked", str(rank))
        deadline = time.monotonic() + _ANSWER_SECONDS
        others = {f"{_ROOT}/{other}" for other in range(size) if other != rank}
        while time.monotonic() < deadline and not all(_store.check([key]) for key in others):
            time.sleep(0.1)
        return [_store.get(key).decode() for key in sorted(others) if _store.check([key])][:8]
    except (RuntimeError, OSError):
        return []


def place_of(error: BaseException) -> str:
    """Where in this project, or its user's code, an error arose, as `in <function> (<file>:<line>)`."""
    return _describe(traceback.extract_tb(error.__traceback__))


def _describe(stack: traceback.StackSummary) -> str:
    own = [entry for entry in stack if not any(place in entry.filename for place in _FOREIGN)]
    entry = (own or list(stack))[-1]
    name = entry.filename.replace("\\", "/")
    short = name[name.rindex("/megatron/") + 1 :] if "/megatron/" in name else name
    return f"in {entry.name} ({short}:{entry.lineno})"
