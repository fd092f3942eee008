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

from megatron.core.kernels.registry import HALF, register

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
    """`bias_gelu` with few and cheap passes over memory.

    In fp32 tanh is what costs: (1 + tanh u) / 2 = sigmoid(2u) takes a seventh of its time on a CPU and is
    kept for the backward pass. In half precision the steps in between would be rounded, so torch's fused
    gelu computes inside registers.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor) -> Tensor:
        """input [..., f], bias [f] -> [..., f]."""
        x = input + bias
        if x.dtype in HALF:
            ctx.save_for_backward(x)
            return F.gelu(x, approximate="tanh")
        slope = x.new_full((), 2 * SQRT_2_OVER_PI)
        gate = torch.addcmul(slope, x, x, value=2 * SQRT_2_OVER_PI * CUBIC).mul_(x).sigmoid_()
        ctx.save_for_backward(x, gate)
        return x * gate

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        """grad_output [..., f] -> gradients of input [..., f] and bias [f]."""
        x, *gates = ctx.saved_tensors
        if not gates:
            grad = torch.ops.aten.gelu_backward(grad_output, x, approximate="tanh")
            return grad, grad.reshape(-1, grad.shape[-1]).sum(0)
        gate = gates[0]
        # d/dx (x s(2u)) = s + x s (1 - s) 2u'
        slope = x.new_full((), 2 * SQRT_2_OVER_PI)
        grad = torch.addcmul(slope, x, x, value=6 * SQRT_2_OVER_PI * CUBIC).mul_(x)
        grad.mul_(torch.addcmul(gate, gate, gate, value=-1)).add_(gate).mul_(grad_output)
        return grad, grad.reshape(-1, grad.shape[-1]).sum(0)


def bias_gelu_impl(input: Tensor, bias: Tensor) -> Tensor:
    """gelu(input + bias): input [..., f], bias [f] -> [..., f]; the torch implementation under its v0.9
    name.
    """
    return GeLUFunction.apply(input, bias)


@register("bias_gelu", "torch", rank=0)
def _load() -> Any:
    return bias_gelu_impl
