"""The tools on recorded files: merging, and the report of what a prefix holds."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.core.errors import DataError
from tests.unit.datasets.support import GOLDEN
from tools import inspect_data, merge_datasets

REPOSITORY = GOLDEN.parents[2]


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    directory = tmp_path / "parts"
    directory.mkdir()
    for name in "abc":
        for ending in ("bin", "idx"):
            shutil.copy(GOLDEN / "bin" / f"gpt_{name}_text_document.{ending}", directory)
    return directory


def test_merge_command(parts: Path, tmp_path: Path) -> None:
    """The corpus was preprocessed whole and in three parts; merging the parts gives the whole."""
    command = [sys.executable, f"{REPOSITORY}/tools/merge_datasets.py", "--input", str(parts)]
    subprocess.run([*command, "--output-prefix", "merged"], check=True, cwd=tmp_path)
    for ending in ("bin", "idx"):
        recorded = GOLDEN / "bin" / f"gpt_text_document.{ending}"
        assert (tmp_path / f"merged.{ending}").read_bytes() == recorded.read_bytes()
    (parts / "gpt_b_text_document.bin").unlink()
    failed = subprocess.run([*command, "--output-prefix", "x"], cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode == 1
    assert "gpt_b_text_document.bin: is missing beside its partner" in failed.stderr
    assert failed.stderr.count("\n") == 1 and not list(tmp_path.glob("x*"))


def test_merge_refuses_what_it_cannot_mean(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a directory or does not exist"):
        merge_datasets.find_prefixes(str(tmp_path / "none"), "x")
    with pytest.raises(DataError, match="holds no token files"):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "out.preprocess-done").touch()
        merge_datasets.find_prefixes(str(tmp_path / "empty"), "x")
    with pytest.raises(DataError, match="is one of the inputs"):
        merge_datasets.find_prefixes(str(parts), str(parts / "gpt_a_text_document"))


def test_inspection(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bin/null32_text_document", "--verify", "--tokens", "3", "--document", "1"]
    tokenizer = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "70000"]
    monkeypatch.setattr(sys, "argv", ["inspect_data.py", *arguments, *tokenizer])
    inspect_data.main()
    lines = capsys.readouterr().out.splitlines()
    assert "token type: int32" in lines
    assert "documents: 12 (0 empty)" in lines
    assert "tokens: 45 in 180 bytes" in lines
    ids = next(line for line in lines if line.startswith("ids: "))
    assert ids == "ids: 7919 42649 70000" and "text: '7919 42649 70000'" in lines


def test_inspection_of_recorded_lengths(tmp_path: Path) -> None:
    dataset = inspect_data.IndexedDataset("bin/gpt_text_document")
    lengths = inspect_data.document_lengths(dataset)
    assert lengths.size == 313 and lengths.sum() == 61031
    bars = inspect_data.histogram(lengths)[1:]
    assert sum(int(line.split()[3].replace(",", "")) for line in bars) == 313
    inspect_data.draw_histogram(lengths, str(tmp_path / "lengths.png"))
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_cache_prepared_for_a_large_run_is_what_a_later_run_finds(tmp_path: Path) -> None:
    model = (
        "--num-layers 16 --hidden-size 64 --num-attention-heads 8 --max-position-embeddings 8 --seq-length 8"
    )
    layout = "--tensor-model-parallel-size 8 --pipeline-model-parallel-size 16"
    data = "--data-path bin/null32_text_document --split 1 --tokenizer-type NullTokenizer --vocab-size 70000"
    training = "--micro-batch-size 1 --train-iters 3 --lr 1e-4 --eval-iters 0 --mask-prob 0.2"
    flags = [*f"{model} {layout} {data} {training}".split(), "--data-cache-path", str(tmp_path)]
    command = [sys.executable, f"{REPOSITORY}/tools/prepare_cache.py", "--world-size", "256"]
    command += [f"{REPOSITORY}/pretrain_gpt.py", *flags]
    first, second = (
        subprocess.run(command, check=True, capture_output=True, text=True, cwd=GOLDEN) for _ in range(2)
    )
    # Two replicas of the model, so a global batch of two samples.
    assert "    train:      6" in first.stdout.splitlines()
    assert "> --mask-prob has no effect on GPT" in first.stdout.splitlines()
    assert "Build and save the GPTDataset train indices" in first.stderr
    assert "Build and save" not in second.stderr and "Load the GPTDataset train indices" in second.stderr
    assert {path.name.split("-", 1)[1] for path in tmp_path.iterdir()} == {
        f"GPTDataset-train-{name}"
        for name in (
            "description.txt", "fingerprint.json", "document_index.npy", "sample_index.npy", "shuffle_index.npy"
        )
    }  # fmt: skip
