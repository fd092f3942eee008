"""tools/preprocess_data.py: read, encode in worker processes, write in input order.

One process reads positions and writes results; workers read, parse and encode. Only a bounded number of chunks is on
the way at any time, so memory does not depend on the size of the input.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from typing import Any

import numpy

from megatron.core.datasets.files import write_atomically
from megatron.core.datasets.token_types import DType
from megatron.core.errors import DataError, FlagError, MegatronError
from megatron.training.preprocessing.arguments import parse
from megatron.training.preprocessing.encode import EncodedChunk, Encoder, EncoderSettings
from megatron.training.preprocessing.inputs import (
    STANDARD_INPUT,
    WHOLE,
    Chunk,
    count_lines,
    find_inputs,
    input_bytes,
    lines_before,
    read_chunks,
)
from megatron.training.preprocessing.journal import Progress
from megatron.training.preprocessing.output import RunOutput, merge
from megatron.training.preprocessing.progress import ProgressReport

CHUNKS_PER_WORKER = 4
REPORTED_SKIPS = 20
_encoder: Encoder | None = None  # of a worker process


def _start_worker(settings: EncoderSettings, inherited: Encoder | None) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are the parallelism here
    _encoder = Encoder(settings) if inherited is None else inherited


def _encode(chunk: Chunk) -> EncodedChunk:
    assert _encoder is not None, "the pool starts every worker with _start_worker"
    return _encoder.encode(chunk)


class Run:
    """One invocation of the tool."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.shard = args.shard or WHOLE
        self.paths = find_inputs(args.input)
        splitter = (args.sentence_splitter, args.lang, args.keep_newlines) if args.split_sentences else None
        settings = EncoderSettings(args, args.json_keys, numpy.dtype(numpy.int32), splitter=splitter)
        self.encoder = Encoder(settings)
        self.tokenizer = self.encoder.tokenizer
        self.settings = EncoderSettings(
            tokenizer=args,
            keys=args.json_keys,
            dtype=numpy.dtype(DType.optimal_dtype(self.tokenizer.vocab_size)),
            append_eod=args.append_eod,
            stop_at_bad=args.on_error == "stop",
            splitter=splitter,
        )
        self.encoder = _with_eod_checked(self.settings, self.encoder)
        level = "sentence" if args.split_sentences else "document"
        self.prefix = args.output_prefix
        if args.shard is not None:
            self.prefix = shard_prefix(self.prefix, self.shard.index, self.shard.count)
        self.suffixes = [f"{key}_{level}" for key in args.json_keys]
        self.parts = (
            [self.prefix] if args.partitions == 1 else [f"{self.prefix}_{i}" for i in range(args.partitions)]
        )
        self.prefixes = [f"{part}_{suffix}" for part in self.parts for suffix in self.suffixes]
        self._completion = f"{self.prefix}.preprocess-done"  # what finished, for --resume to see
        self._line_position: dict[str, tuple[int, int]] = {}

    def execute(self) -> None:
        """Encode everything, then join partitions."""
        start = time.time()
        if self.args.resume and self._is_complete():
            print(f"{self.prefix}: complete already, from this input and these options")
            return
        if os.path.exists(self._completion):
            os.unlink(self._completion)
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        inherited = self.encoder if context.get_start_method() == "fork" else None
        with ProcessPoolExecutor(
            self.args.workers, context, initializer=_start_worker, initargs=(self.settings, inherited)
        ) as pool:
            try:
                self._encode_all(pool, start)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if self.args.partitions > 1:
            for suffix in self.suffixes:
                parts = [f"{part}_{suffix}" for part in self.parts]
                merge(parts, f"{self.prefix}_{suffix}", self.settings.dtype)
        if self.args.resume:
            identity = json.dumps(self._identity(), sort_keys=True).encode("utf-8")
            write_atomically(self._completion, lambda file: file.write(identity))

    def merge_shards(self) -> None:
        """Join the shards that other invocations wrote."""
        count = self.args.merge_shards
        for suffix in self.suffixes:
            parts = [f"{shard_prefix(self.prefix, i, count)}_{suffix}" for i in range(count)]
            merge(parts, f"{self.prefix}_{suffix}", self.settings.dtype)

    def _encode_all(self, pool: ProcessPoolExecutor, start: float) -> None:
        output = RunOutput(
            self.prefixes, self.settings.dtype, f"{self.prefix}.preprocess-journal", self._identity()
        )
        if self.args.resume and output.can_restore():
            output.restore()
            print(f"Resuming behind line {output.progress.lines} of the input")
        else:
            output.begin()
        print(f"Time to startup: {time.time() - start}", flush=True)
        report = ProgressReport(self.args.log_interval, input_bytes(self.paths))
        committed = time.monotonic()
        opened = -1
        block = self._partition_lines()
        with closing(report):
            try:
                for chunk, encoded in self._results(pool, output.progress):
                    if chunk.file != opened:
                        opened = chunk.file
                        print(f"Opening {chunk.path}", flush=True)
                    before = output.progress
                    self._report_bad(chunk, encoded, before.skipped)
                    progress = Progress(
                        file=chunk.file,
                        offset=chunk.end,
                        lines=before.lines + encoded.lines,
                        characters=before.characters + encoded.characters,
                        skipped=before.skipped + len(encoded.bad),
                    )
                    output.add(self._distribute(encoded, before.lines, block), progress)
                    report.update(
                        encoded.lines - len(encoded.bad), encoded.characters, self._bytes_done(chunk)
                    )
                    if time.monotonic() - committed > output.COMMIT_SECONDS:
                        output.commit()
                        committed = time.monotonic()
            except BaseException:
                output.commit()
                raise
        output.finish()
        if output.progress.skipped:
            print(
                f"Skipped {output.progress.skipped} malformed lines of {output.progress.lines}",
                file=sys.stderr,
            )

    def _results(self, pool: ProcessPoolExecutor, start: Progress) -> Iterator[tuple[Chunk, EncodedChunk]]:
        """Every chunk with its result, in input order; at most a few per worker are under way."""
        pending: deque[tuple[Chunk, Future[EncodedChunk]]] = deque()
        chunks = read_chunks(
            self.paths, keys=self.args.json_keys, shard=self.shard, start=(start.file, start.offset)
        )
        try:
            for chunk in chunks:
                pending.append((chunk, pool.submit(_encode, chunk)))
                if len(pending) > CHUNKS_PER_WORKER * self.args.workers:
                    oldest, future = pending.popleft()
                    yield oldest, future.result()
            while pending:
                oldest, future = pending.popleft()
                yield oldest, future.result()
        except BrokenProcessPool as error:
            raise DataError(
                self.args.input,
                "a worker process died, most likely because the machine ran out of memory",
                "lower --workers and continue with --resume",
            ) from error

    def _partition_lines(self) -> int | None:
        """Lines per partition when partitions are contiguous; None when they take turns."""
        if self.args.partitions == 1 or not self.args.keep_sequential_samples:
            return None
        total = sum(map(count_lines, read_chunks(self.paths, keys=self.args.json_keys)))
        return max(1, -(-total // self.args.partitions))

    def _distribute(self, encoded: EncodedChunk, first_line: int, block: int | None) -> list[Any]:
        """The documents of a chunk for every token file: partition by partition, key by key."""
        if self.args.partitions == 1:
            return list(encoded.keys)
        bad = numpy.array([line for line, _ in encoded.bad], dtype=numpy.int64)
        lines = first_line + numpy.delete(numpy.arange(encoded.lines), bad)
        partition = lines % self.args.partitions if block is None else lines // block
        return [key.select(partition == i) for i in range(self.args.partitions) for key in encoded.keys]

    def _report_bad(self, chunk: Chunk, encoded: EncodedChunk, skipped: int) -> None:
        """Stop at the first malformed line, or name it and go on."""
        if not encoded.bad:
            return
        first = self._first_line(chunk)
        for i, (line, reason) in enumerate(encoded.bad):
            place = f"{'standard input' if chunk.path == STANDARD_INPUT else chunk.path}:{first + line + 1}"
            if self.settings.stop_at_bad:
                raise DataError(
                    place, reason, "repair or remove the line, or add --on-error skip to leave such lines out"
                )
            if skipped + i < REPORTED_SKIPS:
                print(f"{place}: skipped: {reason}", file=sys.stderr)
            elif skipped + i == REPORTED_SKIPS:
                print("further skipped lines are only counted", file=sys.stderr)

    def _first_line(self, chunk: Chunk) -> int:
        if chunk.first_line is not None:
            return chunk.first_line
        known = self._line_position.get(chunk.path, (0, 0))
        lines = lines_before(chunk.path, chunk.offset, known)
        self._line_position[chunk.path] = (chunk.offset, lines)
        return lines

    def _bytes_done(self, chunk: Chunk) -> int:
        if not os.path.isfile(chunk.path):
            return 0
        earlier = input_bytes(self.paths[: chunk.file]) or 0
        return earlier + (chunk.end if chunk.data is None and chunk.batch is None else 0)

    def _is_complete(self) -> bool:
        """Whether a run with --resume over this input with these options has finished, and its files are there."""
        targets = [f"{part}_{suffix}.idx" for part in {self.prefix, *self.parts} for suffix in self.suffixes]
        if not all(map(os.path.exists, [self._completion, *targets])):
            return False
        with open(self._completion, encoding="utf-8") as file:
            return file.read() == json.dumps(self._identity(), sort_keys=True)

    def _identity(self) -> dict[str, Any]:
        """What must be the same for an interrupted run to be continued."""
        files = [(path, *_size_and_time(path)) for path in self.paths]
        return {
            "--input": hashlib.sha256(repr(files).encode("utf-8")).hexdigest(),
            "--json-keys": self.args.json_keys,
            "--split-sentences": list(self.settings.splitter or ()),
            "--append-eod": self.args.append_eod,
            "--partitions": [self.args.partitions, self.args.keep_sequential_samples],
            "--shard": [self.shard.index, self.shard.count],
            "the tokenizer": self._tokenizer_digest(),
        }

    def _tokenizer_digest(self) -> str:
        digest = hashlib.sha256(self.tokenizer.unique_description.encode("utf-8"))
        for path in self.tokenizer.unique_identifiers["tokenizer_path"]:
            if path is not None and os.path.isfile(path):
                with open(path, "rb") as file:
                    digest.update(file.read())
        return digest.hexdigest()


def shard_prefix(prefix: str, index: int, count: int) -> str:
    """Output prefix of one shard; names sort in the order of shards."""
    return f"{prefix}_shard_{index:05d}_of_{count:05d}"


def _size_and_time(path: str) -> tuple[int, int]:
    if path == STANDARD_INPUT:
        return 0, 0
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _with_eod_checked(settings: EncoderSettings, built: Encoder) -> Encoder:
    """The encoder for `settings`, around the tokenizer that was built to learn its vocabulary size."""
    try:
        return Encoder(settings, built.tokenizer)
    except NotImplementedError as error:
        raise FlagError(
            "--append-eod",
            f"the {settings.tokenizer.tokenizer_type} has no end-of-document token",
            "drop the flag",
        ) from error


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; the exit status."""
    try:
        args = parse(arguments)
        if "bert" in args.tokenizer_type.lower() and not args.split_sentences:
            print("Are you sure you don't want to split sentences?")
        run = Run(args)
        report = getattr(run.tokenizer, "engine_report", None)
        if report is not None:
            print(f"BPE engine: {report}")
        if args.merge_shards is not None:
            run.merge_shards()
        else:
            run.execute()
    except MegatronError as error:
        print(f"preprocess_data.py: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("preprocess_data.py: interrupted; continue with --resume", file=sys.stderr)
        return 130
    return 0
