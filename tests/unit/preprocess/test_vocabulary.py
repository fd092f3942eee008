"""tools/train_tokenizer.py: the files it writes load in the tokenizer they are for and encode the corpus back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron.training.preprocessing.vocabulary import main
from megatron.training.tokenizer import build_tokenizer
from tests.unit.preprocess.runs import DATA
from tests.unit.tokenizer.test_recorded import namespace

CORPUS = str(DATA / "corpus.jsonl")


def train(folder: Path, model: str, *more: str) -> None:
    assert (
        main(["--input", CORPUS, "--model", model, "--vocab-size", "600", "--output-dir", str(folder), *more])
        == 0
    )


def test_bpe(tmp_path: Path) -> None:
    train(tmp_path, "bpe")
    tokenizer = build_tokenizer(
        namespace(
            tokenizer_type="GPT2BPETokenizer",
            vocab_file=str(tmp_path / "vocab.json"),
            merge_file=str(tmp_path / "merges.txt"),
            bpe_engine="gigatoken",
        )
    )
    assert (tokenizer.vocab_size, tokenizer.eod) == (600, 599)
    for line in (DATA / "corpus.jsonl").read_text(encoding="utf-8").splitlines()[:40]:
        text = json.loads(line)["text"]
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


def test_wordpiece(tmp_path: Path) -> None:
    train(tmp_path, "wordpiece")
    tokenizer = build_tokenizer(
        namespace(tokenizer_type="BertWordPieceLowerCase", vocab_file=str(tmp_path / "vocab.txt"))
    )
    assert tokenizer.vocab_size == 602 and tokenizer.pad == 0
    assert tokenizer.detokenize(tokenizer.tokenize("Return the value")) == "return the value"


@pytest.mark.parametrize("model", ["unigram", "sentencepiece-bpe"])
def test_sentencepiece(model: str, tmp_path: Path) -> None:
    train(tmp_path, model, "--pad-id", "0", "--eos-id", "1", "--unk-id", "2", "--bos-id", "-1")
    tokenizer = build_tokenizer(
        namespace(tokenizer_type="SentencePieceTokenizer", tokenizer_model=str(tmp_path / "tokenizer.model"))
    )
    assert (tokenizer.pad, tokenizer.eos) == (0, 1)
    assert tokenizer.detokenize(tokenizer.tokenize("Return the value")) == "Return the value"


def test_sizes_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--input", CORPUS, "--output-dir", str(tmp_path), "--vocab-size"]
    assert main([*arguments, "256"]) == 2
    assert "the 256 bytes and <|endoftext|> already take 257" in capsys.readouterr().out
    assert main([*arguments, "100000", "--model", "unigram"]) == 2
    assert "--model unigram: sentencepiece refuses" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
