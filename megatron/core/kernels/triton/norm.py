"""LayerNorm and RMSNorm, forward and backward, optionally fused with the residual addition before them.

One program holds one row in fp32. The backward pass runs a fixed number of programs, each over many rows: the weight
gradient is summed in registers, written once per program, and a second kernel adds those partial sums; both are
deterministic. Bytes moved are the minimum: each input read once, each output written once.
"""

# mypy: allow-untyped-defs
# (arguments of kernels are pointers and numbers of Triton's own language)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.core.kernels.triton.launch import as_rows, multiprocessors, row_block


@triton.jit
def norm_forward(
    x, residual, weight, bias, y, total, mean_out, rstd_out, width, eps,
    RMS: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, ZERO_CENTERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    start = row * width
    value = tl.load(x + start + cols, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + start + cols, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + start + cols, rounded, mask=inside)
        value = rounded.to(tl.float32)  # normalise what the residual stream will really carry
    if RMS:
        centred = value
    else:
        mean = tl.sum(value, 0) / width
        tl.store(mean_out + row, mean)
        centred = tl.where(inside, value - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)
    tl.store(rstd_out + row, rstd)
    gamma = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    if ZERO_CENTERED:
        gamma += 1.0
    out = centred * rstd * gamma
    if BIAS:
        out += tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + start + cols, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward(
    x, weight, mean_in, rstd_in, grad_y, grad_total, grad_x, weight_part, bias_part, rows, width,
    RMS: tl.constexpr, ADD: tl.constexpr, BIAS: tl.constexpr, ZERO_CENTERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    gamma = tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32)
    if ZERO_CENTERED:
        gamma += 1.0
    weight_sum = tl.zeros([BLOCK], dtype=tl.float32)
    bias_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        start = row * width
        value = tl.load(x + start + cols, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_y + start + cols, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_in + row)
        if RMS:
            normed = value * rstd
        else:
            normed = tl.where(inside, (value - tl.load(mean_in + row)) * rstd, 0.0)
        scaled = grad * gamma
        out = scaled - normed * (tl.sum(scaled * normed, 0) / width)
        if not RMS:
            out -= tl.sum(scaled, 0) / width
        out *= rstd
        if ADD:
            out += tl.load(grad_total + start + cols, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + start + cols, out.to(grad_x.dtype.element_ty), mask=inside)
        weight_sum += grad * normed
        if BIAS:
            bias_sum += grad
    part = program * width + cols
    tl.store(weight_part + part, weight_sum, mask=inside)
    if BIAS:
        tl.store(bias_part + part, bias_sum, mask=inside)


@triton.jit
def sum_columns(parts, out, rows, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside = cols < width
    total = tl.zeros([COLS], dtype=tl.float32)
    for first in range(0, rows, ROWS):
        lines = first + tl.arange(0, ROWS)
        block = (lines[:, None] < rows) & inside[None, :]
        total += tl.sum(tl.load(parts + lines[:, None] * width + cols[None, :], mask=block, other=0.0), 0)
    tl.store(out + cols, total.to(out.dtype.element_ty), mask=inside)


def column_sums(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 partial sums [programs, h] -> their sum [h] in `dtype`, in a fixed order."""
    out = torch.empty(parts.shape[1], dtype=dtype, device=parts.device)
    if parts.shape[1]:
        sum_columns[(triton.cdiv(parts.shape[1], 32),)](
            parts, out, parts.shape[0], parts.shape[1], ROWS=32, COLS=32
        )
    return out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        zero_centered: bool,
        rms: bool,
    ) -> Any:
        """x, residual [..., h], weight and bias [h] -> y [..., h], with a residual also x + residual [..., h]."""
        rows = as_rows(x)
        count, width = rows.shape
        add = residual is not None
        other = as_rows(residual) if residual is not None else rows
        total = torch.empty_like(rows, dtype=torch.promote_types(rows.dtype, other.dtype)) if add else rows
        y = torch.empty(rows.shape, dtype=weight.dtype, device=x.device)
        rstd = torch.empty(count, dtype=torch.float32, device=x.device)
        mean = rstd if rms else torch.empty_like(rstd)
        if rows.numel():
            block, warps = row_block(width)
            norm_forward[(count,)](
                rows, other, weight, bias if bias is not None else weight, y, total, mean, rstd, width, eps,
                RMS=rms, ADD=add, BIAS=bias is not None, ZERO_CENTERED=zero_centered, BLOCK=block, num_warps=warps,
            )  # fmt: skip
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.flags = (rms, add, bias is not None, zero_centered)
        ctx.shape, ctx.dtypes = x.shape, (x.dtype, residual.dtype if residual is not None else None)
        ctx.bias_dtype = bias.dtype if bias is not None else None
        return (y.view(x.shape), total.view(x.shape)) if add else y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_total: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """Gradients of y and of the sum [..., h] -> gradients of x, residual [..., h], weight, bias [h]."""
        total, weight, mean, rstd = ctx.saved_tensors
        rms, add, has_bias, zero_centered = ctx.flags
        count, width = total.shape
        grad = as_rows(grad_y)
        extra = as_rows(grad_total) if add and grad_total is not None else grad
        grad_x = torch.empty_like(total)
        programs = max(min(count, 2 * multiprocessors(total)), 1)
        weight_part = torch.zeros(programs, width, dtype=torch.float32, device=total.device)
        bias_part = torch.zeros_like(weight_part) if has_bias else weight_part
        if total.numel():
            block, warps = row_block(width)
            norm_backward[(programs,)](
                total, weight, mean, rstd, grad, extra, grad_x, weight_part, bias_part, count, width,
                RMS=rms, ADD=add, BIAS=has_bias, ZERO_CENTERED=zero_centered, BLOCK=block, num_warps=warps,
            )  # fmt: skip
        grad_x = grad_x.view(ctx.shape)
        x_dtype, residual_dtype = ctx.dtypes
        return (
            grad_x.to(x_dtype),
            grad_x.to(residual_dtype) if add else None,
            column_sums(weight_part, weight.dtype),
            column_sums(bias_part, ctx.bias_dtype) if has_bias else None,
            None,
            None,
            None,
        )


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool = False
) -> Tensor:
    """x [..., h], weight and bias [h] -> [..., h] in the weight's dtype."""
    return _Norm.apply(x, None, weight, bias, eps, zero_centered, False)


def residual_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    zero_centered: bool = False,
) -> tuple[Tensor, Tensor]:
    """x, residual [..., h] -> (layer_norm(x + residual), x + residual)."""
    return _Norm.apply(x, residual, weight, bias, eps, zero_centered, False)


def rms_norm(x: Tensor, weight: Tensor, eps: float, zero_centered: bool = False) -> Tensor:
    """x [..., h], weight [h] -> [..., h] in the weight's dtype."""
    return _Norm.apply(x, None, weight, None, eps, zero_centered, True)


def residual_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, zero_centered: bool = False
) -> tuple[Tensor, Tensor]:
    """x, residual [..., h] -> (rms_norm(x + residual), x + residual)."""
    return _Norm.apply(x, residual, weight, None, eps, zero_centered, True)
