"""Predicted steps against published runs: one device profile, nothing fitted to a row (docs/scale.md)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.plans.published import FACTS, predict_a100, predict_h100

POINTS = 5.0
WEAK = FACTS["weak_scaling_h100"]
STRONG = FACTS["strong_scaling_h100"]


@pytest.mark.parametrize("row", WEAK["rows"], ids=lambda row: row["model"])
def test_weak_scaling(row: dict[str, Any]) -> None:
    found = predict_h100(row, row["gpus"], row["tp"], row["pp"], row["global_batch"])
    published = 100 * row["tflops_per_gpu"] / WEAK["peak_tflops"]
    assert found.mfu == pytest.approx(published, abs=POINTS)


@pytest.mark.parametrize("point", STRONG["points"], ids=lambda point: str(point["gpus"]))
def test_strong_scaling(point: dict[str, Any]) -> None:
    """The layout within a replica is that of the 177B row, which is the same model; its replicas grow from 2 to 96."""
    found = predict_h100(STRONG, point["gpus"], 8, 6, STRONG["global_batch"])
    assert found.mfu == pytest.approx(point["mfu_percent"], abs=POINTS)


def test_gpt3_on_a100() -> None:
    """The published rate counts the recomputed forward pass as work: four thirds of the model's FLOPs."""
    run = FACTS["gpt3_175b_a100"]
    found = predict_a100()
    assert found.seconds == pytest.approx(run["seconds_per_iteration"], rel=0.1)
    assert 4 / 3 * found.tflops == pytest.approx(run["tflops_per_gpu"], rel=0.1)
    assert 4 / 3 * found.mfu == pytest.approx(run["share_of_peak_percent"], abs=POINTS)
