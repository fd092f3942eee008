"""Root-mean-square norm: y = x / sqrt(mean(x^2) + eps) * w, in fp32 (arXiv:1910.07467)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.core.kernels.registry import register


def rms_norm_eager(x: Tensor, weight: Tensor, eps: float, zero_centered: bool = False) -> Tensor:
    """Eager reference. x [..., h], weight [h] -> [..., h] in the weight's dtype; a zero-centred weight
    stores gamma - 1.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x32 = x.to(wide)
    gamma = weight.to(wide) + 1 if zero_centered else weight.to(wide)
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * gamma).to(weight.dtype)


class RMSNormFunction(torch.autograd.Function):
    """`rms_norm_eager` saving its input and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> Tensor:
        """x [..., h], weight [h] -> [..., h]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        gamma = weight.to(wide) + 1 if zero_centered else weight.to(wide)
        ctx.save_for_backward(x, weight, rstd)
        ctx.zero_centered = zero_centered
        return (x * rstd).mul_(gamma).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """grad_output [..., h] -> gradients of x [..., h] and weight [h]."""
        x, weight, rstd = ctx.saved_tensors
        wide = rstd.dtype
        gamma = weight.to(wide) + 1 if ctx.zero_centered else weight.to(wide)
        normed = x * rstd
        grad_gamma = (normed * grad_output).reshape(-1, x.shape[-1]).sum(0)
        scaled = grad_output * gamma
        mean = torch.linalg.vecdot(scaled, normed).div_(x.shape[-1]).unsqueeze(-1)
        grad_x = scaled.sub_(normed.mul_(mean)).mul_(rstd)
        return grad_x.to(x.dtype), grad_gamma.to(weight.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, zero_centered: bool = False) -> Tensor:
    """x [..., h], weight [h] -> [..., h] in the weight's dtype."""
    return RMSNormFunction.apply(x, weight, eps, zero_centered)


def residual_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centered: bool = False
) -> tuple[Tensor, Tensor]:
    """x, residual [..., h] -> (rms_norm(x + residual), x + residual), each [..., h]."""
    total = x + residual
    return rms_norm(total, weight, eps, zero_centered), total


@register("rms_norm", "torch", rank=0)
def _load() -> Any:
    return rms_norm


@register("residual_rms_norm", "torch", rank=0)
def _load_residual() -> Any:
    return residual_rms_norm
