"""Whole optimizer steps against v0.9's recorded ones: precision, clipping, loss scale, skipped steps, shared weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from megatron.core.errors import ConfigError
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

CASES = json.loads((Path(__file__).parents[2] / "golden/training/optimizer_steps.json").read_text())["cases"]
DTYPES = {f"torch.{name}": getattr(torch, name) for name in ("float32", "float16", "bfloat16")}


def _model(case):
    """Four parameters in a module tree that gives them their recorded names."""
    model = torch.nn.Module()
    for name, values in case["params_init"].items():
        owner, leaf = name.split(".")
        if not hasattr(model, owner):
            model.add_module(owner, torch.nn.Module())
        param = torch.nn.Parameter(torch.tensor(values, dtype=DTYPES[case["model_dtype"]]))
        param.shared = name in case["shared_params"]
        model.get_submodule(owner).register_parameter(leaf, param)
    return model


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_steps_are_v09s(case):
    settings = {**case["config"], "params_dtype": DTYPES[case["config"]["params_dtype"]]}
    model = _model(case)
    optimizer = get_megatron_optimizer(OptimizerConfig(**settings), [model])
    half = case["model_dtype"] != "torch.float32"
    for step in case["steps"]:
        for group in optimizer.param_groups:
            group.update(lr=step["lr"], weight_decay=settings["weight_decay"] * group["wd_mult"])
        assert optimizer.get_loss_scale().item() == step["loss_scale_before"]
        for name, param in model.named_parameters():
            param.main_grad = torch.tensor(step["unscaled_grads"][name]) * step["loss_scale_before"]
            if step["overflow_injected"]:
                param.main_grad.view(-1)[0] = float("inf")
        success, grad_norm, num_zeros = optimizer.step()
        optimizer.zero_grad()
        assert success is step["success"]
        assert grad_norm == (
            None if step["grad_norm"] is None else pytest.approx(step["grad_norm"], rel=1e-6)
        )
        assert num_zeros == step["num_zeros"]
        assert optimizer.get_loss_scale().item() == step["loss_scale_after"]
        for name, param in model.named_parameters():
            expected = torch.tensor(step["params_after"][name], dtype=param.dtype)
            torch.testing.assert_close(param.detach(), expected, rtol=1e-2 if half else 1e-5, atol=1e-6)
            ulps = param.detach().view(torch.int16).int() - expected.view(torch.int16).int() if half else 0
            assert not half or ulps.abs().max() <= 1
        if half:
            for ours, theirs in zip(
                optimizer.state_dict()["fp32_from_fp16_params"], step["main_params_after"]
            ):
                for main, expected in zip(ours, theirs):
                    torch.testing.assert_close(main, torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["fp32_adam_clip", "bf16_adam", "fp16_dynamic", "fp32_sgd"])
def test_a_restored_optimizer_continues_bitwise(name, tmp_path):
    case = next(case for case in CASES if case["name"] == name)
    settings = {**case["config"], "params_dtype": DTYPES[case["config"]["params_dtype"]]}

    def run(model, optimizer, steps):
        for step in steps:
            for param_name, param in model.named_parameters():
                param.main_grad = torch.tensor(step["unscaled_grads"][param_name]) * step["loss_scale_before"]
            optimizer.step()
            optimizer.zero_grad()

    one = _model(case)
    first = get_megatron_optimizer(OptimizerConfig(**settings), [one])
    run(one, first, case["steps"][:2])
    torch.save({"model": one.state_dict(), "optimizer": first.state_dict()}, tmp_path / "state.pt")
    run(one, first, case["steps"][2:])

    two = _model(case)
    second = get_megatron_optimizer(OptimizerConfig(**settings), [two])
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    two.load_state_dict(state["model"])
    second.load_state_dict(state["optimizer"])
    run(two, second, case["steps"][2:])
    for a, b in zip(one.parameters(), two.parameters()):
        assert torch.equal(a, b)


def test_float64_parameters_are_updated_in_float64():
    param = torch.nn.Parameter(torch.full((5,), 1.0, dtype=torch.float64))
    model = torch.nn.Module()
    model.register_parameter("weight", param)
    config = OptimizerConfig(lr=1e-3, min_lr=0.0, weight_decay=0.0, clip_grad=0.5, params_dtype=torch.float64)
    optimizer = get_megatron_optimizer(config, [model])
    gradient = torch.linspace(1, 2, 5, dtype=torch.float64)
    param.main_grad = gradient.clone()
    _, norm, _ = optimizer.step()
    assert norm == pytest.approx(gradient.norm().item(), rel=1e-15)
    clipped = gradient * (0.5 / (gradient.norm() + 1e-6))
    # The first Adam step moves by lr * g / (|g| + eps).
    expected = 1.0 - 1e-3 * clipped / (clipped.abs() + 1e-8)
    assert torch.allclose(param.detach(), expected, rtol=1e-15, atol=0)


def test_groups_from_torch_adamw_carry_their_step_over():
    case = CASES[0]
    model, other = _model(case), _model(case)
    settings = {**case["config"], "params_dtype": torch.float32, "clip_grad": 0.0}
    ours = get_megatron_optimizer(OptimizerConfig(**settings), [model])
    groups = [
        {"params": [p for p in other.parameters() if (p.dim() > 1) is decays], "weight_decay": 0.1 * decays}
        for decays in (True, False)
    ]
    theirs = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    for step in case["steps"][:2]:
        for name, param in other.named_parameters():
            param.grad = torch.tensor(step["unscaled_grads"][name])
        theirs.step()
    with torch.no_grad():
        for a, b in zip(model.parameters(), other.parameters()):
            a.copy_(b)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert [group["step"] for group in ours.param_groups] == [2, 2]
    for name, param in other.named_parameters():
        param.grad = torch.tensor(case["steps"][2]["unscaled_grads"][name])
    for name, param in model.named_parameters():
        param.main_grad = torch.tensor(case["steps"][2]["unscaled_grads"][name])
    theirs.step()
    for group, decay in zip(ours.param_groups, (0.1, 0.0)):
        group.update(weight_decay=decay, lr=0.01)
    ours.step()
    for a, b in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_a_learning_rate_may_come_with_the_scheduler(kind, bf16):
    def model():
        torch.manual_seed(0)
        return torch.nn.Linear(4, 3, dtype=torch.bfloat16 if bf16 else torch.float32)

    def settings(**lr):
        dtype = torch.bfloat16 if bf16 else torch.float32
        return OptimizerConfig(optimizer=kind, bf16=bf16, params_dtype=dtype, weight_decay=0.0, **lr)

    def step(module, optimizer):
        for param in module.parameters():
            param.main_grad = torch.ones(param.shape)
        optimizer.step()

    module, expected = model(), model()
    optimizer = get_megatron_optimizer(settings(), [module])
    with pytest.raises(ConfigError, match="no learning rate was set"):
        step(module, optimizer)
    constant = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=0.1, min_lr=0.0, lr_warmup_steps=0, lr_decay_steps=10,
        lr_decay_style="constant", start_wd=0.0, end_wd=0.0, wd_incr_steps=10, wd_incr_style="constant",
    )  # fmt: skip
    constant.step(1)
    step(module, optimizer)
    step(expected, get_megatron_optimizer(settings(lr=0.1), [expected]))
    for ours, theirs in zip(module.parameters(), expected.parameters()):
        assert torch.equal(ours, theirs) and ours.abs().max() > 0
