"""The HuggingFace type: directories, tokenizer.json, and special tokens written out in a corpus."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings

from megatron.core.errors import FlagError
from megatron.training.tokenizer.huggingface import _HuggingFaceTokenizer
from tests.unit.tokenizer.hostile import hostile_text

transformers = pytest.importorskip("transformers")
PATH = Path(__file__).parents[2] / "golden" / "data" / "vocab" / "hf"
OURS = _HuggingFaceTokenizer(str(PATH))
THEIRS = transformers.AutoTokenizer.from_pretrained(str(PATH))


@given(text=hostile_text)
@settings(max_examples=100, deadline=None)
def test_ids_are_those_of_transformers(text: str) -> None:
    assert OURS.tokenize(text) == THEIRS(text).input_ids
    assert OURS.encode_document(text).tolist() == THEIRS(text, split_special_tokens=True).input_ids


def test_special_tokens_in_a_corpus_stay_text() -> None:
    text = "a<|endoftext|>b"
    assert OURS.eod in OURS.tokenize(text)
    ids = OURS.encode_document(text).tolist()
    assert OURS.eod not in ids
    assert OURS.detokenize(ids[1:]) == text


def test_tokenizer_json(tmp_path: Path) -> None:
    from_file = _HuggingFaceTokenizer(str(PATH / "tokenizer.json"))
    text = "Hello world"
    assert from_file.tokenize(text) == OURS.tokenize(text)
    assert (from_file.vocab_size, from_file.eod) == (OURS.vocab_size, OURS.eod)
    shutil.copy(PATH / "tokenizer.json", tmp_path)
    with pytest.raises(FlagError, match=r"names no end-of-sequence token.*tokenizer_config.json"):
        _ = _HuggingFaceTokenizer(str(tmp_path / "tokenizer.json")).eod
