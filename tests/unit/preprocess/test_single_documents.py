"""The encoder that programs import from the tool, with the loop of a pool that v0.9's tool has."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from megatron.core.errors import DataError
from tools.preprocess_data import Encoder, get_args

OPTIONS = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "100", "--workers", "2", "--append-eod"]


def _encoder(monkeypatch: pytest.MonkeyPatch, *more: str) -> Encoder:
    # Who wants the other options alone leaves the paths out.
    monkeypatch.setattr("sys.argv", ["program", "--input", None, "--output-prefix", None, *OPTIONS, *more])
    return Encoder(get_args())


def test_one_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids and lengths per key, the end of document in the last sentence; an empty document has none."""
    encoder = _encoder(monkeypatch, "--json-keys", "text", "title")
    encoder.initializer()
    line = json.dumps({"text": ["1 2 3", "4"], "title": []})
    assert encoder.encode(line) == (
        {"text": [1, 2, 3, 4, 100], "title": []},
        {"text": [3, 2], "title": []},
        len(line),
    )
    assert encoder.tokenizer.eod == 100
    with pytest.raises(DataError, match="no key"):
        encoder.encode('{"text": "1"}')


def test_sentences_are_split_before(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = _encoder(monkeypatch, "--split-sentences", "--sentence-splitter", "simple")
    encoder.initializer()
    line = json.dumps({"text": "One. Two."})
    assert encoder.split(line) == (json.dumps({"text": ["One.", "Two."]}), len(line))


def test_workers_of_a_pool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only the workers build a tokenizer; lines come back in order."""
    encoder = _encoder(monkeypatch)
    lines = [json.dumps({"text": f"{number} {number + 1}"}) for number in range(20)]
    with multiprocessing.get_context("fork").Pool(2, initializer=encoder.initializer) as pool:
        ids = [encoded["text"] for encoded, _, _ in pool.imap(encoder.encode, lines, 4)]
    assert ids == [[number, number + 1, 100] for number in range(20)]
