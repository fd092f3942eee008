"""Saving and loading need no second copy of the checkpoint: files are mapped and copied piece by piece."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("ckpt_format", ["torch", "torch_dist"])
@pytest.mark.parametrize("width", [3000, pytest.param(35400, marks=pytest.mark.slow)])
def test_no_second_copy(tmp_path: Path, ckpt_format: str, width: int) -> None:
    """Models of 69 MiB and 10 GB: beyond the model itself, each way allocates less than 64 MiB."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.unit.checkpointing.measured_load",
            str(tmp_path),
            ckpt_format,
            str(width),
        ],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    # pytest keeps the directories of past runs.
    shutil.rmtree(tmp_path / "large", ignore_errors=True)
    assert done.returncode == 0, done.stderr
    match = re.search(r"^model (\d+) MiB; .* saving took (-?\d+) and loading (-?\d+) MiB", done.stdout, re.M)
    assert match is not None, done.stdout
    print(match[0])
    assert int(match[1]) == round(8 * width * (width + 1) / 2**20)
    assert int(match[2]) < 64 and int(match[3]) < 64, match[0]
