"""The fused functions under the names and conventions that users' code calls them by."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.fusions import fused_bias_geglu, fused_bias_gelu, fused_bias_swiglu
from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.torch_layer_norm import WrappedTorchLayerNorm
from megatron.core.transformer.utils import attention_mask_func


def softmax(mask_type: AttnMaskType) -> FusedScaleMaskSoftmax:
    return FusedScaleMaskSoftmax(
        input_in_fp16=False,
        input_in_bf16=False,
        attn_mask_type=mask_type,
        scaled_masked_softmax_fusion=False,
        mask_func=attention_mask_func,
        softmax_in_fp32=True,
        scale=None,
    )


def test_causal_scores_without_a_mask_are_square_or_of_one_query() -> None:
    causal = softmax(AttnMaskType.causal)
    equal = causal(torch.zeros(2, 3, 4, 4), None)
    assert torch.allclose(equal, torch.tril(torch.ones(4, 4)) / torch.arange(1, 5).view(-1, 1))
    scores = torch.randn(2, 3, 1, 6)
    assert torch.allclose(causal(scores, None), scores.softmax(-1))
    with pytest.raises(AssertionError, match="4 queries and 6 keys"):
        causal(torch.zeros(1, 1, 4, 6), None)
    assert softmax(AttnMaskType.padding)(torch.zeros(1, 1, 4, 6), None).shape == (1, 1, 4, 6)


def test_the_norm_of_a_layer_counts_as_one_of_torch() -> None:
    config = TransformerConfig(num_layers=1, hidden_size=6, num_attention_heads=2)
    norm = WrappedTorchLayerNorm(config, 6, eps=1e-3)
    assert isinstance(norm, torch.nn.LayerNorm) and norm.normalized_shape == (6,)
    assert str(norm).endswith(str(torch.nn.LayerNorm(6, eps=1e-3)).removeprefix("LayerNorm"))
    assert {name: value.shape for name, value in norm.state_dict().items()} == {"weight": (6,), "bias": (6,)}
    with torch.no_grad():
        norm.weight.copy_(torch.arange(6.0))
        norm.bias.fill_(0.5)
    x = torch.randn(4, 6)
    torch.testing.assert_close(norm(x), F.layer_norm(x, (6,), torch.arange(6.0), torch.full((6,), 0.5), 1e-3))


def gated(y: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    gate, up = y.chunk(2, -1)
    return activation(gate) * up


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


@pytest.mark.parametrize(
    ("back", "reference", "tolerance"),
    [
        (fused_bias_swiglu.bias_swiglu_back, lambda y: gated(y, F.silu), 1e-12),
        (fused_bias_geglu.bias_geglu_back, lambda y: gated(y, gelu), 1e-12),
        # v0.9's rounded constant differs from torch's in the ninth digit.
        (lambda g, y, bias: fused_bias_gelu.bias_gelu_back(g, bias, y), gelu, 1e-7),
    ],
)
def test_gradient_functions_take_tensors_of_a_graph(
    back: Callable[[Tensor, Tensor, Tensor], Tensor], reference: Callable[[Tensor], Tensor], tolerance: float
) -> None:
    """Called by hand, inside a graph or out of it, they give autograd's gradient, and can be differentiated again."""
    torch.manual_seed(4)
    y = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float64)
    out = reference(y + bias)
    g = torch.randn_like(out)
    (expected,) = torch.autograd.grad(out, y, g, create_graph=True)
    found = back(g, y, bias)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        torch.testing.assert_close(back(g, y, bias), expected, rtol=tolerance, atol=tolerance)
    (second,) = torch.autograd.grad(expected.square().sum(), y)
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), y)[0], second, rtol=tolerance, atol=10 * tolerance
    )
