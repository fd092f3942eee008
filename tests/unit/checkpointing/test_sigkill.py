"""Killed with SIGKILL, any rank, at random moments during saves: a job always resumes to the bits of a quiet one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("ckpt_format", "asynchronous", "kills"),
    [
        ("torch", False, 3),
        ("torch_dist", True, 3),
        pytest.param("torch", False, 50, marks=pytest.mark.slow),
        pytest.param("torch_dist", False, 50, marks=pytest.mark.slow),
        pytest.param("torch_dist", True, 50, marks=pytest.mark.slow),
    ],
)
def test_killed_jobs_resume_to_the_same_bits(
    tmp_path: Path, ckpt_format: str, asynchronous: bool, kills: int
) -> None:
    """No announced checkpoint is ever lost, every resume loads, and the end is that of an uninterrupted run."""
    command = [sys.executable, "-m", "tests.unit.checkpointing.killed_run", str(tmp_path), ckpt_format]
    done = subprocess.run(
        [*command, str(int(asynchronous)), str(kills), "11"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    print({key: report[key] for key in ("kills", "in_save", "steps")})
    assert report["failures"] == [] and report["lost"] == []
    assert report["kills"] == kills and report["in_save"] >= kills // 2
    assert report["resumed"] == report["quiet"]
    assert all(isinstance(digest, list) for digest in report["quiet"]), report["quiet"]
