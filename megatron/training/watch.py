"""Who waited for whom: when a rank gives up waiting in a collective, every other rank says where it is.

A thread on each rank asks the rendezvous store now and then whether a rank gave up; the first to do so names itself there,
and the others answer with the place their main thread is at.

With gloo the waiting call itself fails at the time limit. With nccl the program runs on and waits for its device, where the
limit ends the process from outside, without a word about the others; there the thread asks shortly before, when no step
has ended for most of that time.
"""

from __future__ import annotations

import atexit
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType

import torch.distributed as dist

_ROOT = "megatron/watch"
_POLL_SECONDS = 2.0
#: How long the rank that gave up waits for the others' answers.
_ANSWER_SECONDS = 3 * _POLL_SECONDS

#: The share of the time limit after which a rank that waits for its device asks.
_PATIENCE = 0.9

#: Where code lives that is neither this project's nor its user's.
_FOREIGN = ("site-packages", "dist-packages", sysconfig.get_path("stdlib"), "<frozen")

_store: dist.Store | None = None


def patience_s(backend: str, limit_minutes: float) -> float | None:
    """Seconds without a finished step after which the thread asks, or None where the waiting call itself will fail."""
    return 60 * limit_minutes * _PATIENCE if "nccl" in backend else None


def start(
    store: dist.Store,
    rank: int,
    progress: Callable[[], object] = lambda: None,
    patience: float | None = None,
) -> None:
    """Watch over this rank from a thread; `store` must be a connection of the thread's own.

    progress: what changes with every step, None before the first; patience: see `patience_s`.
    """
    global _store
    _store = store
    main = threading.main_thread().ident
    ending = threading.Event()
    thread = threading.Thread(
        target=_watch, args=(store, rank, main, progress, patience, ending), name="watch", daemon=True
    )
    thread.start()
    atexit.register(_end, thread, ending)


def _end(thread: threading.Thread, ending: threading.Event) -> None:
    """End the thread before the interpreter ends: to come back from the store into one that is ending aborts."""
    ending.set()
    thread.join(_ANSWER_SECONDS)


def _watch(
    store: dist.Store,
    rank: int,
    main: int | None,
    progress: Callable[[], object],
    patience: float | None,
    ending: threading.Event,
) -> None:
    seen, since = progress(), time.monotonic()
    try:
        while not store.check([f"{_ROOT}/asked"]):
            if ending.wait(_POLL_SECONDS):
                return
            now = progress()
            if now is None or now != seen:
                seen, since = now, time.monotonic()
            elif patience is not None and time.monotonic() - since > patience:
                if store.add(f"{_ROOT}/asking", 1) == 1:  # all lose patience at about the same time
                    _report_standstill(store, rank, main, patience)
                    return
                patience = None
        frame = sys._current_frames().get(main or 0)
        store.set(f"{_ROOT}/{rank}", f"Rank {rank} was {_place_of_frame(frame)}.")
        if frame is not None:
            _print_stack(rank, frame)
    except (RuntimeError, OSError):
        return  # the store went down with the run


def _report_standstill(store: dist.Store, rank: int, main: int | None, patience: float) -> None:
    """Ask on behalf of a main thread that waits for its device, and print the answers."""
    frame = sys._current_frames().get(main or 0)
    reports = _ask(store, rank, f"Rank {rank} was {_place_of_frame(frame)}.")
    print(
        f"rank {rank}: no step has ended for {patience:.0f} s, and --distributed-timeout-minutes is near; this rank was "
        f"{_place_of_frame(frame)}. {' '.join(reports)}",
        file=sys.stderr,
        flush=True,
    )
    if frame is not None:
        _print_stack(rank, frame)


def _place_of_frame(frame: FrameType | None) -> str:
    return "gone" if frame is None else _describe(traceback.extract_stack(frame))


def _print_stack(rank: int, frame: FrameType) -> None:
    stack = "".join(traceback.format_stack(frame))
    print(f"rank {rank} was here when another rank gave up waiting:\n{stack}", file=sys.stderr, flush=True)


def announce_timeout(error: BaseException) -> list[str]:
    """Say that this rank gave up waiting; returns where the others say they are, in order of rank."""
    if _store is None:
        return []
    rank = dist.get_rank()
    try:
        return _ask(_store, rank, f"Rank {rank} waited {place_of(error)}.")
    except (RuntimeError, OSError):
        return []


def _ask(store: dist.Store, rank: int, own: str) -> list[str]:
    """Put this rank's own report into the store, ask for the others', and return what comes in time."""
    store.set(f"{_ROOT}/{rank}", own)
    store.set(f"{_ROOT}/asked", str(rank))
    deadline = time.monotonic() + _ANSWER_SECONDS
    others = {f"{_ROOT}/{other}": other for other in range(dist.get_world_size()) if other != rank}
    while time.monotonic() < deadline and not all(store.check([key]) for key in others):
        time.sleep(0.1)
    return [store.get(key).decode() for key in sorted(others, key=others.__getitem__) if store.check([key])][
        :8
    ]


def place_of(error: BaseException) -> str:
    """Where in this project, or its user's code, an error arose, as `in <function> (<file>:<line>)`."""
    return _describe(traceback.extract_tb(error.__traceback__))


def _describe(stack: traceback.StackSummary) -> str:
    own = [entry for entry in stack if not any(place in entry.filename for place in _FOREIGN)]
    entry = (own or list(stack))[-1]
    name = entry.filename.replace("\\", "/")
    short = name[name.rindex("/megatron/") + 1 :] if "/megatron/" in name else name
    return f"in {entry.name} ({short}:{entry.lineno})"
