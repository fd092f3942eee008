"""Loss scalers against v0.9's recorded traces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron.core.optimizer.grad_scaler import ConstantGradScaler, DynamicGradScaler

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/training/loss_scaler.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["dynamic"], ids=lambda case: case["name"])
def test_trace_is_v09s(case):
    scaler = DynamicGradScaler(**case["params"])
    for found_inf, scale, growth, hysteresis, inverse in case["rows"]:
        if found_inf is not None:
            scaler.update(bool(found_inf))
        state = scaler.state_dict()
        assert (state["scale"].item(), state["growth_tracker"], state["hysteresis_tracker"]) == (
            scale,
            growth,
            hysteresis,
        )
        assert scaler.inv_scale.item() == pytest.approx(inverse, rel=1e-7)
    assert sorted(state) == sorted(GOLDEN["state_dict_keys"])


@pytest.mark.parametrize("params,error", GOLDEN["constructor_errors"])
def test_impossible_settings_are_refused(params, error):
    assert error == "AssertionError"
    with pytest.raises(AssertionError, match="Fix:"):
        DynamicGradScaler(growth_factor=2.0, backoff_factor=0.5, **params)


def test_constant_scale_ignores_overflows():
    scaler = ConstantGradScaler(GOLDEN["constant_after_overflow"]["scale"])
    scaler.update(True)
    assert scaler.scale.item() == GOLDEN["constant_after_overflow"]["scale"]
    assert scaler.state_dict() == GOLDEN["constant_after_overflow"]["state_dict"]


def test_a_restored_scaler_continues_alike():
    settings = {
        "initial_scale": 1024.0,
        "min_scale": 1.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 3,
        "hysteresis": 2,
    }
    one, two = DynamicGradScaler(**settings), DynamicGradScaler(**settings)
    for found in (True, False, False):
        one.update(found)
    two.load_state_dict(one.state_dict())
    for found in (False, True, True, False, False, False, False):
        one.update(found)
        two.update(found)
        assert torch.equal(one.scale, two.scale) and one.state_dict() == two.state_dict()
