"""The distribution examples give the bytes of one run; Slurm and Ray are stood in for by their command interfaces."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.preprocess.runs import NULL, digests, number_documents, run, write_jsonl

ROOT = Path(__file__).parents[3]
SBATCH = """#!/bin/bash
echo "$@" >> "$0.log"
for last in "$@"; do :; done
if [[ "$*" == *--array* ]]; then
    for i in 2 0 1; do SLURM_ARRAY_TASK_ID=$i bash -c "$last" >&2 || exit 1; done
    echo 17
else
    bash -c "$last"
fi
"""
RAY = """
def init(): pass
def remote(**options):
    class Task:
        def __init__(self, function): self.function = function
        def remote(self, *arguments): return self.function(*arguments)
    return Task
def get(results): return results
"""


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    corpus = write_jsonl(tmp_path / "a b.jsonl", number_documents(300))
    run("--input", corpus, *NULL, "--workers", 1, "--output-prefix", tmp_path / "whole")
    return ["--input", str(corpus), *NULL, "--workers", "1", "--output-prefix", str(tmp_path / "out")]


@pytest.mark.parametrize("local", [True, False])
def test_slurm_array(local: bool, options: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(SBATCH)
    (folder / "sbatch").chmod(0o755)
    (folder / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "SHARDS": "3"}
    script = ROOT / "examples" / "preprocessing" / "slurm_array.sh"
    flags = ["--local"] if local else []
    subprocess.run(["bash", str(script), *flags, *options], env=environment, check=True, capture_output=True)
    assert digests(tmp_path / "out_text_document") == digests(tmp_path / "whole_text_document")
    if not local:
        array, merge = (folder / "sbatch.log").read_text().splitlines()
        assert "--array 0-2" in array and "--dependency afterok:17" in merge


def test_ray(options: list[str], tmp_path: Path) -> None:
    (tmp_path / "ray.py").write_text(RAY)
    script = ROOT / "examples" / "preprocessing" / "ray_shards.py"
    command = [sys.executable, str(script), "--shards", "3", *options]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert digests(tmp_path / "out_text_document") == digests(tmp_path / "whole_text_document")
