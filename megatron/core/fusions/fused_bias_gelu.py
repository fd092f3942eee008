"""GELU of a biased input, in the tanh form; the input is kept and the activation recomputed in the backward
pass.

gelu(x) = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), with v0.9's rounded constants. The unfused `F.gelu`
of a model is the exact (erf) form, so `--no-bias-gelu-fusion` changes numbers in the fourth digit, as in
v0.9.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.kernels.registry import register

SQRT_2_OVER_PI = 0.79788456
CUBIC = 0.044715


def bias_gelu(bias: Tensor, y: Tensor) -> Tensor:
    """Eager reference. y [..., f], bias [f] -> gelu(y + bias) [..., f]."""
    x = bias + y
    return x * 0.5 * (1.0 + torch.tanh(SQRT_2_OVER_PI * x * (1 + CUBIC * x * x)))


def bias_gelu_back(g: Tensor, bias: Tensor, y: Tensor) -> Tensor:
    """Gradient of `bias_gelu` with respect to y (not yet summed over rows for the bias). All [..., f]."""
    x = bias + y
    tanh = torch.tanh(SQRT_2_OVER_PI * x * (1 + CUBIC * x * x))
    slope = 0.5 * x * ((1 - tanh * tanh) * SQRT_2_OVER_PI * (1 + 3 * CUBIC * x * x)) + 0.5 * (1 + tanh)
    return slope * g


class GeLUFunction(torch.autograd.Function):
    """`bias_gelu` with torch's vectorised tanh-gelu, saving only its two inputs."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor) -> Tensor:
        """input [..., f], bias [f] -> [..., f]."""
        ctx.save_for_backward(input, bias)
        return F.gelu(input + bias, approximate="tanh")

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        """grad_output [..., f] -> gradients of input [..., f] and bias [f]."""
        input, bias = ctx.saved_tensors
        grad = torch.ops.aten.gelu_backward(grad_output, input + bias, approximate="tanh")
        return grad, grad.reshape(-1, grad.shape[-1]).sum(0)


def bias_gelu_impl(input: Tensor, bias: Tensor) -> Tensor:
    """gelu(input + bias): input [..., f], bias [f] -> [..., f]; the torch implementation under its v0.9
    name.
    """
    return GeLUFunction.apply(input, bias)


@register("bias_gelu", "torch", rank=0)
def _load() -> Any:
    return bias_gelu_impl
