"""The published way to HuggingFace, verbatim: transformers' own Megatron converter reads what we write."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.runs import published_conversion as published

_CONVERTER = "transformers/models/megatron_gpt2/convert_megatron_gpt2_checkpoint.py"
_BERT_CONVERTER = "transformers/models/megatron_bert/convert_megatron_bert_checkpoint.py"
_BERT = published.ROOT / "tests" / "golden" / "checkpoints" / "bert"


def test_pipeline_continues_as_we_do(tmp_path: Path) -> None:
    """HuggingFace -> ours -> HuggingFace; every step generates the same greedy tokens."""
    hf, own, back = tmp_path / "hf", tmp_path / "own", tmp_path / "back"
    published.make_model(hf)
    published.convert("--loader", "hf", "--saver", "mcore", "--load-dir", hf, "--save-dir", own)
    published.convert("--loader", "mcore", "--saver", "hf", "--load-dir", own, "--save-dir", back)
    expected = published.ours(own, hf)
    assert len(expected) > len(published.PROMPT)
    assert published.pipeline(back, back) == expected


@pytest.fixture(scope="module")
def transformers4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An installation of transformers 4.46, beside the one of the tests."""
    path = tmp_path_factory.mktemp("transformers4")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(path)]
    requirements = ["transformers==4.46.3", "huggingface-hub<1.0", "tokenizers>=0.20,<0.21"]
    subprocess.run([*command, *requirements], check=True)
    return path


@pytest.mark.slow
@pytest.mark.network
def test_transformers_4_converts_what_we_write(transformers4: Path, tmp_path: Path) -> None:
    """The converter that transformers 4.46 ships, unmodified."""
    path = transformers4
    hf, own, old, bare = (tmp_path / name for name in ("hf", "own", "old", "bare"))
    published.make_model(hf)
    published.convert("--loader", "hf", "--saver", "mcore", "--load-dir", hf, "--save-dir", own)
    expected = published.ours(own, hf)
    source = ["--loader", "mcore", "--saver", "megatron", "--load-dir", own]
    published.convert(*source, "--save-dir", old, "--tokenizer-dir", hf)
    file = old / "release" / "mp_rank_00" / "model_optim_rng.pt"
    # The script predates torch 2.6, which refuses a run's arguments unless told otherwise.
    published.command(path / _CONVERTER, file, path=path, TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
    assert published.pipeline(file.parent, hf, path) == expected
    published.convert(*source, "--save-dir", bare, "--without-args")
    file = bare / "release" / "mp_rank_00" / "model_optim_rng.pt"
    # Without arguments the script takes the tokenizer of this name: here a directory in the working directory.
    shutil.copytree(hf, tmp_path / "openai-community" / "gpt2")
    config = bare / "release" / "hf_config.json"
    published.command(path / _CONVERTER, "--config_file", config, file, path=path, cwd=tmp_path)
    assert published.pipeline(file.parent, hf, path) == expected


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize("options", [[], ["--without-args"]])
def test_transformers_4_converts_our_bert(transformers4: Path, tmp_path: Path, options: list[str]) -> None:
    """Its Megatron-BERT, made from a recorded checkpoint by way of ours, computes the recorded logits."""
    with tarfile.open(_BERT / "checkpoints.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    sizes = ["--target-tensor-parallel-size", 1, "--target-pipeline-parallel-size", 1]
    source = ["--loader", "mcore", "--saver", "megatron", "--load-dir", tmp_path / "tp2pp2"]
    published.convert(*source, "--save-dir", tmp_path / "old", *sizes, *options, model_type="BERT")
    (file,) = (tmp_path / "old").glob("*/mp_rank_00/model_optim_rng.pt")
    # The script knows only the default epsilon of norms unless told.
    config = ["--config_file", file.parent.parent / "hf_config.json"]
    environment = {} if options else {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    published.command(transformers4 / _BERT_CONVERTER, *config, file, path=transformers4, **environment)
    outputs = published.bert_outputs(file.parent, _BERT / "batch.npz", tmp_path / "out.npz", transformers4)
    batch, expected = np.load(_BERT / "batch.npz"), np.load(_BERT / "expected.npz")
    real = batch["padding_mask"][..., None]  # queries at padding see nothing there and everything here
    assert np.abs((outputs["logits"] - expected["logits"]) * real).max() <= 1e-5
    assert np.abs(outputs["binary_logits"] - expected["binary_logits"]).max() <= 1e-5
