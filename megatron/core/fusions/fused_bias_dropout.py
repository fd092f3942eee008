"""residual + dropout(x + bias): the joint after attention and MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron.core.fusions.dropout import keep_mask, keep_scale
from megatron.core.kernels.registry import Spec, register, select

WithBias = tuple[Tensor, "Tensor | None"]


def _bias_dropout_add_func(x_with_bias: WithBias, residual: Tensor, prob: float, training: bool) -> Tensor:
    """Eager reference. x, residual [s, b, h], bias [h] or [.., h] or None -> [s, b, h] in the wider of both dtypes.

    A residual stream in fp32 (`--fp32-residual-connection`) stays fp32; v0.9 narrowed it at the first
    addition.
    """
    x, bias = x_with_bias
    if bias is not None:
        x = x + bias
    return residual + torch.nn.functional.dropout(x, p=prob, training=training)


class BiasDropoutAddFunction(torch.autograd.Function):
    """The same in few passes over memory, saving one byte per element: the mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, residual: Tensor, prob: float) -> Tensor:
        """x, residual [..., h], bias [h] or None -> [..., h]."""
        mask = keep_mask(x.shape, prob, x.device)
        ctx.save_for_backward(mask)
        ctx.has_bias, ctx.scale, ctx.dtypes = bias is not None, keep_scale(prob), (x.dtype, residual.dtype)
        kept = (x + bias).mul_(mask) if bias is not None else x * mask
        return torch.add(residual, kept, alpha=ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None]:
        """grad_output [..., h] -> gradients of x [..., h], bias [h], residual [..., h]."""
        (mask,) = ctx.saved_tensors
        x_dtype, residual_dtype = ctx.dtypes
        grad = grad_output.to(x_dtype) * mask
        grad = grad.mul_(ctx.scale)
        bias_grad = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.has_bias else None
        return grad, bias_grad, grad_output.to(residual_dtype), None


def bias_dropout_add(x: Tensor, bias: Tensor | None, residual: Tensor, prob: float) -> Tensor:
    """residual + dropout(x + bias, prob) in training: x, residual [..., h], bias [h] or None -> [..., h]."""
    if prob == 0.0:
        return residual + x if bias is None else residual + (x + bias)
    return BiasDropoutAddFunction.apply(x, bias, residual, prob)


def bias_dropout_add_unfused(training: bool) -> Callable[[WithBias, Tensor, float], Tensor]:
    """The eager reference with `training` bound: (x_with_bias, residual, prob) -> [s, b, h]."""

    def unfused(x_with_bias: WithBias, residual: Tensor, prob: float) -> Tensor:
        return _bias_dropout_add_func(x_with_bias, residual, prob, training)

    return unfused


def _with_bias_per_column(x_with_bias: WithBias) -> WithBias:
    """A bias of more than one dimension is added here: the fused forms sum the gradient of theirs over all rows."""
    x, bias = x_with_bias
    if bias is None or bias.dim() == 1:
        return x_with_bias
    return x + bias, None


def bias_dropout_add_fused_train(x_with_bias: WithBias, residual: Tensor, prob: float) -> Tensor:
    """residual + dropout(x + bias): x, residual [s, b, h], bias [h] or [.., h] or None -> [s, b, h]."""
    x, bias = _with_bias_per_column(x_with_bias)
    return bias_dropout_add(x, bias, residual, prob)


def bias_dropout_add_fused_inference(x_with_bias: WithBias, residual: Tensor, prob: float) -> Tensor:
    """residual + x + bias: x, residual [s, b, h], bias [h] or [.., h] or None -> [s, b, h]; `prob` is ignored."""
    x, bias = _with_bias_per_column(x_with_bias)
    return bias_dropout_add(x, bias, residual, 0.0)


def get_bias_dropout_add(training: bool, fused: bool) -> Callable[[WithBias, Tensor, float], Tensor]:
    """The function (x_with_bias, residual, prob) -> [s, b, h] for this mode (v0.9's way of choosing)."""
    if not fused:
        return bias_dropout_add_unfused(training)
    return bias_dropout_add_fused_train if training else bias_dropout_add_fused_inference


def choose_bias_dropout_add(device: str, dtype: torch.dtype) -> Callable[..., Any]:
    """`get_bias_dropout_add` whose fused form is the implementation that serves `dtype` on `device` best."""
    kernel = select("bias_dropout_add", Spec(device, dtype))

    def in_training(x_with_bias: WithBias, residual: Tensor, prob: float) -> Tensor:
        x, bias = _with_bias_per_column(x_with_bias)
        return kernel(x, bias, residual, prob)

    def in_inference(x_with_bias: WithBias, residual: Tensor, prob: float) -> Tensor:
        x, bias = _with_bias_per_column(x_with_bias)
        return kernel(x, bias, residual, 0.0)

    def get(training: bool, fused: bool) -> Callable[[WithBias, Tensor, float], Tensor]:
        if not fused:
            return bias_dropout_add_unfused(training)
        return in_training if training else in_inference

    return get


@register("bias_dropout_add", "torch", rank=0)
def _load() -> Any:
    return bias_dropout_add
