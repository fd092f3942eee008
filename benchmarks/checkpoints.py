#!/usr/bin/env python3
"""Checkpoint speed beside plain torch.save and torch.load of the same bytes, and the memory that saving and loading take.

Both sides flush what they write to the disk and copy what they read into existing parameters; ours also verify every
checksum. Files are read from the page cache. The ways take turns, and each figure is the best of --repeats.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor, durable
from megatron.core.dist_checkpointing.safe_load import load_file
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

ROOT = Path(__file__).resolve().parents[1]
LAYERS = 8
RANKS = 2

Weights = dict[str, torch.Tensor]
PLAIN_SAVE, PLAIN_LOAD = "torch.save", "torch.load and copy"


def pieces(weights: Weights, parts: int, only: int | None = None) -> dict[str, Any]:
    """Each weight as `parts` row blocks of one global tensor; with `only`, the block of that number."""
    return {
        f"{name}.{part}": ShardedTensor.from_rank_offsets(name, block, (0, part, parts))
        for name, weight in weights.items()
        for part, block in enumerate(weight.chunk(parts))
        if only is None or part == only
    }


def emptied(directory: Path) -> Path:
    """The directory, new. A training run saves under a new name; removing old files is not part of a save."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    return directory


class Ways:
    """Ways to save and load the same weights; each method takes seconds and says how many."""

    def __init__(self, root: Path, megabytes: int) -> None:
        side = int((megabytes * 2**20 / 4 / LAYERS / 4) ** 0.5) // 8 * 8
        self.root = root
        self.weights = {f"layer{i}": torch.randn(4 * side, side) for i in range(LAYERS)}
        # Shared, so that other processes can fill them.
        self.targets = {name: torch.empty_like(w).share_memory_() for name, w in self.weights.items()}
        self.megabytes = sum(w.nbytes for w in self.weights.values()) / 2**20
        self._queue = AsyncCallsQueue()

    def plain_save(self) -> float:
        """torch.save and fsync."""
        directory = emptied(self.root / "plain")
        started = time.perf_counter()
        torch.save(self.weights, directory / "plain.pt")
        durable.fsync_file(directory / "plain.pt")
        return time.perf_counter() - started

    def torch_save(self) -> float:
        """The torch format, as save_checkpoint writes it."""
        final = emptied(self.root / "torch") / "iter_0000001"
        started = time.perf_counter()
        staged = durable.stage(final)
        checksum = durable.save_file(self.weights, staged / "model_optim_rng.pt")
        durable.write_manifest(staged, {"model_optim_rng.pt": checksum})
        durable.publish(final)
        return time.perf_counter() - started

    def dist_save(self, parts: int = 1) -> float:
        """torch_dist, by one rank."""
        directory = emptied(self.root / f"dist{parts}")
        started = time.perf_counter()
        dist_checkpointing.save(pieces(self.weights, parts), str(directory))
        return time.perf_counter() - started

    def async_save(self) -> tuple[float, float]:
        """torch_dist in the background: how long training waits, and when the files are on the disk."""
        directory = emptied(self.root / "async")
        started = time.perf_counter()
        request = dist_checkpointing.save(pieces(self.weights, 1), str(directory), async_sharded_save=True)
        assert request is not None, "an asynchronous save returns its request"
        self._queue.schedule_async_request(request)
        blocked = time.perf_counter() - started
        self._queue.close()
        return blocked, time.perf_counter() - started

    def plain_load(self) -> float:
        """torch.load into parameters that exist."""
        started = time.perf_counter()
        self._copy(torch.load(self.root / "plain" / "plain.pt", weights_only=True))
        return self._loaded(started)

    def torch_load(self) -> float:
        """The torch format: checksums, mapping, copy."""
        final = self.root / "torch" / "iter_0000001"
        started = time.perf_counter()
        durable.verify(final)
        self._copy(load_file(final / "model_optim_rng.pt"))
        return self._loaded(started)

    def dist_load(self, saved_parts: int, parts: int) -> float:
        """torch_dist: checksums, and each weight in `parts` pieces out of `saved_parts`."""
        started = time.perf_counter()
        durable.verify(self.root / f"dist{saved_parts}")
        dist_checkpointing.load(pieces(self.targets, parts), str(self.root / f"dist{saved_parts}"))
        return self._loaded(started)

    def ranks_save(self) -> float:
        """torch_dist by several ranks, a part of each weight from each."""
        emptied(self.root / "ranks")
        return max(_on_ranks(self.root, _save_part, self.root / "ranks", self.weights))

    def ranks_load(self) -> float:
        """torch_dist by several ranks: each verifies its share of the files and reads a part of each weight."""
        seconds = max(_on_ranks(self.root, _load_part, self.root / "ranks", self.targets))
        self._check()
        return seconds

    def _copy(self, loaded: Weights) -> None:
        for name, weight in loaded.items():
            self.targets[name].copy_(weight)

    def _loaded(self, started: float) -> float:
        seconds = time.perf_counter() - started
        self._check()
        return seconds

    def _check(self) -> None:
        """The targets are the weights; clear them for the next way."""
        for name, weight in self.weights.items():
            if not torch.equal(weight, self.targets[name]):
                raise SystemExit(f"{name} came back changed")
            self.targets[name].zero_()


def _on_ranks(
    root: Path, body: Callable[[Path, Weights], None], directory: Path, weights: Weights
) -> list[float]:
    """Seconds that `body` takes on each of RANKS forked processes, which hold the weights already."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    store = root / f"store{time.monotonic_ns()}"
    ranks = [
        context.Process(target=_rank, args=(rank, store, body, directory, weights, results))
        for rank in range(RANKS)
    ]
    for process in ranks:
        process.start()
    seconds = [results.get(timeout=300) for _ in ranks]
    for process in ranks:
        process.join()
    return seconds


def _rank(rank: int, store: Path, body: Any, directory: Path, weights: Weights, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(store), RANKS), rank=rank, world_size=RANKS)
    dist.barrier()
    started = time.perf_counter()
    body(directory, weights)
    results.put(time.perf_counter() - started)
    dist.barrier()


def _save_part(directory: Path, weights: Weights) -> None:
    dist_checkpointing.save(pieces(weights, RANKS, dist.get_rank()), str(directory))


def _load_part(directory: Path, weights: Weights) -> None:
    durable.verify(directory, sorted(durable.read_manifest(directory))[dist.get_rank() :: RANKS])
    dist_checkpointing.load(pieces(weights, RANKS, dist.get_rank()), str(directory))


def measure(root: Path, megabytes: int, repeats: int) -> dict[str, Any]:
    """Best seconds of every way, and of an asynchronous save the part that training waits."""
    ways = Ways(root, megabytes)
    saves: dict[str, Callable[[], float]] = {
        PLAIN_SAVE: ways.plain_save,
        "torch format": ways.torch_save,
        "torch_dist": ways.dist_save,
        f"torch_dist, {RANKS} ranks": ways.ranks_save,
    }
    loads: dict[str, Callable[[], float]] = {
        PLAIN_LOAD: ways.plain_load,
        "torch format": ways.torch_load,
        "torch_dist, as saved": lambda: ways.dist_load(1, 1),
        "torch_dist, whole tensors in 4 parts": lambda: ways.dist_load(1, 4),
        "torch_dist, 4 parts into whole tensors": lambda: ways.dist_load(4, 1),
        f"torch_dist, {RANKS} ranks": ways.ranks_load,
    }
    blocked: list[tuple[float, float]] = []
    found: dict[str, dict[str, list[float]]] = {"save": {}, "load": {}}
    for _ in range(repeats):
        for name, way in saves.items():
            found["save"].setdefault(name, []).append(way())
        blocked.append(ways.async_save())
    ways.dist_save(4)
    for _ in range(repeats):
        for name, way in loads.items():
            found["load"].setdefault(name, []).append(way())
    synchronous = min(found["save"]["torch_dist"])
    later = min(blocked[1:] or blocked)
    return {
        "mebibytes": round(ways.megabytes),
        "seconds": {
            kind: {name: round(min(seconds), 4) for name, seconds in ways_of_kind.items()}
            for kind, ways_of_kind in found.items()
        },
        "asynchronous": {
            "synchronous_seconds": round(synchronous, 4),
            "blocked_seconds_first": round(blocked[0][0], 4),
            "blocked_seconds_later": round(later[0], 4),
            "durable_after_seconds": round(later[1], 4),
        },
    }


def measure_memory(root: Path, gigabytes: float) -> dict[str, dict[str, int]]:
    """Anonymous memory beyond the model, in MiB, of saving and loading a model of that size in each format."""
    width = round((gigabytes * 1e9 / 8) ** 0.5)
    results = {}
    for ckpt_format in ("torch", "torch_dist"):
        directory = root / f"memory_{ckpt_format}"
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "tests.unit.checkpointing.measured_load",
                str(directory),
                ckpt_format,
                str(width),
            ],
            check=True,
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        shutil.rmtree(directory)
        model, saving, loading = map(int, re.findall(r"-?\d+", done.stdout.splitlines()[-1]))
        results[ckpt_format] = {"model": model, "saving": saving, "loading": loading}
    return results


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = [
        f"{record['mebibytes']} MiB in {LAYERS} tensors, {record['machine']}, PyTorch {record['torch']}: "
        f"`{record['command']}`",
    ]
    for kind, plain in (("save", PLAIN_SAVE), ("load", PLAIN_LOAD)):
        seconds = record["seconds"][kind]
        lines += ["", f"| {kind} | MB/s | speed of plain |", "|---|---|---|"]
        lines += [
            f"| {name} | {record['mebibytes'] * 2**20 / 1e6 / taken:.0f} | {seconds[plain] / taken:.2f} |"
            for name, taken in seconds.items()
        ]
    times = record["asynchronous"]
    share = times["blocked_seconds_later"] / times["synchronous_seconds"]
    lines += [
        "",
        f"`--async-save`: training waits {times['blocked_seconds_first']:.3f} s at the first save and "
        f"{times['blocked_seconds_later']:.3f} s at later ones, against {times['synchronous_seconds']:.3f} s for a "
        f"synchronous save ({share:.0%}); the files are on the disk after {times['durable_after_seconds']:.3f} s.",
    ]
    for ckpt_format, memory in record.get("memory_mebibytes", {}).items():
        lines += [
            "",
            f"A model of {memory['model']} MiB in the {ckpt_format} format: beyond the model itself, saving took "
            f"{memory['saving']} and loading {memory['loading']} MiB of memory.",
        ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--memory-gigabytes", type=float, help="also measure the memory for a model of this size"
    )
    parser.add_argument("--directory", help="where to write; a temporary directory by default")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--docs", type=Path, help="put the table between this file's `measured` marks")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir=options.directory))
    chosen = [f"--{name.replace('_', '-')} {getattr(options, name)}" for name in ("megabytes", "repeats")]
    if options.memory_gigabytes:
        chosen.append(f"--memory-gigabytes {options.memory_gigabytes:g}")
    record: dict[str, Any] = {
        "command": f"python benchmarks/checkpoints.py {' '.join(chosen)}",
        "machine": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.system()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_average": [round(load, 1) for load in os.getloadavg()],
    }
    try:
        record.update(measure(root, options.megabytes, options.repeats))
        if options.memory_gigabytes:
            record["memory_mebibytes"] = measure_memory(root, options.memory_gigabytes)
    finally:
        shutil.rmtree(root)
    print(table(record))
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.docs:
        before, mark, rest = options.docs.read_text().partition("<!-- measured -->\n")
        _, end, after = rest.partition("<!-- /measured -->")
        if not mark or not end:
            raise SystemExit(f"{options.docs} has no lines <!-- measured --> and <!-- /measured -->")
        options.docs.write_text(f"{before}{mark}{table(record)}\n{end}{after}")


if __name__ == "__main__":
    main()
