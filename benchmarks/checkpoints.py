#!/usr/bin/env python3
"""Checkpoint speed beside plain torch.save and torch.load of the same bytes.

Every figure is the best of --repeats; files are read from the page cache, and both sides flush what they write to
the disk and copy what they read into existing parameters.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor, durable
from megatron.core.dist_checkpointing.safe_load import load_file
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

LAYERS = 8


def best(repeats: int, work: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> float:
    """Shortest time of `work` in seconds."""
    times = []
    for _ in range(repeats):
        before()
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def pieces(weights: dict[str, torch.Tensor], parts: int) -> dict[str, Any]:
    """Each weight as `parts` row blocks of one global tensor."""
    return {
        f"{name}.{part}": ShardedTensor.from_rank_offsets(name, block, (0, part, parts))
        for name, weight in weights.items()
        for part, block in enumerate(weight.chunk(parts))
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", help="where to write; a temporary directory by default")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir=options.directory))
    side = int((options.megabytes * 2**20 / 4 / LAYERS / 4) ** 0.5) // 8 * 8
    weights = {f"layer{i}": torch.randn(4 * side, side) for i in range(LAYERS)}
    targets = {name: torch.empty_like(weight) for name, weight in weights.items()}
    megabytes = sum(w.numel() * 4 for w in weights.values()) / 2**20
    print(f"{megabytes:.0f} MiB in {LAYERS} tensors, {torch.get_num_threads()} threads, {root}")

    def show(name: str, seconds: float, reference: float) -> None:
        print(f"{name:58} {megabytes / seconds:8.0f} MB/s   {reference / seconds:5.2f} x plain")

    def plain_save() -> None:
        torch.save(weights, root / "plain.pt")
        durable.fsync_file(root / "plain.pt")

    def plain_load() -> None:
        for name, weight in torch.load(root / "plain.pt", weights_only=True).items():
            targets[name].copy_(weight)

    def own_save() -> None:
        staged = durable.stage(root / "iter_0000001")
        checksum = durable.save_file(weights, staged / "model_optim_rng.pt")
        durable.write_manifest(staged, {"model_optim_rng.pt": checksum})
        durable.publish(root / "iter_0000001")

    def own_load() -> None:
        durable.verify(root / "iter_0000001")
        for name, weight in load_file(root / "iter_0000001" / "model_optim_rng.pt").items():
            targets[name].copy_(weight)

    def gone() -> None:
        # A training run saves under a new name; removing the previous round's files is not part of a save.
        (root / "plain.pt").unlink(missing_ok=True)
        shutil.rmtree(root / "iter_0000001", ignore_errors=True)

    def fresh() -> None:
        shutil.rmtree(root / "dist", ignore_errors=True)
        (root / "dist").mkdir()

    def dist_load(parts: int) -> None:
        durable.verify(root / "dist")
        dist_checkpointing.load(pieces(targets, parts), str(root / "dist"))

    try:
        save = best(options.repeats, plain_save, gone)
        show("torch.save, fsync", save, save)
        show(
            "torch format: staged, checksummed, fsync, published", best(options.repeats, own_save, gone), save
        )
        dist_save = best(
            options.repeats, lambda: dist_checkpointing.save(pieces(weights, 1), str(root / "dist")), fresh
        )
        show("torch_dist, synchronous", dist_save, save)
        plain_save()
        load = best(options.repeats, plain_load)
        show("torch.load and copy", load, load)
        own_save()
        show("torch format: verify, map, copy", best(options.repeats, own_load), load)
        show("torch_dist, same layout, verified", best(options.repeats, lambda: dist_load(1)), load)
        show("torch_dist, read as 4 parts per tensor", best(options.repeats, lambda: dist_load(4)), load)
        fresh()
        dist_checkpointing.save(pieces(weights, 4), str(root / "dist"))
        show("torch_dist, 4 parts read as whole tensors", best(options.repeats, lambda: dist_load(1)), load)
        for name, weight in weights.items():
            if not torch.equal(weight, targets[name]):
                raise SystemExit(f"{name} came back changed")
        fresh()
        queue = AsyncCallsQueue()
        started = time.perf_counter()
        request = dist_checkpointing.save(pieces(weights, 1), str(root / "dist"), async_sharded_save=True)
        assert request is not None, "an asynchronous save returns its request"
        queue.schedule_async_request(request)
        blocked = time.perf_counter() - started
        queue.close()
        whole = time.perf_counter() - started
        print(
            f"torch_dist, asynchronous: training blocked {blocked:.3f} s of {whole:.3f} s "
            f"({blocked / dist_save:.0%} of a synchronous save)"
        )
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    main()
