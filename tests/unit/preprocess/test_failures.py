"""Malformed data, failing workers and contradictory options: one clear line, the right status, no half files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron.training.preprocessing import pipeline
from tests.unit.preprocess.runs import (
    GPT,
    NULL,
    VOCAB,
    documents_of,
    leftovers,
    number_documents,
    run,
    write_jsonl,
)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    path = write_jsonl(tmp_path / "a.jsonl", number_documents(2000))
    lines = path.read_text().splitlines()
    lines[1233] = '{"text": '
    lines[1500] = '{"txt": "1"}'
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("chunk_bytes", [500, 4 << 20])
def test_stop_names_file_and_line(
    chunk_bytes: int,
    damaged: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(pipeline.read_chunks.__kwdefaults__, "chunk_bytes", chunk_bytes)
    run("--input", damaged, *NULL, "--workers", 2, "--output-prefix", tmp_path / "out", expect=1)
    error = capsys.readouterr().err
    assert f"{damaged}:1234: the line is not JSON" in error and "--on-error skip" in error
    assert not (tmp_path / "out_text_document.idx").exists()


def test_skip_counts(damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("--input", damaged, *NULL, "--workers", 2, "--on-error", "skip", "--output-prefix", tmp_path / "out")
    error = capsys.readouterr().err
    assert (
        f"{damaged}:1234: skipped" in error
        and f"{damaged}:1501: skipped: the document has no key 'text'" in error
    )
    assert "Skipped 2 malformed lines of 2000" in error
    kept = [d for i, d in enumerate(number_documents(2000)) if i not in (1233, 1500)]
    expected = [[int(n) for n in document["text"].split()] for document in kept]
    assert documents_of(tmp_path / "out_text_document") == expected


def test_skipping_keeps_the_partition_of_the_others(damaged: Path, tmp_path: Path) -> None:
    run(
        "--input",
        damaged,
        *NULL,
        "--workers",
        1,
        "--partitions",
        3,
        "--on-error",
        "skip",
        "--output-prefix",
        tmp_path / "out",
    )
    expected = [
        [int(n) for n in d["text"].split()]
        for i, d in enumerate(number_documents(2000))
        if i % 3 == 1 and i not in (1233, 1500)
    ]
    assert documents_of(tmp_path / "out_1_text_document") == expected


@pytest.mark.parametrize(
    ("text", "flags", "reason"),
    [
        ("a \ud800 b", GPT, "lone surrogate"),
        ("1 two", NULL, "the tokenizer refuses the text: '1 two' is not a list of ids"),
        ("70000", NULL, "token ids 70000 to 70000 do not fit the uint16 tokens"),
    ],
)
def test_texts_a_tokenizer_cannot_take(
    text: str, flags: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "1"}, {"text": text}])
    run("--input", path, *flags, "--workers", 1, "--output-prefix", tmp_path / "out", expect=1)
    assert f"{path}:2: {reason}" in capsys.readouterr().err.replace("holds a lone", "lone").replace(
        "the text lone", "lone"
    )


def test_special_tokens_in_text_stay_text(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a<|endoftext|>b"}])
    run("--input", path, *GPT, "--workers", 1, "--append-eod", "--output-prefix", tmp_path / "out")
    end = json.loads((VOCAB / "gpt2-vocab.json").read_text(encoding="utf-8"))["<|endoftext|>"]
    (document,) = documents_of(tmp_path / "out_text_document")
    assert document.count(end) == 1 and document[-1] == end


def test_what_a_worker_finds_wrong_with_a_file_is_said_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("[PAD]\n[CLS]\n[SEP]\n[MASK]\na\n")
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a b"}])
    flags = ["--tokenizer-type", "BertWordPieceLowerCase", "--vocab-file", vocabulary, "--workers", 1]
    run("--input", path, *flags, "--output-prefix", tmp_path / "out", expect=1)
    assert capsys.readouterr().err == (
        f"preprocess_data.py: {vocabulary}: the text needs [UNK], which the vocabulary does not have. "
        "Fix: add a line [UNK] to the vocabulary.\n"
    )


def test_a_dying_worker_ends_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", number_documents(5))
    parent = os.getpid()

    def die(self: object, text: str) -> list[int]:
        assert os.getpid() != parent, "only workers encode"
        os._exit(9)

    monkeypatch.setattr("megatron.training.tokenizer.null._NullTokenizer.tokenize", die)
    run("--input", path, *NULL, "--workers", 2, "--output-prefix", tmp_path / "out", expect=1)
    assert "a worker process died" in capsys.readouterr().err
    assert not (tmp_path / "out_text_document.idx").exists()


def test_an_unforeseen_error_in_a_worker_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", number_documents(5))

    def fail(self: object, text: str) -> list[int]:
        raise ZeroDivisionError("inside the tokenizer")

    monkeypatch.setattr("megatron.training.tokenizer.null._NullTokenizer.tokenize", fail)
    with pytest.raises(ZeroDivisionError, match="inside the tokenizer"):
        run("--input", path, *NULL, "--workers", 2, "--output-prefix", tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--append-eod", "--tokenizer-type", "BertWordPieceCase", "--vocab-file", str(VOCAB / "bert-cased-vocab.txt")],
         "--append-eod: the BertWordPieceCase has no end-of-document token"),
        ([*NULL, "--shard", "2/2"], "--shard 2/2"),
        ([*NULL, "--shard", "0/2", "--partitions", "2"], "both divide the input"),
        ([*NULL, "--shard", "0/2", "--merge-shards", "2"], "one encodes, the other joins"),
        ([*NULL, "--partitions", "0"], "--partitions 0: it must be at least 1"),
        (["--tokenizer-type", "Llama3Tokenizer"], "use --tokenizer-type HuggingFaceTokenizer"),
        (["--tokenizer-type", "NullTokenizer", "--vocab-size", "many"], "--vocab-size many"),
        ([*NULL, "--dataset-impl", "lazy"], "only the mmap format exists"),
        (["--tokenizer-type", "GPT2BPETokenizer"], "--vocab-file"),
    ],
)  # fmt: skip
def test_contradictions(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", number_documents(1))
    run("--input", path, "--workers", 1, "--output-prefix", tmp_path / "out", *arguments, expect=2)
    assert words in capsys.readouterr().err
    assert not leftovers(tmp_path)


def test_standard_input_is_read_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--resume"], ["--shard", "0/2"], ["--partitions", "2", "--keep-sequential-samples"]):
        run("--input", "-", *NULL, "--workers", 1, "--output-prefix", tmp_path / "out", *flags, expect=2)
        assert "standard input can be read only once" in capsys.readouterr().err
