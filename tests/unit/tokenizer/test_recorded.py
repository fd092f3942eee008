"""Every tokenizer type against ids, special tokens, identities and texts recorded from v0.9."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer
from megatron.training.tokenizer import build_tokenizer

DATA = Path(__file__).parents[2] / "golden" / "data"
RECORDED = json.loads((DATA / "tokenize.json").read_text(encoding="utf-8"))
NAMES = list(RECORDED["tokenizers"])
PROPERTIES = (
    "vocab_size", "eod", "cls", "sep", "pad", "mask", "bos", "eos", "additional_special_tokens_ids", "unique_description",
)  # fmt: skip


def namespace(**given: Any) -> argparse.Namespace:
    defaults = {
        "rank": 1, "make_vocab_size_divisible_by": 128, "tensor_model_parallel_size": 1, "vocab_extra_ids": 0,
        "tokenizer_model": None, "vocab_file": None, "merge_file": None, "vocab_size": None, "padded_vocab_size": None,
    }  # fmt: skip
    return argparse.Namespace(**(defaults | given))


def answer(ask: Any) -> Any:
    """The value, or the error in the form of the recording."""
    try:
        return ask()
    except (AttributeError, NotImplementedError, ValueError) as error:
        return {"error": type(error).__name__}


@pytest.fixture(params=NAMES)
def recorded(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Any], MegatronTokenizer]:
    monkeypatch.chdir(DATA)  # the recorded identities hold relative paths
    expected = RECORDED["tokenizers"][request.param]
    return expected, build_tokenizer(namespace(**expected["args"]))


def test_properties(recorded: tuple[dict[str, Any], MegatronTokenizer]) -> None:
    expected, tokenizer = recorded
    assert {name: answer(partial(getattr, tokenizer, name)) for name in PROPERTIES} == {
        name: expected[name] for name in PROPERTIES
    }


def test_ids_and_texts(recorded: tuple[dict[str, Any], MegatronTokenizer]) -> None:
    expected, tokenizer = recorded
    for text, ids, back in zip(RECORDED["texts"], expected["ids"], expected["detokenized"]):
        assert answer(partial(tokenizer.tokenize, text)) == ids
        if isinstance(ids, list):
            assert tokenizer.detokenize(ids) == back
    for ids, back in zip(expected["ids"], expected.get("decode_token_ids", [])):
        assert tokenizer.decode_token_ids(ids) == back


def test_documents_have_the_ids_of_texts(recorded: tuple[dict[str, Any], MegatronTokenizer]) -> None:
    expected, tokenizer = recorded
    for text, ids in zip(RECORDED["texts"], expected["ids"]):
        if isinstance(ids, list) and hasattr(tokenizer, "encode_document"):
            if type(tokenizer).__name__ == "_HuggingFaceTokenizer" and "<|endoftext|>" in text:
                continue  # the one difference, see test_huggingface
            assert tokenizer.encode_document(text).tolist() == ids


def test_offsets_point_at_the_tokens(recorded: tuple[dict[str, Any], MegatronTokenizer]) -> None:
    """Offsets never decrease, one per token; on plain words each is where that token's own text starts."""
    expected, tokenizer = recorded
    for text, ids in zip(RECORDED["texts"], expected["ids"]):
        if isinstance(ids, list):
            offsets = tokenizer.offsets(ids, text)
            assert len(offsets) == len(ids)
            assert offsets == sorted(offsets)
            assert all(0 <= offset <= len(text) for offset in offsets)


def test_offsets_of_known_words(recorded: tuple[dict[str, Any], MegatronTokenizer]) -> None:
    expected, tokenizer = recorded
    if expected["args"]["tokenizer_type"] == "NullTokenizer":
        assert tokenizer.offsets([12, 8191, 7], "12 8191 7") == [0, 3, 8]
        return
    text = "get the bad text from the request"
    ids = tokenizer.tokenize(text)
    offsets = tokenizer.offsets(ids, text)
    for i in range(len(ids)):
        piece = text[offsets[i] : offsets[i + 1] if i + 1 < len(ids) else len(text)]
        shown = tokenizer.inv_vocab[ids[i]].strip("▁Ġ ").removeprefix("##")
        if shown not in ("<s>", "[UNK]", "<unk>"):
            assert piece.strip() == shown
