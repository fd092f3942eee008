"""Sentence splitters; the recorded splits are in test_recorded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from megatron.core.errors import FlagError
from megatron.training.preprocessing import sentences
from megatron.training.preprocessing.sentences import build_splitter
from tests.unit.preprocess.runs import DATA, NULL, documents_of, run, write_jsonl


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(DATA / "nltk_data")])


@pytest.mark.usefixtures("models")
def test_punkt_gives_the_recorded_sentences() -> None:
    split = build_splitter("punkt", "english", keep_newlines=False)
    texts = (DATA / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    recorded = (DATA / "corpus_ss.jsonl").read_text(encoding="utf-8").splitlines()
    for text, expected in zip(texts, recorded, strict=True):
        assert split(json.loads(text)["text"]) == json.loads(expected)["text"]


@pytest.mark.usefixtures("models")
def test_kept_whitespace_is_the_recorded() -> None:
    split = build_splitter("punkt", "english", keep_newlines=True)
    texts = (DATA / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    lines = "".join(json.dumps({"text": split(json.loads(text)["text"])}) + "\n" for text in texts)
    recorded = json.loads((DATA / "preprocess_sha256.json").read_text(encoding="utf-8"))
    assert hashlib.sha256(lines.encode("utf-8")).hexdigest() == recorded["corpus_ss_keepnl.jsonl"]


@pytest.mark.usefixtures("models")
def test_whitespace_can_stay_with_the_sentence() -> None:
    text = "It has spaces.  Two follow.\n\nAnd a line."
    assert build_splitter("punkt", "english", keep_newlines=True)(text) == [
        "It has spaces.  ",
        "Two follow.\n\n",
        "And a line.",
    ]
    assert build_splitter("punkt", "english", keep_newlines=False)(text) == [
        "It has spaces.",
        "Two follow.",
        "And a line.",
    ]


def test_long_texts_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentences, "PIECE_CHARACTERS", 10)
    assert build_splitter("simple", "", keep_newlines=False)("abcdefghijKLM. No.") == [
        "abcdefghij",
        "KLM.",
        "No.",
    ]


def test_missing_model_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    with pytest.raises(
        FlagError, match=r"--lang klingon: .*nltk.downloader punkt_tab.*--sentence-splitter simple"
    ):
        build_splitter("punkt", "klingon", keep_newlines=False)


def test_the_simple_rule() -> None:
    split = build_splitter("simple", "", keep_newlines=False)
    assert split('He said "no." Then? (Yes!) 3.5 is a number. etc. and more') == [
        'He said "no."',
        "Then?",
        "(Yes!)",
        "3.5 is a number. etc. and more",
    ]
    assert split("你好。世界！好") == ["你好。", "世界！", "好"]
    assert split(" \n ") == []
    text = "One.  Two.\nThree"
    assert "".join(build_splitter("simple", "", keep_newlines=True)(text)) == text


def test_lists_are_not_split_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"text": ["1", "2"]}])
    flags = [*NULL, "--split-sentences", "--sentence-splitter", "simple", "--workers", 1]
    run("--input", corpus, *flags, "--output-prefix", tmp_path / "out", expect=1)
    assert "drop --split-sentences to take its items as sentences" in capsys.readouterr().err


def test_one_run_splits_and_encodes(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"text": "1. 2. 3"}, {"text": ""}])
    corpus.write_text(corpus.read_text().replace(". ", "。"), encoding="utf-8")
    flags = [
        "--tokenizer-type",
        "Llama2Tokenizer",
        "--tokenizer-model",
        DATA / "vocab" / "spm-llama.model",
        "--workers",
        1,
    ]
    run(
        "--input",
        corpus,
        *flags,
        "--split-sentences",
        "--sentence-splitter",
        "simple",
        "--output-prefix",
        tmp_path / "out",
    )
    first, second = documents_of(tmp_path / "out_text_sentence")
    assert first.count(1) == 3 and second == []  # one bos for each sentence
