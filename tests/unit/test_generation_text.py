"""Texts, segments and line ends of generated ids, for every kind of tokenizer, against the engines behind them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import pytest
import sentencepiece
import torch
import transformers

from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer
from megatron.inference.text_generation import generation, tokenization
from megatron.training.tokenizer import build_tokenizer
from tests.unit.tokenizer.test_recorded import DATA, RECORDED, namespace

TEXT = "Hello: naïve\n\nwörld 漢"


def pieces_of_sentencepiece(model: str) -> Callable[[list[int]], list[str]]:
    return sentencepiece.SentencePieceProcessor(model_file=str(DATA / "vocab" / model)).id_to_piece


def bytes_of_gpt2(ids: list[int]) -> list[str]:
    """Each token's bytes as text, by the published table of characters that stand for bytes."""
    known = {token: text for text, token in json.loads((DATA / "vocab/gpt2-vocab.json").read_text()).items()}
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }
    return [bytes(byte_of[each] for each in known[token]).decode("utf-8", "replace") for token in ids]


def pieces_of_huggingface(ids: list[int]) -> list[str]:
    return transformers.AutoTokenizer.from_pretrained(str(DATA / "vocab/hf")).convert_ids_to_tokens(ids)


def each_alone(tokenizer: MegatronTokenizer) -> Callable[[list[int]], list[str]]:
    return lambda ids: [tokenizer.detokenize([token]) for token in ids]


SEGMENTS: dict[str, Callable[[list[int]], list[str]] | None] = {
    "gpt2": bytes_of_gpt2,
    "gptspm": pieces_of_sentencepiece("spm-unigram.model"),
    "llama2": pieces_of_sentencepiece("spm-llama.model"),
    "hf": pieces_of_huggingface,
    "tiktoken_v2": None,
    "null": None,
}


@pytest.fixture(params=SEGMENTS)
def named(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, MegatronTokenizer, argparse.Namespace]:
    monkeypatch.chdir(DATA)
    args = namespace(**RECORDED["tokenizers"][request.param]["args"])
    tokenizer = build_tokenizer(args)
    monkeypatch.setattr(tokenization, "get_args", lambda: args)
    monkeypatch.setattr(tokenization, "get_tokenizer", lambda: tokenizer)
    return request.param, tokenizer, args


def test_segments_are_the_pieces(named: tuple[str, MegatronTokenizer, Any]) -> None:
    name, tokenizer, _ = named
    ids = list(tokenizer.tokenize("5 60 700" if name == "null" else TEXT))
    padded = torch.tensor([[*ids, tokenizer.eod, tokenizer.eod], [ids[0]] * (len(ids) + 2)])
    rows, texts, segments = tokenization.detokenize_generations(padded, torch.tensor([len(ids), 2]), True)
    assert rows == padded.tolist()
    assert texts == [tokenizer.detokenize(ids), tokenizer.detokenize(ids[:1] * 2)]
    expected = SEGMENTS[name] or each_alone(tokenizer)
    assert segments == [expected(ids), expected([ids[0]] * 2)]
    assert tokenization.detokenize_generations(padded, torch.tensor([1, 1]), False)[2] == []


def test_line_ends_are_the_tokenizers_own(named: tuple[str, MegatronTokenizer, Any]) -> None:
    name, tokenizer, args = named
    single, double = generation._newlines(tokenizer)
    if name in ("null", "gptspm"):  # numbers only; a model whose white space is all one
        assert (single, double) == (198, (628,))
        assert generation._forbid_newline_after_colon(tokenizer) is None
        return
    if name in ("gpt2", "tiktoken_v2"):  # byte for byte
        assert tokenizer.detokenize([single]) == "\n"
    assert single == list(tokenizer.tokenize("\n"))[-1]
    assert all(tokenizer.detokenize([token]).count("\n") == 2 for token in double)
    stops = generation._Stops.of(tokenizer, args, on_double_eol=True, on_eol=True)
    lines, others = torch.tensor([single, single]), torch.tensor([single, single + 1])
    assert stops(lines, others).tolist() == [True, False]
    forbid = generation._forbid_newline_after_colon(tokenizer)
    assert forbid is not None
    colon = list(tokenizer.tokenize(":"))[-1]
    logits = torch.zeros(2, 3, tokenizer.vocab_size)
    forbid(torch.tensor([colon, colon + 1]), logits)
    changed = (logits != 0).nonzero().tolist()
    assert changed == [[0, 2, single]] and logits[0, 2, single] == -1e10


def test_ids_of_gpt2s_line_ends() -> None:
    """With GPT-2's own numbers the rule comes to v0.9's."""

    class Published:
        def tokenize(self, text: str) -> list[int]:
            return {"\n": [198], "\n\n": [628]}[text]

    assert generation._newlines(Published()) == (198, (628,))
