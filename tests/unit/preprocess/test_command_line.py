"""The command line: v0.9's options, abbreviations and messages, and the spellings of older scripts."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.training.preprocessing import arguments, progress
from tests.unit.preprocess.runs import DATA, GPT, NULL, VOCAB, digests, number_documents, run, write_jsonl

ROOT = Path(__file__).parents[3]
FLAGS = DATA / "preprocess_flags.tsv"
REQUIRED = ["--input", "i", "--output-prefix", "o", "--workers", "1"]


def test_every_recorded_option_is_there_with_its_default() -> None:
    with FLAGS.open(encoding="utf-8") as file:
        recorded = {row["flags"]: row for row in csv.DictReader(file, delimiter="\t")}
    assert len(recorded) == 16
    actions = {action.option_strings[0]: action for action in arguments.build_parser()._actions}
    for flag, row in recorded.items():
        assert actions[flag].dest == row["dest"]
        assert str(actions[flag].default).strip("'") == row["default"].strip("'"), flag
        assert actions[flag].required == (row["required"] == "True")
    for name in ("Llama3Tokenizer", "MistralTokenizer", "HuggingFaceTokenizer", "TikTokenizer"):
        assert name in (actions["--tokenizer-type"].choices or ())


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["--merge", "F"], ["--merge-file", "F"]),
        (["--vocab-f=F"], ["--vocab-file=F"]),
        (["--json-k", "a", "b"], ["--json-keys", "a", "b"]),
        (["--partition", "2"], ["--partitions", "2"]),
        (
            ["--split", "--keep-n", "--keep-s"],
            ["--split-sentences", "--keep-newlines", "--keep-sequential-samples"],
        ),
        (["--tokenizer", "x"], ["--tokenizer", "x"]),
        (["--vocab", "F"], ["--vocab-file", "F"]),
        (["--json-key", "a"], ["--json-keys", "a"]),
        (["--dataset-impl", "mmap", "--chunk-size", "25", "--workers", "1"], ["--workers", "1"]),
        (["--dataset-impl=mmap", "--append-eod"], ["--append-eod"]),
    ],
)
def test_spellings(typed: list[str], meant: list[str]) -> None:
    assert arguments.modernize(typed) == meant


def test_a_script_of_the_first_generation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = DATA / "corpus.jsonl"
    run(
        *("--input", corpus, "--output-prefix", tmp_path / "old", "--vocab", VOCAB / "gpt2-vocab.json"),
        *(
            "--dataset-impl",
            "mmap",
            "--tokenizer-type",
            "GPT2BPETokenizer",
            "--merge-file",
            VOCAB / "gpt2-merges.txt",
        ),
        *("--append-eod", "--workers", "1", "--chunk-size", "25", "--json-key", "text"),
    )
    error = capsys.readouterr().err
    for notice in (
        "--vocab is now --vocab-file",
        "--json-key is now --json-keys",
        "--dataset-impl has no effect",
        "--chunk-size has",
    ):
        assert notice in error
    run("--input", corpus, *GPT, "--append-eod", "--workers", 1, "--output-prefix", tmp_path / "new")
    assert digests(tmp_path / "old_text_document") == digests(tmp_path / "new_text_document")


@pytest.mark.parametrize("missing", ["--input", "--output-prefix", "--workers", "--tokenizer-type"])
def test_usage_errors_have_status_2(missing: str) -> None:
    words = [*REQUIRED, *NULL[:2]]
    at = words.index(missing)
    with pytest.raises(SystemExit) as ended:
        arguments.parse(words[:at] + words[at + 2 :])
    assert ended.value.code == 2


def test_the_script_and_its_messages(tmp_path: Path) -> None:
    """A real process, from another directory: v0.9's lines, and neither torch nor a second later."""
    corpus = write_jsonl(tmp_path / "a.jsonl", number_documents(2500))
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(corpus), *NULL]
    result = subprocess.run(
        [*command, "--workers", "2", "--output-prefix", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"Opening {corpus}\n" in result.stdout
    assert re.search(r"^Time to startup: \d+\.\d+", result.stdout, re.MULTILINE)
    lines = r"^Processed (\d+) documents \([\d.e+-]+ docs/s, [\d.e+-]+ MB/s\)\.$"
    assert re.findall(lines, result.stderr, re.MULTILINE) == ["1000", "2000"]
    assert (tmp_path / "out_text_document.idx").exists()
    imported = subprocess.run(
        [sys.executable, "-X", "importtime", str(ROOT / "tools" / "preprocess_data.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not re.search(r"\| +(torch|transformers|sentencepiece|nltk)$", imported.stderr, re.MULTILINE)


def test_bert_without_sentences_is_asked_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    flags = ["--tokenizer-type", "BertWordPieceLowerCase", "--vocab-file", VOCAB / "bert-vocab.txt"]
    run("--input", corpus, *flags, "--workers", 1, "--output-prefix", tmp_path / "out")
    assert "Are you sure you don't want to split sentences?" in capsys.readouterr().out


def test_the_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(progress.time, "time", lambda: next(clock))
    report = progress.ProgressReport(1000, 400 << 20)
    report.update(50_000, 100 << 20, 100 << 20)
    report.close()
    bar = "=" * 8 + " " * 22
    assert capsys.readouterr().err == f"\r[{bar}]  25% 50,000 documents, 10.0 MB/s, 0:00:30 left\x1b[K\n"
