"""The token files of a run: written under temporary names, replaced at the end, restorable after an interruption."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy

from megatron.core.datasets.files import map_readonly
from megatron.core.datasets.indexed_dataset_builder import IndexedDatasetBuilder
from megatron.core.datasets.token_files import get_bin_path, get_idx_path
from megatron.core.errors import DataError
from megatron.training.preprocessing.encode import Encoded
from megatron.training.preprocessing.journal import JournalWriter, Progress, Record, read_journal

PARTIAL = ".partial"
INTERRUPTED = ".interrupted"
COPY_TOKENS = 1 << 22


class TokenFile:
    """One `prefix.bin` and `prefix.idx` in the making."""

    def __init__(self, prefix: str, dtype: numpy.dtype) -> None:
        os.makedirs(os.path.dirname(os.path.abspath(prefix)), exist_ok=True)
        self.prefix, self.dtype = prefix, dtype
        self._builder = IndexedDatasetBuilder(self.partial_bin, dtype)

    @property
    def partial_bin(self) -> str:
        """Where tokens are written until the file is complete."""
        return get_bin_path(self.prefix) + PARTIAL

    def add(self, documents: Encoded) -> None:
        """Append documents."""
        self._builder.add_documents(documents.tokens, documents.lengths, documents.sequences)

    def add_file(self, prefix: str) -> None:
        """Append all of another token file."""
        self._builder.add_index(prefix)

    def finish(self) -> None:
        """Put both files in place; the index, without which readers see nothing, last."""
        partial_idx = get_idx_path(self.prefix) + PARTIAL
        self._builder.finalize(partial_idx)
        os.replace(self.partial_bin, get_bin_path(self.prefix))
        os.replace(partial_idx, get_idx_path(self.prefix))


class RunOutput:
    """All token files of a run and the journal that makes it resumable."""

    COMMIT_SECONDS = 10.0

    def __init__(
        self, prefixes: list[str], dtype: numpy.dtype, journal_path: str, identity: dict[str, Any]
    ) -> None:
        self.prefixes, self.dtype = prefixes, dtype
        self.journal_path, self.identity = journal_path, identity
        self.progress = Progress()

    def begin(self) -> None:
        """Begin with empty files and forget any interrupted run."""
        for path in reversed(self._set_aside()):
            if os.path.exists(path):
                os.unlink(path)
        self._start()

    def _start(self) -> None:
        self.files = [TokenFile(prefix, self.dtype) for prefix in self.prefixes]
        self.journal = JournalWriter(self.journal_path, self.identity)

    def can_restore(self) -> bool:
        """Whether an interrupted run left anything."""
        return os.path.exists(self.journal_path) or os.path.exists(self.journal_path + INTERRUPTED)

    def restore(self) -> None:
        """Begin with what an interrupted run wrote, and set `progress` to where it stopped.

        Its files are set aside, then copied as far as they are complete, so a restore can itself be interrupted.
        """
        aside = self._set_aside()
        if not os.path.exists(self.journal_path + INTERRUPTED):
            for path in aside:
                if os.path.exists(path.removesuffix(INTERRUPTED)):
                    os.replace(path.removesuffix(INTERRUPTED), path)
        records = read_journal(self.journal_path + INTERRUPTED, self.identity)
        first = next(records, None)  # checks the identity before anything is overwritten
        self._start()
        if first is not None:
            self._copy(aside[:-1], first, records)
        self.commit()
        for path in reversed(aside):  # the journal first: without it the others mean nothing
            if os.path.exists(path):
                os.unlink(path)

    def _set_aside(self) -> list[str]:
        """Where the files of an interrupted run wait while they are restored; the journal last."""
        tokens = [get_bin_path(prefix) + PARTIAL for prefix in self.prefixes]
        return [path + INTERRUPTED for path in [*tokens, self.journal_path]]

    def _copy(self, paths: list[str], first: Record, records: Iterator[Record]) -> None:
        size = self.dtype.itemsize
        # A crash may have cut the last token in two; the view needs whole ones.
        sources = [
            content[: content.size // size * size].view(self.dtype) for content in map(map_readonly, paths)
        ]
        starts = [0] * len(sources)
        record: Record | None = first
        while record is not None:
            ends = [start + count for start, count in zip(starts, record.tokens)]
            if any(end > len(source) for end, source in zip(ends, sources)):
                return  # the journal reached the disk, these tokens did not
            documents = [
                Encoded(numpy.array(source[start:end], self.dtype), lengths, sequences)
                for source, start, end, lengths, sequences in zip(
                    sources, starts, ends, record.lengths, record.sequences
                )
            ]
            self.add(documents, record.progress)
            starts = ends
            record = next(records, None)

    def add(self, documents: list[Encoded], progress: Progress) -> None:
        """Append one chunk's documents, one entry per file; `progress` is the state behind that chunk."""
        for file, part in zip(self.files, documents):
            file.add(part)
        self.progress = progress
        self.journal.add(
            Record(
                progress,
                [part.tokens.size for part in documents],
                [part.lengths for part in documents],
                [part.sequences for part in documents],
            )
        )

    def commit(self) -> None:
        """Make what was added so far survive a crash of the machine, buffers of the token files aside."""
        for file in self.files:
            descriptor = os.open(file.partial_bin, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        self.journal.commit()

    def finish(self) -> None:
        """Complete the files and drop the journal."""
        for file in self.files:
            file.finish()
        self.journal.close()
        os.unlink(self.journal_path)


def merge(prefixes: list[str], target: str, dtype: numpy.dtype) -> None:
    """Join token files in order. DataError when one is missing."""
    for prefix in prefixes:
        if not (os.path.exists(get_idx_path(prefix)) and os.path.exists(get_bin_path(prefix))):
            raise DataError(
                prefix, "this part is missing or unfinished", "run it (again, with --resume) and then merge"
            )
    file = TokenFile(target, dtype)
    for prefix in prefixes:
        file.add_file(prefix)
    file.finish()
