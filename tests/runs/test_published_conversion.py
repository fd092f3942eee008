"""The published way to HuggingFace, verbatim: transformers' own Megatron converter reads what we write."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import published_conversion as published

_CONVERTER = "transformers/models/megatron_gpt2/convert_megatron_gpt2_checkpoint.py"


def test_pipeline_continues_as_we_do(tmp_path: Path) -> None:
    """HuggingFace -> ours -> HuggingFace; every step generates the same greedy tokens."""
    hf, own, back = tmp_path / "hf", tmp_path / "own", tmp_path / "back"
    published.make_model(hf)
    published.convert("--loader", "hf", "--saver", "mcore", "--load-dir", hf, "--save-dir", own)
    published.convert("--loader", "mcore", "--saver", "hf", "--load-dir", own, "--save-dir", back)
    expected = published.ours(own, hf)
    assert len(expected) > len(published.PROMPT)
    assert published.pipeline(back, back) == expected


@pytest.mark.slow
@pytest.mark.network
def test_transformers_4_converts_what_we_write(tmp_path: Path) -> None:
    """The converter that transformers 4.46 ships, unmodified, in an installation of its own."""
    path = tmp_path / "transformers4"
    requirements = ["transformers==4.46.3", "huggingface-hub<1.0", "tokenizers>=0.20,<0.21"]
    for requirement in requirements:
        install = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--target",
            str(path),
            "--no-deps",
            requirement,
        ]
        subprocess.run(install, check=True)
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
