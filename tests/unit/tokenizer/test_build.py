"""build_tokenizer: messages, padding, missing files, and which engines it imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.core.errors import FlagError
from megatron.training.tokenizer import build_tokenizer, padded_vocab_size
from tests.unit.tokenizer.test_recorded import DATA, namespace

ENGINES = ("torch", "transformers", "tokenizers", "sentencepiece", "tiktoken", "gigatoken", "regex", "nltk")


@pytest.mark.parametrize(
    ("size", "divisor", "tensor_parallel", "padded"),
    [
        (50257, 128, 1, 50304),
        (50257, 128, 8, 51200),
        (30524, 128, 2, 30720),
        (128, 128, 1, 128),
        (1, 1, 1, 1),
    ],
)
def test_padding(size: int, divisor: int, tensor_parallel: int, padded: int) -> None:
    assert padded_vocab_size(size, divisor, tensor_parallel) == padded


def test_messages_and_padded_size(capsys: pytest.CaptureFixture[str]) -> None:
    args = namespace(rank=0, tokenizer_type="NullTokenizer", vocab_size=1000, tensor_model_parallel_size=2)
    build_tokenizer(args)
    assert args.padded_vocab_size == 1024
    assert capsys.readouterr().out == (
        "> building NullTokenizer tokenizer ...\n > padded vocab (size: 1001) with 23 dummy tokens (new size: 1024)\n"
    )
    args = namespace(tokenizer_type="NullTokenizer", vocab_size=1000, padded_vocab_size=2048)
    build_tokenizer(args)
    assert args.padded_vocab_size == 2048  # a checkpoint's size stays
    assert capsys.readouterr().out == ""


def test_unknown_type() -> None:
    with pytest.raises(NotImplementedError, match=r"^Llama3Tokenizer tokenizer is not implemented\.$"):
        build_tokenizer(namespace(tokenizer_type="Llama3Tokenizer"))


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        ({"tokenizer_type": "GPT2BPETokenizer"}, "--vocab-file"),
        (
            {"tokenizer_type": "GPT2BPETokenizer", "vocab_file": str(DATA / "vocab/gpt2-vocab.json")},
            "--merge-file",
        ),
        (
            {"tokenizer_type": "BertWordPieceCase", "vocab_file": "/no/such/file"},
            "--vocab-file /no/such/file",
        ),
        ({"tokenizer_type": "Llama2Tokenizer"}, "--tokenizer-model"),
        ({"tokenizer_type": "HuggingFaceTokenizer"}, "--tokenizer-model"),
        ({"tokenizer_type": "TikTokenizer", "tokenizer_model": "x.json"}, "--tiktoken-pattern"),
        ({"tokenizer_type": "NullTokenizer"}, "--vocab-size"),
    ],
)
def test_missing_options_are_named(given: dict[str, str], flag: str) -> None:
    with pytest.raises(FlagError, match=f"^{flag}"):
        build_tokenizer(namespace(**given))


@pytest.mark.parametrize(
    ("name", "engines"),
    [("null", []), ("bert", []), ("gpt2", ["gigatoken", "regex"]), ("spm_t5", ["sentencepiece"])],
)
def test_only_the_chosen_engine_is_imported(name: str, engines: list[str]) -> None:
    """Start-up time: neither torch nor the engines of other types come along."""
    arguments = json.loads((DATA / "tokenize.json").read_text(encoding="utf-8"))["tokenizers"][name]["args"]
    script = (
        "import argparse, json, sys\nfrom megatron.training.tokenizer import build_tokenizer\n"
        f"args = argparse.Namespace(rank=1, padded_vocab_size=1, **{arguments!r})\n"
        "build_tokenizer(args)\n"
        f"print(json.dumps([name for name in {ENGINES!r} if name in sys.modules]))"
    )
    root = Path(__file__).parents[3]
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=DATA,
        env={"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert sorted(json.loads(result.stdout)) == engines


def test_every_class_is_found_where_v09_has_it() -> None:
    """Its scripts and tests import tokenizers from megatron.training.tokenizer.tokenizer."""
    from megatron.training.tokenizer.tokenizer import (
        CustomTikTokenizer,
        _NullTokenizer,
        reload_mergeable_ranks,
    )

    assert _NullTokenizer(vocab_size=8).eod == 8
    assert CustomTikTokenizer.__module__ == reload_mergeable_ranks.__module__
    with pytest.raises(ImportError, match="_OtherTokenizer"):
        from megatron.training.tokenizer.tokenizer import _OtherTokenizer  # noqa: F401
