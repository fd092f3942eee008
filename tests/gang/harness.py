"""Run a function on several ranks that were started once.

`run_gang(4, body, *args)` sends the qualified name of a module-level function and its pickled arguments to four
gloo workers and returns what each rank returned. Workers come from a fork server that has torch imported already,
live as long as the pytest session, and forget all global state after each body. A body that fails names the rank
and shows its traceback; one that hangs shows every rank's stack.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import importlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Seconds a body may take before every rank's stack is shown and the gang is replaced.
TIMEOUT_S = 60.0
#: Seconds a new gang may take to meet.
START_TIMEOUT_S = 120.0

_REPOSITORY = Path(__file__).resolve().parents[2]


class GangError(AssertionError):
    """A body failed, died or hung on at least one rank."""


@dataclass
class _Failure:
    text: str


@dataclass
class _Worker:
    rank: int
    process: Any
    pipe: multiprocessing.connection.Connection
    stack_file: Path


# In the worker ----------------------------------------------------------------------------------------------------


def _serve(
    rank: int, world_size: int, meeting_file: str, stack_file: str, pipe: Any, paths: list[str]
) -> None:
    """Join the gang and run bodies until the pipe closes."""
    sys.path[:] = paths
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    if sys.platform == "linux":
        os.environ.setdefault(
            "GLOO_SOCKET_IFNAME", "lo"
        )  # no name lookup: laptops often cannot resolve their own
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    with open(stack_file, "w") as stacks:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting_file}", rank=rank, world_size=world_size
        )
        pipe.send_bytes(pickle.dumps(None))
        while True:
            try:
                module, name, args, kwargs, timeout_s = pickle.loads(pipe.recv_bytes())
            except (EOFError, ConnectionResetError):
                return
            faulthandler.dump_traceback_later(timeout_s, file=stacks)
            try:
                body = importlib.import_module(module)
                for part in name.split("."):
                    body = getattr(body, part)
                # Plain pickles carry values; multiprocessing's own would share memory with a living worker.
                reply = pickle.dumps(body(*args, **kwargs))  # type: ignore[operator]
            except BaseException:  # noqa: BLE001  (whatever a test raises belongs into its report)
                reply = _failure()
            finally:
                faulthandler.cancel_dump_traceback_later()
            try:
                _forget_everything()
            except Exception:  # noqa: BLE001
                # The next body would run in a dirty world; what broke first comes with the process's end.
                traceback.print_exc()
                pipe.send_bytes(_failure())
                return
            pipe.send_bytes(reply)


def _failure() -> bytes:
    return pickle.dumps(_Failure(traceback.format_exc()))


def _forget_everything() -> None:
    """Destroy groups and every global of the library, and put random states and defaults back."""
    import numpy
    import torch

    from megatron.core import num_microbatches_calculator, parallel_state
    from megatron.core.tensor_parallel.random import destroy_rng_tracker

    parallel_state.destroy_model_parallel()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    destroy_rng_tracker()
    shell = sys.modules.get("megatron.training.global_vars")
    if shell is not None:
        shell.destroy_global_vars()
    gc.collect()  # models and their groups are in cycles; their threads and memory would pile up
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    numpy.random.seed(0)
    random.seed(0)


# In the test process ----------------------------------------------------------------------------------------------


class Gang:
    """`world_size` workers that have joined one gloo world."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.folder = tempfile.TemporaryDirectory(prefix="gang-")
        self.workers: list[_Worker] = []
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["torch", "torch.distributed", "numpy", "megatron.core.tensor_parallel"]
        )
        paths = [str(_REPOSITORY), *(path for path in sys.path if path != str(_REPOSITORY))]
        meeting = str(Path(self.folder.name) / "meeting")
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            stack_file = Path(self.folder.name) / f"stack-{rank}"
            process = context.Process(
                target=_serve,
                args=(rank, world_size, meeting, str(stack_file), theirs, paths),
                name=f"gang of {world_size}, rank {rank}",
                daemon=True,
            )
            process.start()
            theirs.close()
            self.workers.append(_Worker(rank, process, ours, stack_file))
        self._collect(START_TIMEOUT_S)

    def run(self, body: Callable[..., Any], args: tuple, kwargs: dict, timeout_s: float) -> list[Any]:
        """One result per rank; GangError if any rank failed."""
        message = pickle.dumps((body.__module__, body.__qualname__, args, kwargs, timeout_s))
        for worker in self.workers:
            worker.pipe.send_bytes(message)
        return self._collect(timeout_s)

    def _collect(self, timeout_s: float) -> list[Any]:
        results: dict[int, Any] = {}
        waiting = {worker.pipe: worker for worker in self.workers}
        # The workers dump their stacks at timeout_s; a little later they are all on disk. Once one rank failed the
        # others may wait for it for ever, so they get only a moment.
        deadline = time.monotonic() + timeout_s + 2.0
        while waiting:
            left = deadline - time.monotonic()
            ready = multiprocessing.connection.wait(list(waiting), timeout=max(left, 0.0))
            if not ready:
                break
            for pipe in ready:
                worker = waiting.pop(pipe)  # type: ignore[call-overload]
                try:
                    results[worker.rank] = pickle.loads(worker.pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    worker.process.join(5)
                    results[worker.rank] = _Failure(
                        f"the process ended with status {worker.process.exitcode}"
                    )
                if isinstance(results[worker.rank], _Failure):
                    deadline = min(deadline, time.monotonic() + 8.0)
        failures = {rank: reply.text for rank, reply in results.items() if isinstance(reply, _Failure)}
        if not failures and not waiting:
            return [results[rank] for rank in range(self.world_size)]
        for worker in waiting.values():
            stack = worker.stack_file.read_text() if worker.stack_file.exists() else ""
            failures[worker.rank] = "no answer. " + (stack or "It waited for another rank.")
        broken = bool(waiting) or any(not worker.process.is_alive() for worker in self.workers)
        if broken:
            self.close()
        report = "\n".join(
            f"--- rank {rank} of {self.world_size}\n{text}" for rank, text in sorted(failures.items())
        )
        raise GangError(f"{len(failures)} of {self.world_size} ranks failed\n{report}")

    def close(self) -> None:
        """End the workers."""
        for worker in self.workers:
            worker.pipe.close()
            worker.process.kill()
        for worker in self.workers:
            worker.process.join(5)
        self.workers = []
        with contextlib.suppress(OSError):
            self.folder.cleanup()


_GANGS: dict[int, Gang] = {}


def run_gang(
    world_size: int, body: Callable[..., Any], *args: Any, timeout_s: float = TIMEOUT_S, **kwargs: Any
) -> list[Any]:
    """`body(*args, **kwargs)` on every rank of a gang; what each rank returned, in rank order.

    The body is a module-level function; arguments and results are pickled. torch.distributed is initialised when
    it runs and it initialises the model-parallel groups itself. GangError if a rank fails, dies or takes longer
    than timeout_s.
    """
    gang = _GANGS.get(world_size)
    if gang is None or not gang.workers:
        gang = _GANGS[world_size] = Gang(world_size)
    return gang.run(body, args, kwargs, timeout_s)


def close_all() -> None:
    """End all gangs."""
    for gang in _GANGS.values():
        gang.close()
    _GANGS.clear()


atexit.register(close_all)
