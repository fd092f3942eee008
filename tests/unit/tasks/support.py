"""The recorded tasks: expectations, and tokenizers of their vocabularies."""

from __future__ import annotations

import functools
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron.training.tokenizer import build_tokenizer

RECORDED = Path(__file__).resolve().parents[2] / "golden" / "tasks"


def expected(name: str) -> Any:
    return json.loads((RECORDED / name).read_text(encoding="utf-8"))


@functools.cache
def tokenizer(kind: str) -> Any:
    """`bert` or `gpt`."""
    files = {"vocab_file": str(RECORDED / f"vocab/{kind}-vocab.{'txt' if kind == 'bert' else 'json'}")}
    return build_tokenizer(
        Namespace(
            rank=1, make_vocab_size_divisible_by=128, tensor_model_parallel_size=1, vocab_extra_ids=0, vocab_size=None,
            tokenizer_type="BertWordPieceLowerCase" if kind == "bert" else "GPT2BPETokenizer",
            merge_file=str(RECORDED / "vocab/gpt-merges.txt"), tokenizer_model=None, **files,
        )
    )  # fmt: skip
