"""Interrupted runs, shards and partitions end with the bytes of one undisturbed run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron.training.preprocessing import inputs, output
from megatron.training.preprocessing.journal import JournalWriter, Progress, Record, read_journal
from megatron.training.preprocessing.output import INTERRUPTED, PARTIAL
from tests.unit.preprocess.runs import (
    NULL,
    digests,
    documents_of,
    leftovers,
    number_documents,
    run,
    write_jsonl,
)

KEYS = ["--json-keys", "text", "other"]


class Killed(BaseException):
    """Stands for a signal that no handler catches."""


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two files that the small chunks cut into some 60 pieces."""
    monkeypatch.setitem(inputs.read_chunks.__kwdefaults__, "chunk_bytes", 500)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, start in (("a.jsonl", 0), ("b.jsonl", 300)):
        write_jsonl(folder / name, [document | {"other": "1 2"} for document in number_documents(300, start)])
    return folder


@pytest.fixture
def whole(corpus: Path, tmp_path: Path) -> list[str]:
    run(
        "--input", corpus, *NULL, *KEYS, "--append-eod", "--workers", 1, "--output-prefix", tmp_path / "whole"
    )
    return digests(tmp_path / "whole_text_document") + digests(tmp_path / "whole_other_document")


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let the next run die when it has written that many chunks."""
    add = output.RunOutput.add
    seen = 0

    def dying(self: output.RunOutput, *arguments: object) -> None:
        nonlocal seen
        seen += 1
        if seen > after:
            monkeypatch.setattr(output.RunOutput, "add", add)
            raise Killed
        add(self, *arguments)

    monkeypatch.setattr(output.RunOutput, "add", dying)


def encode(corpus: Path, prefix: Path, *more: object, expect: int = 0) -> None:
    run(
        "--input",
        corpus,
        *NULL,
        *KEYS,
        "--append-eod",
        "--workers",
        2,
        "--output-prefix",
        prefix,
        *more,
        expect=expect,
    )


def result(prefix: Path) -> list[str]:
    return digests(f"{prefix}_text_document") + digests(f"{prefix}_other_document")


@pytest.mark.parametrize("after", [0, 1, 7, 45])
def test_resumed_bytes(
    after: int, corpus: Path, whole: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = tmp_path / "out"
    for point in (after, after + 2):  # interrupted, resumed, interrupted again
        interrupt(monkeypatch, point)
        with pytest.raises(Killed):
            encode(corpus, prefix, "--resume")
        assert not (tmp_path / "out_text_document.idx").exists()
    encode(corpus, prefix, "--resume")
    assert result(prefix) == whole
    assert not leftovers(tmp_path)


@pytest.mark.parametrize(
    "damage", ["journal cut", "journal flipped", "tokens cut", "journal header only", "restore cut"]
)
def test_resume_after_a_crash_of_the_machine(
    damage: str, corpus: Path, whole: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = tmp_path / "out"
    interrupt(monkeypatch, 30)
    with pytest.raises(Killed):
        encode(corpus, prefix)
    journal = tmp_path / "out.preprocess-journal"
    tokens = tmp_path / f"out_text_document.bin{PARTIAL}"
    if damage == "journal cut":
        os.truncate(journal, journal.stat().st_size - 37)
    elif damage == "journal flipped":
        content = bytearray(journal.read_bytes())
        content[len(content) // 2] ^= 0x20
        journal.write_bytes(content)
    elif damage == "tokens cut":
        os.truncate(tokens, tokens.stat().st_size // 3 | 1)
    elif damage == "journal header only":
        os.truncate(journal, 20)
    else:
        for path in (journal, tokens, tmp_path / f"out_other_document.bin{PARTIAL}"):
            os.replace(path, f"{path}{INTERRUPTED}")
        tokens.write_bytes(b"half of a copy")
    encode(corpus, prefix, "--resume")
    assert result(prefix) == whole
    assert not leftovers(tmp_path)


def test_resume_refuses_another_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = tmp_path / "out"
    interrupt(monkeypatch, 5)
    with pytest.raises(Killed):
        encode(corpus, prefix)
    write_jsonl(corpus / "b.jsonl", number_documents(5))
    encode(corpus, prefix, "--resume", "--partitions", 1, expect=1)
    error = capsys.readouterr().err
    assert "the interrupted run differs from this one in --input" in error and "drop --resume" in error


def test_a_finished_run_is_not_repeated(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = tmp_path / "out"
    encode(corpus, prefix, "--resume")
    before = (tmp_path / "out_text_document.bin").stat().st_mtime_ns
    encode(corpus, prefix, "--resume")
    assert "complete already" in capsys.readouterr().out
    assert (tmp_path / "out_text_document.bin").stat().st_mtime_ns == before


def test_a_finished_run_with_other_options_is_another_run(corpus: Path, tmp_path: Path) -> None:
    without_eod = ["--input", corpus, *NULL, *KEYS, "--workers", 1, "--output-prefix"]
    run(*without_eod, tmp_path / "expected")
    encode(corpus, tmp_path / "out", "--resume")
    run(*without_eod, tmp_path / "out", "--resume")
    assert result(tmp_path / "out") == result(tmp_path / "expected")
    write_jsonl(corpus / "b.jsonl", [document | {"other": "1"} for document in number_documents(5)])
    run(*without_eod, tmp_path / "out", "--resume")
    assert len(documents_of(f"{tmp_path / 'out'}_text_document")) == 305


@pytest.mark.parametrize("count", [1, 3, 8])
def test_merged_shards_equal_one_run(count: int, corpus: Path, whole: list[str], tmp_path: Path) -> None:
    for i in reversed(range(count)):
        encode(corpus, tmp_path / "out", "--shard", f"{i}/{count}")
    encode(corpus, tmp_path / "out", "--merge-shards", count)
    assert result(tmp_path / "out") == whole


def test_merging_needs_every_shard(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encode(corpus, tmp_path / "out", "--shard", "0/2")
    encode(corpus, tmp_path / "out", "--merge-shards", 2, expect=1)
    assert (
        "out_shard_00001_of_00002_text_document: this part is missing or unfinished"
        in capsys.readouterr().err
    )


def test_resumed_partitions(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode(corpus, tmp_path / "once", "--partitions", 3)
    interrupt(monkeypatch, 20)
    with pytest.raises(Killed):
        encode(corpus, tmp_path / "out", "--partitions", 3)
    encode(corpus, tmp_path / "out", "--partitions", 3, "--resume")
    assert result(tmp_path / "out") == result(tmp_path / "once")


def test_journal_round_trip(tmp_path: Path) -> None:
    import numpy

    records = [
        Record(
            Progress(0, i, i, i, 0),
            [i, 2 * i],
            [numpy.arange(i, dtype=numpy.int32)] * 2,
            [numpy.ones(i, numpy.int32)] * 2,
        )
        for i in range(4)
    ]
    path = str(tmp_path / "journal")
    journal = JournalWriter(path, {"a": 1})
    for record in records:
        journal.add(record)
    journal.close()
    for written, read in zip(records, read_journal(path, {"a": 1}), strict=True):
        assert (written.progress, written.tokens) == (read.progress, read.tokens)
        for before, after in zip(
            written.lengths + written.sequences, read.lengths + read.sequences, strict=True
        ):
            assert before.tolist() == after.tolist()
