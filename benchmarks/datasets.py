"""How long dataset indices take to build and samples to read; synthetic files, one process.

    python benchmarks/datasets.py                # all, at sizes of a real corpus
    python benchmarks/datasets.py --only loader  # one of: indices large blend files loader

`indices` compares with the same walk in plain Python on a part of the data, in the same run, and with what v0.9's
compiled helper took (measured once on such a machine). `loader` reads samples as training does and, given the time of a
training step, says what share of it waiting for data would be. `--json FILE` keeps the numbers with what they were
measured with.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy
import torch
from surroundings import surroundings

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.index_builder import blend_datasets, build_sample_idx
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.training.data_samplers import build_data_loader

SEQUENCE = 2048
V09_SECONDS = {1: "0.13-0.23", 3: "0.31-0.56"}  # by epochs
MIB = 1 << 20
results: list[dict[str, Any]] = []


def report(what: str, **numbers: float | str) -> None:
    """Print one result and keep it, with the load that other programs put on the machine."""
    load = round(os.getloadavg()[0], 1)
    listed = ", ".join(
        f"{name.replace('_', ' ')} {value if isinstance(value, str) else f'{value:,}'}"
        for name, value in numbers.items()
    )
    print(f"{what}: {listed} (load average {load})", flush=True)
    results.append({"what": what, **numbers, "load average": load})


class Tokenizer:
    """As much of a tokenizer as a dataset asks for."""

    unique_identifiers = {"class": "Benchmark"}
    vocab_size = 50257
    eod = 50256


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result and the seconds it took."""
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def peak_bytes() -> int:
    """The most memory this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def walk_in_python(lengths: list[int], samples: int) -> list[tuple[int, int]]:
    """The sample index one sample at a time."""
    rows, document, offset = [(0, 0)], 0, 0
    for _ in range(samples):
        remaining = SEQUENCE + 1
        while remaining > lengths[document] - offset:
            remaining -= lengths[document] - offset
            document, offset = document + 1, 0
        offset += remaining - 1
        rows.append((document, offset))
    return rows


def write_corpus(prefix: str, documents: int, mean_tokens: int, seed: int = 0) -> int:
    """A prefix of random tokens in documents of random lengths; its number of tokens."""
    random = numpy.random.default_rng(seed)
    builder = IndexedDatasetBuilder(prefix + ".bin", numpy.uint16)
    total = 0
    for first in range(0, documents, 100_000):
        lengths = random.integers(1, 2 * mean_tokens, min(100_000, documents - first), dtype=numpy.int32)
        tokens = random.integers(0, 50256, int(lengths.sum()), dtype=numpy.uint16)
        builder.add_documents(tokens, lengths, numpy.ones(lengths.size, numpy.int64))
        total += tokens.size
    builder.finalize(prefix + ".idx")
    return total


def config(prefixes: list[str], cache: str, weights: list[float] | None = None) -> GPTDatasetConfig:
    """A GPT configuration that reads only training data."""
    return GPTDatasetConfig(
        random_seed=1234, sequence_length=SEQUENCE, blend=(prefixes, weights), split="1", path_to_cache=cache,
        tokenizer=Tokenizer(), reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        create_attention_mask=False,
    )  # fmt: skip


def bench_indices(directory: str) -> None:
    """All three indices of 2 M documents with 1 G tokens, for one epoch and for three."""
    lengths = numpy.random.default_rng(0).integers(1, 1000, 2_000_000, dtype=numpy.int32)
    tokens = int(lengths.sum(dtype=numpy.int64))
    part = 100_000
    samples = (int(lengths[:part].sum()) - 1) // SEQUENCE
    reference, in_python = timed(lambda: walk_in_python(lengths[:part].tolist(), samples))
    order = numpy.arange(part, dtype=numpy.int32)
    ours, in_numpy = timed(lambda: build_sample_idx(lengths, order, SEQUENCE, 1, int(lengths[:part].sum())))
    assert ours.tolist() == [list(row) for row in reference], "the two walks differ"
    report(
        f"sample index of {part:,} documents",
        plain_python_s=round(in_python, 3),
        ours_s=round(in_numpy, 4),
        times=round(in_python / in_numpy),
    )
    for epochs in (1, 3):

        def build(epochs: int = epochs) -> int:
            random = numpy.random.RandomState(1234)
            documents = numpy.tile(numpy.arange(lengths.size, dtype=numpy.int32), epochs)
            random.shuffle(documents)
            index = build_sample_idx(lengths, documents, SEQUENCE, epochs, tokens)
            order = numpy.arange(len(index) - 1, dtype=numpy.uint32)
            random.shuffle(order)
            return order.size

        count, seconds = min((timed(build) for _ in range(3)), key=lambda result: result[1])
        report(
            f"all indices of {lengths.size:,} documents, {tokens:,} tokens, {epochs} epoch(s)",
            samples=count,
            s=round(seconds, 2),
            v09_s=V09_SECONDS[epochs],
        )


def bench_large(directory: str) -> None:
    """The sample index of 50 M samples."""
    lengths = numpy.random.default_rng(0).integers(1, 2 * 2048, 50_000_000, dtype=numpy.int32)
    documents = numpy.arange(lengths.size, dtype=numpy.int32)
    tokens = int(lengths.sum(dtype=numpy.int64))
    before = peak_bytes()
    index, seconds = timed(lambda: build_sample_idx(lengths, documents, SEQUENCE, 1, tokens))
    grown, size = (peak_bytes() - before) / MIB, index.nbytes / MIB
    report(
        f"sample index of {len(index) - 1:,} samples",
        s=round(seconds, 2),
        MiB_more=round(grown),
        MiB_of_the_index=round(size),
    )


def bench_blend(directory: str) -> None:
    """Blend indices of 10 M samples for few and for many datasets."""
    for datasets in (3, 10, 100):
        weights = numpy.random.default_rng(0).random(datasets) + 0.01
        _, seconds = timed(lambda w=weights: blend_datasets(w / w.sum(), 10_000_000))
        report(f"blend of {datasets} datasets, 10,000,000 samples", s=round(seconds, 2))


def bench_files(directory: str) -> None:
    """A blend of 2,500 files: opened, its indices built, and opened with its indices from the cache."""
    prefixes = [os.path.join(directory, f"part{i:04d}") for i in range(2500)]
    for i, prefix in enumerate(prefixes):
        write_corpus(prefix, 40, 300, seed=i)
    weights = [1.0] * len(prefixes)
    _, seconds = timed(lambda: [IndexedDataset(prefix) for prefix in prefixes])
    report(f"{len(prefixes):,} files opened one after the other", s=round(seconds, 1))

    def build() -> Any:
        blend = config(prefixes, os.path.join(directory, "cache"), weights)
        return BlendedMegatronDatasetBuilder(GPTDataset, (10_000, 0, 0), lambda: True, blend).build()[0]

    for what in ("opened and its indices built", "opened with its indices"):
        dataset, seconds = timed(build)
        report(f"blend of {len(prefixes):,} files {what}", s=round(seconds, 1), samples=len(dataset))


def wait_s(batches: Iterator[Any], after_ms: float = 0.0) -> float:
    """Seconds that the next batch takes, asked for after a step of so many milliseconds."""
    time.sleep(after_ms / 1000)
    return timed(lambda: next(batches))[1]


def bench_loader(directory: str, step_ms: float) -> None:
    """Tokens per second of one process, without and with worker processes, and the wait it means for a step."""
    prefix = os.path.join(directory, "loader")
    tokens = write_corpus(prefix, 300_000, 500)
    settings = config([prefix], os.path.join(directory, "cache"))
    dataset = BlendedMegatronDatasetBuilder(GPTDataset, (20_000, 0, 0), lambda: True, settings).build()[0]
    for workers in (0, 2):
        descriptor = os.open(prefix + ".bin", os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # start cold where the system lets us
        os.close(descriptor)
        loader = build_data_loader(
            dataset, 0, dataloader_type="single", micro_batch_size=4, num_workers=workers, data_sharding=True,
            data_parallel_rank=0, data_parallel_size=1,
        )  # fmt: skip
        batches = iter(loader)
        next(batches)
        rate = 4 * SEQUENCE * 500 / sum(wait_s(batches) for _ in range(500))
        waits = [1000 * wait_s(batches, after_ms=step_ms) for _ in range(50)]
        share = numpy.mean(waits) / (numpy.mean(waits) + step_ms)
        report(
            f"loader over {tokens:,} tokens, {workers} worker processes, steps of {step_ms:.0f} ms",
            M_tokens_per_s=round(rate / 1e6, 1),
            percent_of_a_step_waiting=round(100 * share, 2),
        )


def main() -> None:
    """Run the chosen parts in a temporary directory."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=["indices", "large", "blend", "files", "loader"])
    parser.add_argument(
        "--step-ms", type=float, default=100.0, help="Time of a training step, for the loader"
    )
    parser.add_argument("--json", default=None, help="Write the numbers to this file")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    parts = {
        "indices": bench_indices, "large": bench_large, "blend": bench_blend, "files": bench_files,
        "loader": lambda directory: bench_loader(directory, args.step_ms),
    }  # fmt: skip
    for name, part in parts.items():
        if args.only is None or name in args.only:
            with tempfile.TemporaryDirectory() as directory:
                part(directory)
    if args.json is not None:
        record = {**surroundings(["numpy", "torch"]), "results": results}
        with open(args.json, "w", encoding="utf-8") as file:
            file.write(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
