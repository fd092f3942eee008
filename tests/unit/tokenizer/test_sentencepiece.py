"""The SentencePiece types against the engine itself and a literal scan for special tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings

from megatron.core.errors import DataError
from megatron.training.tokenizer.sentencepiece import (
    _GPTSentencePieceTokenizer,
    _Llama2Tokenizer,
    _SentencePieceTokenizer,
)
from tests.unit.tokenizer.hostile import hostile_text

VOCAB = Path(__file__).parents[2] / "golden" / "data" / "vocab"
MODELS = {name: str(VOCAB / f"spm-{name}.model") for name in ("unigram", "t5", "llama")}
ENGINES = {name: sentencepiece.SentencePieceProcessor(model_file=path) for name, path in MODELS.items()}
WITH_SPECIALS = {name: _SentencePieceTokenizer(path, vocab_extra_ids=5) for name, path in MODELS.items()}


def scan(text: str, tokenizer: _SentencePieceTokenizer) -> list[int]:
    """The definition: find the leftmost special string, encode what precedes it alone, go on behind it."""
    ids: list[int] = []
    while True:
        found = [
            (text.find(token), order, token)
            for order, token in enumerate(tokenizer._special_tokens)
            if token in text
        ]
        if not found:
            return ids + tokenizer.tokenizer.encode_as_ids(text)
        start, _, token = min(found)
        ids += tokenizer.tokenizer.encode_as_ids(text[:start])
        ids.append(tokenizer._special_tokens[token])
        text = text[start + len(token) :]


@pytest.mark.parametrize("model", MODELS)
@given(text=hostile_text)
@settings(max_examples=100, deadline=None)
def test_specials_in_text(model: str, text: str) -> None:
    assert WITH_SPECIALS[model].tokenize(text) == scan(text, WITH_SPECIALS[model])


@pytest.mark.parametrize("model", MODELS)
@given(text=hostile_text)
@settings(max_examples=50, deadline=None)
def test_plain_types_are_the_engine(model: str, text: str) -> None:
    engine = ENGINES[model]
    assert _GPTSentencePieceTokenizer(MODELS[model]).tokenize(text) == engine.encode(text)
    llama = _Llama2Tokenizer(MODELS[model])
    assert llama.tokenize(text) == [engine.bos_id(), *engine.encode(text)]
    assert llama.tokenize(text, bos=False, eos=True) == [*engine.encode(text), engine.eos_id()]


def test_many_specials_take_linear_time() -> None:
    tokenizer = WITH_SPECIALS["unigram"]
    assert len(tokenizer.tokenize("a<EOD>" * 20_000)) == 40_000


def test_offsets_are_in_characters() -> None:
    tokenizer = WITH_SPECIALS["t5"]
    text = "你好 <EOD>world"
    ids = tokenizer.tokenize(text)
    offsets = tokenizer.offsets(ids, text)
    assert offsets[ids.index(tokenizer.eod)] == text.index("<EOD>")
    assert offsets[ids.index(tokenizer.eod) + 1] == text.index("world")


def test_unusable_models(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.model: there is no such file"):
        _SentencePieceTokenizer(str(tmp_path / "absent.model"))
    (tmp_path / "broken.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"broken.model: this is no SentencePiece model"):
        _SentencePieceTokenizer(str(tmp_path / "broken.model"))
