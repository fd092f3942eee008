"""Memory that does not grow with the corpus, and documents of any length."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.core.datasets.indexed_dataset import IndexedDataset
from tests.unit.preprocess.runs import GPT, NULL, run

ROOT = Path(__file__).parents[3]
ADDRESS_SPACE_BYTES = (
    1 << 30
)  # of each process; numpy, its libraries and the worker's share of chunks need about half


def encode_limited(tmp_path: Path, documents: int) -> None:
    """Encode that many short documents in processes that may not map more than the limit."""
    corpus = tmp_path / "many.jsonl"
    block = "".join(json.dumps({"text": f"{i} {i + 1}"}) + "\n" for i in range(10_000))
    with corpus.open("w") as file:
        for _ in range(documents // 10_000):
            file.write(block)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE_BYTES, ADDRESS_SPACE_BYTES))

    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(corpus), *NULL]
    subprocess.run(
        [
            *command,
            "--append-eod",
            "--workers",
            "1",
            "--log-interval",
            "1000000",
            "--output-prefix",
            str(tmp_path / "out"),
        ],
        preexec_fn=limit,
        env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        check=True,
    )
    dataset = IndexedDataset(str(tmp_path / "out_text_document"))
    assert len(dataset) == documents
    assert dataset[documents - 1].tolist() == [9999, 10000, 50000]


def test_memory_twin(tmp_path: Path) -> None:
    encode_limited(tmp_path, 300_000)


@pytest.mark.slow
def test_ten_million_documents_in_a_fixed_address_space(tmp_path: Path) -> None:
    encode_limited(tmp_path, 10_000_000)


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("one word", "x"),
        ("spaces", " "),
        ("prose", "The quick brown fox, 42 times. "),
        ("ideographs", "你好"),
        ("marks", "!?"),
    ],
)
@pytest.mark.parametrize("characters", [400_000, pytest.param(16_000_000, marks=pytest.mark.slow)])
def test_one_very_long_document(name: str, unit: str, characters: int, tmp_path: Path) -> None:
    text = unit * (characters // len(unit))
    corpus = tmp_path / "long.jsonl"
    corpus.write_text(json.dumps({"text": "short"}) + "\n" + json.dumps({"text": text}) + "\n")
    run("--input", corpus, *GPT, "--workers", 2, "--output-prefix", tmp_path / "out")
    dataset = IndexedDataset(str(tmp_path / "out_text_document"))
    assert len(dataset) == 2
    assert 0 < len(dataset[1]) <= len(text.encode("utf-8"))
