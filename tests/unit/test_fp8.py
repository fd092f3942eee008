"""fp8 linear layers, emulated on the CPU, against float64 within the rounding that the formats allow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core import fp8
from megatron.core.errors import ConfigError
from megatron.core.fp8.recipe import GRADIENT, INPUT, WEIGHT
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, update_fp8_scales
from megatron.core.transformer.transformer_config import TransformerConfig

#: Largest relative error of rounding to a format, and the spacing of its smallest numbers.
ROUNDING = {torch.float8_e4m3fn: (2.0**-4, 2.0**-9), torch.float8_e5m2: (2.0**-3, 2.0**-16)}


def config(**fields: Any) -> TransformerConfig:
    base: dict[str, Any] = {
        "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "fp8": "hybrid", "use_cpu_initialization": True,
    }  # fmt: skip
    return TransformerConfig(**(base | fields))


def column(fields: TransformerConfig) -> ColumnParallelLinear:
    torch.manual_seed(0)
    return ColumnParallelLinear(
        32, 48, config=fields, init_method=torch.nn.init.xavier_normal_, bias=True, gather_output=False
    )


def allowed_error(a: Tensor, b: Tensor, formats: tuple[torch.dtype, torch.dtype]) -> Tensor:
    """Bound on |fp8(a) fp8(b)^T - a b^T| for tensors scaled by their own amax: each factor is off by its rounding."""

    def off(x: Tensor, fmt: torch.dtype) -> Tensor:
        relative, spacing = ROUNDING[fmt]
        return x.abs() * relative + spacing * x.abs().max() / torch.finfo(fmt).max

    da, db = off(a, formats[0]), off(b, formats[1])
    return da @ b.abs().t() + a.abs() @ db.t() + da @ db.t()


@pytest.mark.parametrize("name", ["e4m3", "hybrid"])
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_values_and_gradients_are_within_rounding_of_float64(name: str, recipe: str) -> None:
    layer = column(config(fp8=name, fp8_recipe=recipe))
    x = torch.randn(8, 2, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    dy = torch.randn(8, 2, 48, generator=torch.Generator().manual_seed(2)) * 1e-5
    y, _ = layer(x)
    y.backward(dy)
    x64, w64, dy64 = (
        x.detach().double().view(16, 32),
        layer.weight.detach().double(),
        dy.double().view(16, 48),
    )
    forward, backward = torch.float8_e4m3fn, torch.float8_e5m2 if name == "hybrid" else torch.float8_e4m3fn
    for got, a, b, formats in (
        (y.detach().view(16, 48), x64, w64, (forward, forward)),
        (x.grad.view(16, 32), dy64, w64.t(), (backward, forward)),
        (layer.weight.grad, dy64.t(), x64.t(), (backward, forward)),
    ):
        error, allowed = (got.double() - a @ b.t()).abs(), allowed_error(a, b, formats)
        assert (error <= 1.001 * allowed).all()
        assert error.max() > 1e-4 * allowed.max(), "nothing was rounded"
    assert torch.allclose(layer.bias.grad, dy.sum((0, 1)))


def test_weight_gradients_stay_exact_on_request() -> None:
    layer = column(config(fp8_wgrad=False))
    x = torch.randn(8, 2, 32)
    y, _ = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert torch.allclose(layer.weight.grad, dy.view(16, 48).t() @ x.view(16, 32), atol=1e-5)


def test_gradients_are_added_to_the_main_gradient() -> None:
    for wgrad in (True, False):
        layer = column(config(gradient_accumulation_fusion=True, fp8_wgrad=wgrad))
        layer.weight.main_grad = torch.full_like(layer.weight, 3.0)
        plain = column(config(fp8_wgrad=wgrad))
        x = torch.randn(8, 2, 32)
        for each in (layer, plain):
            each(x)[0].sum().backward()
        assert layer.weight.grad is None and layer.weight.grad_added_to_main_grad
        assert torch.allclose(layer.weight.main_grad, plain.weight.grad + 3.0, atol=1e-5)


@pytest.mark.parametrize(("algorithm", "expected"), [("most_recent", 2.0), ("max", 8.0)])
def test_delayed_scales_follow_the_history(algorithm: str, expected: float) -> None:
    """Magnitudes 1, 8, 2 in a history of two: the last is 2, the largest remembered 8."""
    fields = config(fp8_amax_history_len=2, fp8_amax_compute_algo=algorithm, fp8_margin=1)
    layer = column(fields)
    operands = layer._fp8
    for size in (1.0, 8.0, 2.0):
        layer.is_first_microbatch = True
        for part in (0.5, 1.0):  # two microbatches: the larger counts
            y, _ = layer(torch.full((8, 2, 32), size * part))
            y.backward(torch.full_like(y, 4.0))
        update_fp8_scales([layer], fields)
    top = {INPUT: 448.0, WEIGHT: 448.0, GRADIENT: 57344.0}
    amax = {INPUT: expected, WEIGHT: layer.weight.abs().max().item(), GRADIENT: 4.0}
    for role in (INPUT, WEIGHT, GRADIENT):
        assert operands.scales[role].item() == pytest.approx(top[role] / amax[role] / 2, rel=1e-6)
    assert operands.history[INPUT].tolist() == [0.0, 2.0]
    update_fp8_scales([layer], fields)
    unseen = operands.scales.clone()
    update_fp8_scales([layer], fields)
    assert torch.equal(operands.scales, unseen), "a layer that saw nothing keeps its scales"


def test_a_delayed_scale_is_the_one_of_the_step_before() -> None:
    fields = config()
    layer = column(fields)
    layer(torch.ones(8, 2, 32))
    update_fp8_scales([layer], fields)
    y, _ = layer(torch.full((8, 2, 32), 5.0))  # five times what the scale was made for: saturates
    weight = layer.weight.detach().double()
    assert torch.allclose(y[0, 0].double(), weight.sum(1), atol=float(0.07 * weight.abs().sum(1).max()))


def test_the_weight_is_quantised_once_per_step_and_afresh_in_evaluation() -> None:
    layer = column(config())
    x = torch.ones(8, 2, 32)
    first, _ = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2.0)
    assert torch.equal(layer(x)[0], first)
    layer.is_first_microbatch = True
    assert torch.allclose(layer(x)[0], 2 * first)
    layer.eval()
    with torch.no_grad():
        layer.weight.mul_(2.0)
    history = layer._fp8.history.clone()
    assert torch.allclose(layer(x)[0], 4 * first)
    assert torch.equal(layer._fp8.history, history), "evaluation leaves the history alone"


def test_nan_is_not_hidden_by_saturation() -> None:
    layer = column(config())
    x = torch.ones(8, 2, 32)
    x[0, 0, 0] = torch.nan
    assert layer(x)[0].isnan().any()


def test_scales_are_part_of_a_checkpoint() -> None:
    fields = config(fp8_amax_history_len=3)
    layer = column(fields)
    assert layer.get_extra_state() is None
    y, _ = layer(torch.randn(8, 2, 32))
    y.sum().backward()
    update_fp8_scales([layer], fields)
    other = column(fields)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other._fp8.scales, layer._fp8.scales) and other._fp8.known
    assert torch.equal(other._fp8.history, layer._fp8.history)
    shorter = column(config(fp8_amax_history_len=1))
    shorter.load_state_dict(layer.state_dict())
    assert not shorter._fp8.known
    column(config(fp8=None)).load_state_dict(layer.state_dict())


def test_odd_sizes_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"--fp8-format.*40.*--hidden-size"):
        RowParallelLinear(
            40, 32, config=config(), init_method=torch.nn.init.zeros_, bias=False, input_is_parallel=True,
            skip_bias_add=True,
        )  # fmt: skip


def test_first_and_last_layers_and_the_output_layer_stay_out() -> None:
    fields = config(num_layers=5, first_last_layers_bf16=True, num_layers_at_end_in_bf16=2)
    assert [fp8.config_of_layer(fields, i).fp8 for i in range(5)] == [None, "hybrid", "hybrid", None, None]
    assert fields.fp8 == "hybrid"

    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    model = GPTModel(fields, get_gpt_layer_local_spec(), vocab_size=64, max_sequence_length=16)
    assert model.output_layer._fp8 is None
    linears = [m for m in model.modules() if isinstance(m, ColumnParallelLinear | RowParallelLinear)]
    assert sum(m._fp8 is not None for m in linears) == 2 * 4
