"""Adam: against a float64 transcript of the formula, and independence of how tensors are cut."""

from __future__ import annotations

import pytest
import torch

from megatron.core.optimizer.adam import Adam

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def _formula(param, grads):
    """AdamW as in Loshchilov and Hutter, algorithm 2, in float64."""
    p, m, v = param.double(), torch.zeros(param.shape).double(), torch.zeros(param.shape).double()
    for t, grad in enumerate(grads, start=1):
        g = grad.double()
        m = 0.9 * m + 0.1 * g
        v = 0.95 * v + 0.05 * g * g
        update = (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        p = p - 1e-2 * (update + 0.1 * p)
    return p


def _run(pieces, grads_of_pieces):
    params = [torch.nn.Parameter(piece.clone()) for piece in pieces]
    optimizer = Adam(params, **SETTINGS)
    for grads in grads_of_pieces:
        for param, grad in zip(params, grads):
            param.grad = grad.clone()
        optimizer.step()
    tensors = [[p.detach() for p in params]]
    tensors += [[optimizer.state[p][key] for p in params] for key in ("exp_avg", "exp_avg_sq")]
    return [torch.cat([t.flatten() for t in column]) for column in tensors]


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_follows_the_formula(dtype, tolerance):
    torch.manual_seed(0)
    param = torch.randn(7, 33, dtype=dtype)
    grads = [torch.randn(7, 33, dtype=dtype) for _ in range(5)]
    result, _, _ = _run([param], [[g] for g in grads])
    torch.testing.assert_close(
        result.double().view(7, 33), _formula(param, grads), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("numel", [1, 17, 1003])
def test_the_result_does_not_depend_on_how_a_parameter_is_cut(numel, dtype):
    """What makes a sharded run equal an unsharded one: torch's fused kernel alone differs in the last bit at edges."""
    torch.manual_seed(1)
    param = torch.randn(numel, dtype=dtype)
    grads = [torch.randn(numel, dtype=dtype) for _ in range(4)]
    whole = _run([param], [[g] for g in grads])
    for cut in {1, 3, 7, 16, numel // 2, numel - 1}:
        if 0 < cut < numel:
            pieces = _run([param[:cut], param[cut:]], [[g[:cut], g[cut:]] for g in grads])
            assert all(torch.equal(a, b) for a, b in zip(whole, pieces))


def test_state_has_the_fused_optimizers_layout():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = Adam([{"params": [param], "wd_mult": 1.0}], **SETTINGS)
    param.grad = torch.ones(3)
    optimizer.step()
    state = optimizer.state_dict()
    assert list(state["state"][0]) == ["exp_avg", "exp_avg_sq"]
    assert list(state["param_groups"][0]) == [
        "wd_mult", "lr", "bias_correction", "betas", "eps", "weight_decay", "step", "params",
    ]  # fmt: skip
    assert state["param_groups"][0]["step"] == 1


def test_groups_without_gradients_count_steps_too():
    optimizer = Adam([{"params": [torch.nn.Parameter(torch.ones(2))]}, {"params": []}], lr=0.1)
    optimizer.step()
    assert [group["step"] for group in optimizer.param_groups] == [1, 1]
