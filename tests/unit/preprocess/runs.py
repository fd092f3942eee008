"""Running tools/preprocess_data.py inside the test process, on recorded and made-up corpora."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.training.preprocessing.pipeline import main

DATA = Path(__file__).parents[2] / "golden" / "data"
VOCAB = DATA / "vocab"
NULL = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "50000"]
GPT = [
    *("--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", str(VOCAB / "gpt2-vocab.json")),
    *("--merge-file", str(VOCAB / "gpt2-merges.txt")),
]


def run(*arguments: object, expect: int = 0) -> None:
    """Run the tool with these arguments and demand its exit status."""
    status = main([str(argument) for argument in arguments])
    assert status == expect, f"exit status {status} instead of {expect}"


def write_jsonl(path: Path, documents: list[Any]) -> Path:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    return path


def number_documents(count: int, start: int = 0) -> list[dict[str, str]]:
    """Documents for the null tokenizer, of different lengths, no two alike."""
    return [
        {"text": " ".join(str(i % 40000 + j) for j in range(i % 7 + 1))} for i in range(start, start + count)
    ]


def documents_of(prefix: Path | str) -> list[list[int]]:
    """The documents of a token file as lists of ids."""
    dataset = IndexedDataset(str(prefix))
    bounds = dataset.document_indices
    return [
        [int(token) for sequence in dataset[int(first) : int(end)] for token in sequence]
        for first, end in pairwise(bounds)
    ]


def digests(prefix: Path | str) -> list[str]:
    """sha256 of the .bin and the .idx."""
    return [hashlib.sha256(Path(f"{prefix}{ending}").read_bytes()).hexdigest() for ending in (".bin", ".idx")]


def leftovers(folder: Path) -> list[str]:
    """Files of unfinished runs."""
    return sorted(
        p.name for p in folder.iterdir() if p.name.endswith((".partial", ".interrupted", "-journal"))
    )
