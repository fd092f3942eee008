"""The GPU benchmark at toy size on the CPU: every contender runs, figures follow from times, pages get their table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu_pretrain

ROOT = Path(__file__).resolve().parents[2]


def test_every_contender_runs_at_toy_size(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "benchmarks/gpu_pretrain.py",
        "--smoke",
        "--steps",
        "1",
        "--output",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("gpu_*.json")
    runs = json.loads(path.read_text())["runs"]
    assert set(runs) == {f"toy s32 {who}" for who in gpu_pretrain.CONTENDERS}
    for run in runs.values():
        assert run["tokens_per_second"] * run["step_ms"] / 1e3 == pytest.approx(2 * 2 * 32)
        assert run["mfu"] == pytest.approx(run["model_tflops"] / 989)


def test_flops_are_megatrons() -> None:
    """GPT-3 175B, 1536 sequences of 2048: 4.5e18 x 96/72 FLOPs without recomputation (arXiv:2104.04473, appendix)."""
    case = gpu_pretrain.Case("175B", 96, 12288, 96, 2048, 1536, count=1, vocab=51200)
    expected = 72 * 1536 * 2048 * 96 * 12288**2 * (1 + 2048 / (6 * 12288) + 51200 / (12 * 96 * 12288))
    assert case.flops() == pytest.approx(expected, rel=1e-12)


def test_pages_get_the_table_between_their_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- gpu: begin -->\nold\n<!-- gpu: end -->\nafter\n")
    results = {
        "device": "NVIDIA H200", "date": "2026-01-01", "torch": "2.11", "python": "Python 3.12",
        "runs": {"124M s1024 ours": {
            "micro_batch": 32, "step_ms": 1.0, "tokens_per_second": 1234567.0, "model_tflops": 500.0, "mfu": 0.5056,
            "peak_gib": 30.0,
        }},
    }  # fmt: skip
    gpu_pretrain.insert(page, gpu_pretrain.table(results))
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| 124M s1024 | 32 | ours | 1,234,567 | 500 | 50.6 % | 30.0 |" in text
    assert "| 7B s4096 | 1 | ours fp8 | not measured | | | |" in text
    unmarked = tmp_path / "other.md"
    unmarked.write_text("as it was\n")
    gpu_pretrain.insert(unmarked, "table")
    assert unmarked.read_text() == "as it was\n"
