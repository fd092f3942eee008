"""Token files byte for byte as v0.9 wrote them, for every recorded tokenizer, option and number of workers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.preprocess.runs import DATA, GPT, VOCAB, digests, leftovers, run

RECORDED = json.loads((DATA / "preprocess_sha256.json").read_text(encoding="utf-8"))
CORPUS = ["--input", str(DATA / "corpus.jsonl")]
SENTENCES = ["--input", str(DATA / "corpus_ss.jsonl")]
BERT = ["--tokenizer-type", "BertWordPieceLowerCase", "--vocab-file", str(VOCAB / "bert-vocab.txt")]


def sentencepiece(kind: str, model: str) -> list[str]:
    return ["--tokenizer-type", kind, "--tokenizer-model", str(VOCAB / f"spm-{model}.model")]


CASES = {
    "gpt": [*CORPUS, *GPT, "--append-eod", "--workers", "2"],
    "gpt-noeod": [*CORPUS, *GPT, "--workers", "1", "--bpe-engine", "python"],
    "gpt-title": [*CORPUS, *GPT, "--append-eod", "--json-keys", "title", "--workers", "1"],
    "gpt-part3": [*CORPUS, *GPT, "--append-eod", "--partitions", "3", "--workers", "3"],
    "gpt-part3seq": [
        *CORPUS,
        *GPT,
        "--append-eod",
        "--partitions",
        "3",
        "--workers",
        "3",
        "--keep-sequential-samples",
    ],
    "bert": [*CORPUS, *BERT, "--split-sentences", "--workers", "2"],
    "bert-keepnl": [*CORPUS, *BERT, "--split-sentences", "--keep-newlines", "--workers", "1"],
    "bert-part2": [*CORPUS, *BERT, "--split-sentences", "--partitions", "2", "--workers", "2"],
    "bert-part2seq": [
        *(*CORPUS, *BERT, "--split-sentences", "--partitions", "2", "--workers", "2"),
        "--keep-sequential-samples",
    ],
    "bert-fromlist": [*SENTENCES, *BERT, "--workers", "1"],
    "bertcase": [
        *(
            *SENTENCES,
            "--tokenizer-type",
            "BertWordPieceCase",
            "--vocab-file",
            str(VOCAB / "bert-cased-vocab.txt"),
        ),
        *("--workers", "1"),
    ],
    "spm": [*CORPUS, *sentencepiece("SentencePieceTokenizer", "unigram"), "--append-eod", "--workers", "1"],
    "spm-noeod": [*CORPUS, *sentencepiece("SentencePieceTokenizer", "unigram"), "--workers", "1"],
    "spmgpt": [
        *CORPUS,
        *sentencepiece("GPTSentencePieceTokenizer", "unigram"),
        "--append-eod",
        "--workers",
        "1",
    ],
    "llama": [*CORPUS, *sentencepiece("Llama2Tokenizer", "llama"), "--append-eod", "--workers", "1"],
    "spmt5": [*SENTENCES, *sentencepiece("SentencePieceTokenizer", "t5"), "--workers", "1"],
    "spmt5d": [*CORPUS, *sentencepiece("SentencePieceTokenizer", "t5"), "--append-eod", "--workers", "1"],
    "null32": [
        *("--input", str(DATA / "null.jsonl"), "--tokenizer-type", "NullTokenizer", "--vocab-size", "70000"),
        *("--append-eod", "--workers", "1"),
    ],
}


@pytest.mark.parametrize("tag", CASES)
def test_recorded_bytes(tag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(DATA / "nltk_data")])
    run(*CASES[tag], "--output-prefix", tmp_path / tag)
    written = {p.name for p in tmp_path.iterdir()}
    expected = {
        name
        for name in RECORDED
        if name.rsplit(".", 1)[0].rsplit("_", 2)[0] == tag or name.startswith(f"{tag}_")
    }
    assert expected and written == expected
    for name in expected:
        prefix, ending = str(tmp_path / name)[:-4], name[-4:]
        assert digests(prefix)[ending == ".idx"] == RECORDED[name], name
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_and_chunks(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "megatron.training.preprocessing.inputs.read_chunks.__kwdefaults__", _small_chunks(3000)
    )
    run(*CORPUS, *GPT, "--append-eod", "--workers", workers, "--output-prefix", tmp_path / "gpt")
    assert digests(tmp_path / "gpt_text_document") == [
        RECORDED[f"gpt_text_document.{e}"] for e in ("bin", "idx")
    ]


def _small_chunks(size: int) -> dict[str, object]:
    from megatron.training.preprocessing.inputs import read_chunks

    return (read_chunks.__kwdefaults__ or {}) | {"chunk_bytes": size}


def test_every_key_gets_its_files(tmp_path: Path) -> None:
    """v0.9 lost the index of all keys but the last."""
    run(
        *CORPUS,
        *GPT,
        "--append-eod",
        "--json-keys",
        "title",
        "text",
        "--workers",
        "1",
        "--output-prefix",
        tmp_path / "both",
    )
    for key, tag in (("title", "gpt-title"), ("text", "gpt")):
        assert digests(tmp_path / f"both_{key}_document") == [
            RECORDED[f"{tag}_{key}_document.{ending}"] for ending in ("bin", "idx")
        ]
