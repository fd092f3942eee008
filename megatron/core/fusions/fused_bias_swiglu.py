"""SwiGLU with an optional bias: silu(first half) * second half (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron.core.kernels.registry import register


def swiglu(y: Tensor) -> Tensor:
    """Eager reference. y [..., 2f] = (gate, up) -> silu(gate) * up [..., f]."""
    gate, up = torch.chunk(y, 2, -1)
    return F.silu(gate) * up


def bias_swiglu(y: Tensor, bias: Tensor) -> Tensor:
    """swiglu(y + bias): y [..., 2f], bias [2f] -> [..., f]."""
    return swiglu(y + bias)


def swiglu_back(g: Tensor, y: Tensor, activated: Tensor | None = None) -> Tensor:
    """Gradient of `swiglu`: g [..., f], y [..., 2f], silu(gate) [..., f] if at hand -> [..., 2f]."""
    gate, up = torch.chunk(y, 2, -1)
    if torch.is_grad_enabled():  # the caller may differentiate further, which writing into a buffer forbids
        sigmoid = torch.sigmoid(gate)
        return torch.cat((g * up * sigmoid * (1 + gate * (1 - sigmoid)), g * gate * sigmoid), -1)
    grad = torch.empty_like(y)
    grad_gate, grad_up = torch.chunk(grad, 2, -1)
    torch.mul(g, F.silu(gate) if activated is None else activated, out=grad_up)
    torch.ops.aten.silu_backward.grad_input(g * up, gate, grad_input=grad_gate)
    return grad


def bias_swiglu_back(g: Tensor, y: Tensor, bias: Tensor) -> Tensor:
    """Gradient of `bias_swiglu` with respect to y: g [..., f], y [..., 2f], bias [2f] -> [..., 2f]."""
    return swiglu_back(g, y + bias)


class SwiGLUFunction(torch.autograd.Function):
    """`swiglu` saving its input, optionally in fp8; on a CPU, where time is scarcer than memory, also silu(gate)."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, fp8_input_store: bool) -> Tensor:
        """input [..., 2f] -> [..., f]."""
        gate, up = torch.chunk(input, 2, -1)
        activated = F.silu(gate)
        kept = activated if input.device.type == "cpu" and not fp8_input_store else None
        ctx.save_for_backward(input.to(torch.float8_e4m3fn) if fp8_input_store else input, kept)
        ctx.dtype = input.dtype
        return activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        """grad_output [..., f] -> gradient of input [..., 2f]."""
        input, activated = ctx.saved_tensors
        return swiglu_back(grad_output, input.to(ctx.dtype), activated), None


class BiasSwiGLUFunction(torch.autograd.Function):
    """`bias_swiglu`: the same of the biased input."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor, fp8_input_store: bool) -> Tensor:
        """input [..., 2f], bias [2f] -> [..., f]."""
        if not fp8_input_store:
            ctx.has_bias = False
            return SwiGLUFunction.forward(ctx, input + bias, False)
        ctx.save_for_backward(input.to(torch.float8_e4m3fn), bias)
        ctx.dtype, ctx.has_bias = input.dtype, True
        return bias_swiglu(input, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        """grad_output [..., f] -> gradients of input [..., 2f] and bias [2f]."""
        if ctx.has_bias:
            input, bias = ctx.saved_tensors
            grad = bias_swiglu_back(grad_output, input.to(ctx.dtype), bias)
        else:
            grad, _ = SwiGLUFunction.backward(ctx, grad_output)
        return grad, grad.reshape(-1, grad.shape[-1]).sum(0), None


def bias_swiglu_impl(input: Tensor, bias: Tensor | None, fp8_input_store: bool = False) -> Tensor:
    """silu(gate) * up of input + bias: input [..., 2f], bias [2f] or None -> [..., f]."""
    if bias is None:
        return SwiGLUFunction.apply(input, fp8_input_store)
    return BiasSwiGLUFunction.apply(input, bias, fp8_input_store)


@register("bias_swiglu", "torch", rank=0)
def _load() -> Any:
    return bias_swiglu_impl
