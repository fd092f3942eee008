"""A job of two ranks that saves after every step and is killed again and again; run as a program.

The program imports everything once and forks the ranks, so that a life costs a fraction of a second. Each rank has
weights, an optimizer and random states of its own. `progress` is memory shared with the ranks: whether a save is under
way, the iteration that was loaded, the last one that was announced as saved, how many saves this life began, and how
long the last took in nanoseconds; the moments of death follow from the last two, so they are inside of saves on a
busy machine too.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import select
import signal
import struct
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.training.async_utils import maybe_finalize_async_save
from megatron.training.checkpointing.layout import checkpoint_exists, read_tracker
from tests.unit.checkpointing.toy import Run, Toy, ToyOptimizer, arguments

RANKS = 2
_SAVING, _LOADED, _SAVED, _BEGUN, _SAVE_NS = range(5)


class Progress:
    """Integers that the ranks and their parent share."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 40)

    def __getitem__(self, index: int) -> int:
        return struct.unpack_from("q", self._memory, 8 * index)[0]

    def __setitem__(self, index: int, value: int) -> None:
        struct.pack_into("q", self._memory, 8 * index, value)


class _Part(Toy):
    """A rank's rows of the stored tensors."""

    def sharded_state_dict(self, prefix: str = "") -> dict[str, Any]:
        place = (0, dist.get_rank(), RANKS)
        return {
            name: ShardedTensor.from_rank_offsets(prefix + name, value, place)
            for name, value in self.state_dict(prefix=prefix, keep_vars=True).items()
        }


class _PartOptimizer(ToyOptimizer):
    """Keeps its state as an object of this rank."""

    def sharded_state_dict(
        self, model_state: dict[str, Any], is_loading: bool = False, **_: Any
    ) -> dict[str, Any]:
        return {
            "param_groups": [],
            "own": ShardedObject("optimizer", self.state_dict(), (RANKS,), (dist.get_rank(),)),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict.get("own", state_dict))


def _live(rank: int, store: Path, options: dict[str, Any], progress: Progress, ready: int) -> list[float]:
    """One life of a rank; returns a digest of its weights if it reaches the last step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), RANKS), rank=rank, world_size=RANKS)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=RANKS)
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    init_num_microbatches_calculator(rank, None, 4, 2, 1)
    args = arguments(
        Path(options["directory"]),
        ckpt_format=options["format"],
        async_save=options["asynchronous"] or None,
        keep_last_checkpoints=2,
        tensor_model_parallel_size=RANKS,
    )
    run = Run(args)
    torch.manual_seed(100 + rank)
    run.model = _Part(32)
    run.optimizer = _PartOptimizer(run.model.parameters(), lr=0.1)
    run.load()
    if rank == 0:
        progress[_LOADED] = run.iteration
    dist.barrier()
    os.write(ready, b"x")
    while run.iteration < options["steps"]:
        run.step()
        started = time.monotonic_ns()
        progress[_SAVING] = 1
        progress[_BEGUN] += rank == 0
        run.save()
        maybe_finalize_async_save(blocking=run.iteration == options["steps"])
        progress[_SAVING] = int(options["asynchronous"])
        if rank == 0:
            progress[_SAVE_NS] = time.monotonic_ns() - started
            # The tracker is what a resume believes.
            progress[_SAVED] = read_tracker(args.save).iteration if checkpoint_exists(args.save) else 0
    digest = [value.item() for w in run.weights() for value in (w.double().sum(), w.double().abs().sum())]
    dist.destroy_process_group()
    return digest


def _fork(rank: int, store: Path, options: dict[str, Any], progress: Progress, ready: int) -> tuple[int, int]:
    """Start a rank; returns its process and the pipe with its result."""
    result, sending = os.pipe()
    child = os.fork()
    if child:
        os.close(sending)
        return child, result
    status = 1
    try:
        # Torch and the rank itself talk; the parent's output is only its report.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        digest = _live(rank, store, options, progress, ready)
        os.write(sending, json.dumps(digest).encode())
        status = 0
    except BaseException:
        # The parent must learn of everything; a killed neighbour is one of the causes.
        os.write(sending, traceback.format_exc().encode()[-4000:])
        raise
    finally:
        os._exit(status)


def _start(number: int, options: dict[str, Any], progress: Progress) -> tuple[list[tuple[int, int]], int]:
    store = Path(options["stores"]) / f"{number}"
    ready, sending = os.pipe()
    ranks = [_fork(rank, store, options, progress, sending) for rank in range(RANKS)]
    os.close(sending)
    return ranks, ready


def _finish(ranks: list[tuple[int, int]]) -> list[str]:
    results = []
    for child, result in ranks:
        os.waitpid(child, 0)
        with os.fdopen(result) as file:
            results.append(file.read())
    return results


def _whole_life(number: int, options: dict[str, Any], progress: Progress) -> list[Any]:
    ranks, ready = _start(number, options, progress)
    results = _finish(ranks)
    os.close(ready)
    return [json.loads(result) if result.startswith("[") else result for result in results]


def main() -> None:
    """Kill `kills` times, then let the run finish, and run another in peace; prints a report as JSON."""
    directory, ckpt_format, asynchronous, kills = (
        Path(sys.argv[1]),
        sys.argv[2],
        sys.argv[3] == "1",
        int(sys.argv[4]),
    )
    chance, progress = random.Random(int(sys.argv[5])), Progress()
    options = {
        "directory": str(directory / "killed"), "stores": str(directory), "format": ckpt_format,
        "asynchronous": asynchronous, "steps": 10**9,
    }  # fmt: skip
    report: dict[str, Any] = {"kills": 0, "in_save": 0, "lost": [], "failures": []}
    for number in range(kills):
        saved = progress[_SAVED]
        progress[_LOADED], progress[_BEGUN] = -1, 0
        ranks, ready = _start(number, options, progress)
        select.select([ready], [], [], 60)
        started = os.read(ready, 1)
        os.close(ready)
        if not started:
            report["failures"].append(_finish(ranks))
            break
        if progress[_LOADED] < saved:
            report["lost"].append([saved, progress[_LOADED]])
        wanted = chance.choice([0, 1, 1, 2, 3])
        while progress[_BEGUN] < wanted and not select.select([ranks[0][1]], [], [], 0.0005)[0]:
            pass
        time.sleep(chance.random() * min(progress[_SAVE_NS] / 1e9 or 0.02, 1.0))
        victim = chance.randrange(RANKS)
        report["in_save"] += progress[_SAVING]
        os.kill(ranks[victim][0], signal.SIGKILL)
        # As a launcher does: the others follow a little later, and may get on a bit meanwhile.
        time.sleep(chance.choice([0.0, 0.002, 0.03]))
        for child, _ in ranks:
            os.kill(child, signal.SIGKILL)
        _finish(ranks)
        report["kills"] += 1
    options["steps"] = progress[_SAVED] + 5
    report["steps"] = options["steps"]
    report["resumed"] = _whole_life(kills, options, progress)
    quiet = {**options, "directory": str(directory / "quiet")}
    report["quiet"] = _whole_life(kills + 1, quiet, progress)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
