"""One process against v0.9: logits, losses and every gradient norm of the recorded checkpoints."""

from __future__ import annotations

import pytest
import torch

from tests.unit.models import recorded

MODELS = ["gpt", "vpp", "llama", "bert", "t5", "moe"]


@pytest.mark.parametrize("name", MODELS)
def test_recorded_model(name: str) -> None:
    model = recorded.build(name)
    model.load_state_dict(recorded.weights(name), strict=True)
    expected = recorded.arrays(name, "expected.npz")
    result = recorded.run(name, model, recorded.arrays(name, "batch.npz"))
    for key, value in expected.items():
        torch.testing.assert_close(
            result[key].detach().float(), value, rtol=1e-5, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}"
        )
    result["loss"].backward()
    norms = {key: p.grad.norm().item() for key, p in model.named_parameters()}
    recorded_norms = recorded.grad_norms(name)
    assert norms.keys() == recorded_norms.keys()
    for key, norm in norms.items():
        assert norm == pytest.approx(recorded_norms[key], rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_names_and_order(name: str) -> None:
    """The names v0.9 wrote, in its order: converters and parameter groups rely on both."""
    model = recorded.build(name)
    assert list(model.state_dict_for_save_checkpoint()) == list(recorded.weights(name))
