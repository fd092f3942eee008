"""v0.9's recorded pretraining runs, repeated: losses, norms, learning rates, evaluation losses.

Recordings: tests/golden/training/e2e_traces.json. Runs with dropout draw other random numbers here and must agree only
roughly; mixtures of experts have runs of their own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.gang.harness import run_gang
from tests.runs.pretraining import records

RECORDED = json.loads((Path(__file__).parents[1] / "golden/training/e2e_traces.json").read_text())["cases"]
CASES = {case["name"]: case for case in RECORDED}


def tolerance(name: str) -> float:
    """Absolute, on losses of about 8.5."""
    if "dropout" in name:
        return 1e-2  # measured 2.1e-3
    if "bf16" in name or "fp16" in name:
        return 5e-4  # measured 1.1e-4
    return 2e-6  # measured 9.6e-7: two units in the last place


@pytest.mark.parametrize("name", CASES)
def test_run_follows_the_recording(name: str) -> None:
    case = CASES[name]
    written = run_gang(case["world_size"], records, case["argv"])[-1]
    train = [record for record in written if record["kind"] == "train"]
    evaluations = [record for record in written if record["kind"] == "validation"]
    assert len(train) == len(case["train"])
    assert len(evaluations) == len(case["eval"])
    bound = tolerance(name)
    for ours, theirs in zip(train, case["train"]):
        check_iteration(ours, theirs, bound)
    for ours, theirs in zip(evaluations, case["eval"]):
        assert ours["lm loss"] == pytest.approx(theirs["losses"]["lm loss"], abs=bound)


def check_iteration(ours: dict[str, Any], theirs: dict[str, Any], bound: float) -> None:
    assert ours["iteration"] == theirs["iteration"]
    assert ours["consumed_samples"] == theirs["consumed_samples"]
    assert ours["learning_rate"] == theirs["lr"]
    assert ours["loss_scale"] == theirs["loss_scale"]
    assert ours["skipped_iterations"] == theirs["skipped"]
    if not theirs["skipped"]:
        assert ours["lm loss"] == pytest.approx(theirs["losses"]["lm loss"], abs=bound)
    for key in ("grad_norm", "params_norm"):
        if theirs[key] is not None:
            # v0.9 sums squares in fp32 where this project does not: 5e-5 of the norm. Other dropout masks: 2.7e-2.
            assert ours[key] == pytest.approx(theirs[key], rel=max(1e-4, 4 * bound))
