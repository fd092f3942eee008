"""GEGLU with an optional bias: gelu(first half) * second half, gelu in the tanh form (arXiv:2002.05202)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.core.kernels.registry import register


def geglu(y: Tensor) -> Tensor:
    """Eager reference. y [..., 2f] = (gate, up) -> gelu_tanh(gate) * up [..., f]."""
    gate, up = torch.chunk(y, 2, -1)
    return F.gelu(gate, approximate="tanh") * up


def bias_geglu(bias: Tensor, y: Tensor) -> Tensor:
    """geglu(y + bias): y [..., 2f], bias [2f] -> [..., f]."""
    return geglu(y + bias)


def geglu_back(g: Tensor, y: Tensor) -> Tensor:
    """Gradient of `geglu`: g [..., f], y [..., 2f] -> [..., 2f]."""
    gate, up = torch.chunk(y, 2, -1)
    if torch.is_grad_enabled():  # the caller may differentiate further, which writing into a buffer forbids
        grad_gate = torch.ops.aten.gelu_backward(g * up, gate, approximate="tanh")
        return torch.cat((grad_gate, g * F.gelu(gate, approximate="tanh")), -1)
    grad = torch.empty_like(y)
    grad_gate, grad_up = torch.chunk(grad, 2, -1)
    torch.mul(g, F.gelu(gate, approximate="tanh"), out=grad_up)
    torch.ops.aten.gelu_backward.grad_input(g * up, gate, approximate="tanh", grad_input=grad_gate)
    return grad


def bias_geglu_back(g: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """Gradient of `bias_geglu` with respect to y: g [..., f], y [..., 2f], bias [2f] -> [..., 2f]."""
    return geglu_back(g, y + bias)


class BiasGeGLUFunction(torch.autograd.Function):
    """`bias_geglu` saving only its inputs."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor) -> Tensor:
        """input [..., 2f], bias [2f] -> [..., f]."""
        ctx.save_for_backward(input, bias)
        return bias_geglu(bias, input)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        """grad_output [..., f] -> gradients of input [..., 2f] and bias [2f]."""
        input, bias = ctx.saved_tensors
        grad = bias_geglu_back(grad_output, input, bias)
        return grad, grad.reshape(-1, grad.shape[-1]).sum(0)


class GeGLUFunction(torch.autograd.Function):
    """`geglu` saving only its input."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        """input [..., 2f] -> [..., f]."""
        ctx.save_for_backward(input)
        return geglu(input)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        """grad_output [..., f] -> gradient of input [..., 2f]."""
        return geglu_back(grad_output, ctx.saved_tensors[0])


def bias_geglu_impl(input: Tensor, bias: Tensor | None) -> Tensor:
    """gelu(gate) * up of input + bias: input [..., 2f], bias [2f] or None -> [..., f]."""
    return GeGLUFunction.apply(input) if bias is None else BiasGeGLUFunction.apply(input, bias)


@register("bias_geglu", "torch", rank=0)
def _load() -> Any:
    return bias_geglu_impl
