"""Chained optimizers: what they show is the underlying optimizers' own."""

from __future__ import annotations

import pytest
import torch

from megatron.core.errors import CheckpointError
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer


def test_groups_and_state_are_references():
    weights = [torch.nn.Parameter(torch.ones(4)) for _ in range(3)]
    adam = torch.optim.Adam(weights[:2], lr=0.01)
    sgd = torch.optim.SGD(weights[2:], lr=0.1, momentum=0.9)
    chained = ChainedOptimizer([adam, sgd])
    chained.param_groups[0]["lr"] = 0.02
    assert adam.param_groups[0]["lr"] == 0.02 and [g["lr"] for g in chained.param_groups] == [0.02, 0.1]
    assert len(chained.state) == 0
    for weight in weights:
        weight.grad = torch.ones(4)
    adam.step()
    sgd.step()
    assert len(chained.state) == 3
    for key, state in chained.state.items():
        chained.state[key] = dict.fromkeys(state, "replaced")
    assert list(adam.state[weights[0]].values()) == ["replaced"] * 3
    assert sgd.state[weights[2]] == {"momentum_buffer": "replaced"}
    assert list(chained.state) == [(0, weights[0]), (0, weights[1]), (1, weights[2])]


def _model(seed):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    for param in model.parameters():
        param.main_grad = torch.randn_like(param)
    return model


@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_expert_parameters_are_clipped_by_the_common_norm(clip):
    config = OptimizerConfig(lr=0.1, min_lr=0.0, clip_grad=clip)
    plain, split = _model(0), _model(0)
    for param in split[1].parameters():
        param.allreduce = False
    one, two = get_megatron_optimizer(config, [plain]), get_megatron_optimizer(config, [split])
    assert isinstance(two, ChainedOptimizer) and len(two.chained_optimizers) == 2
    success, norm, zeros = two.step()
    _, expected, _ = one.step()
    reference = sum((p.main_grad.double() ** 2).sum() for p in _model(0).parameters()).sqrt().item()
    assert success and norm == pytest.approx(reference, rel=1e-7) and zeros == 0
    assert expected == (pytest.approx(reference, rel=1e-7) if clip else None)
    for a, b in zip(plain.parameters(), split.parameters()):
        assert torch.equal(a, b)


def test_an_overflow_in_one_skips_both():
    config = OptimizerConfig(lr=0.1, min_lr=0.0, fp16=True, initial_loss_scale=4.0, hysteresis=1)
    model = _model(0).half()
    for param in model.parameters():
        param.main_grad = torch.ones_like(param, dtype=torch.float32)
    for param in model[1].parameters():
        param.allreduce = False
    model[1].weight.main_grad[0, 0] = float("nan")
    before = [param.clone() for param in model.parameters()]
    optimizer = get_megatron_optimizer(config, [model])
    assert optimizer.step() == (False, None, None)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_a_state_for_another_number_of_optimizers_is_refused():
    config = OptimizerConfig(lr=0.1, min_lr=0.0)
    model = _model(0)
    for param in model[1].parameters():
        param.allreduce = False
    with pytest.raises(CheckpointError, match="1 optimizers, this run 2"):
        get_megatron_optimizer(config, [model]).load_state_dict([{}])
