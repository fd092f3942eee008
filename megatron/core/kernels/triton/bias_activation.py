"""bias+GELU, bias+SwiGLU and bias+GEGLU, forward and backward with the bias gradient summed in the same pass."""

# mypy: allow-untyped-defs
# (arguments of kernels are pointers and numbers of Triton's own language)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.core.kernels.triton.launch import as_rows, multiprocessors
from megatron.core.kernels.triton.norm import column_sums

GELU, SWIGLU, GEGLU = 0, 1, 2
COLS = 256


@triton.jit
def tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tanh(0.79788456 * x * (1.0 + 0.044715 * x * x)))


@triton.jit
def gelu_slope(x):
    t = tanh(0.79788456 * x * (1.0 + 0.044715 * x * x))
    return 0.5 * x * (1.0 - t * t) * (0.79788456 + 0.1070322243 * x * x) + 0.5 * (1.0 + t)


@triton.jit
def activation_forward(
    x, bias, y, rows, width, KIND: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # `width` is that of the output
    lines = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    inside = (lines[:, None] < rows) & (cols[None, :] < width)
    in_width = width if KIND == 0 else 2 * width
    source = x + lines[:, None] * in_width + cols[None, :]
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        gate += tl.load(bias + cols, mask=cols < width, other=0.0).to(tl.float32)[None, :]
    if KIND == 0:
        out = gelu(gate)
    else:
        up = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            up += tl.load(bias + width + cols, mask=cols < width, other=0.0).to(tl.float32)[None, :]
        out = (gate * tl.sigmoid(gate) if KIND == 1 else gelu(gate)) * up
    tl.store(y + lines[:, None] * width + cols[None, :], out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def activation_backward(
    x, bias, grad_y, grad_x, bias_part, rows, width,
    KIND: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    in_width = width if KIND == 0 else 2 * width
    used = cols < width
    gate_sum = tl.zeros([COLS], dtype=tl.float32)
    up_sum = tl.zeros([COLS], dtype=tl.float32)
    if BIAS:
        gate_bias = tl.load(bias + cols, mask=used, other=0.0).to(tl.float32)
        if KIND != 0:
            up_bias = tl.load(bias + width + cols, mask=used, other=0.0).to(tl.float32)
    for first in range(tl.program_id(1).to(tl.int64) * ROWS, rows, tl.num_programs(1) * ROWS):
        lines = first + tl.arange(0, ROWS)
        inside = (lines[:, None] < rows) & used[None, :]
        at = lines[:, None] * in_width + cols[None, :]
        gate = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_y + lines[:, None] * width + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            gate += gate_bias[None, :]
        if KIND == 0:
            gate_grad = grad * gelu_slope(gate)
        else:
            up = tl.load(x + at + width, mask=inside, other=0.0).to(tl.float32)
            if BIAS:
                up += up_bias[None, :]
            if KIND == 1:
                open_share = tl.sigmoid(gate)
                gate_grad = grad * up * open_share * (1.0 + gate * (1.0 - open_share))
                up_grad = grad * gate * open_share
            else:
                gate_grad = grad * up * gelu_slope(gate)
                up_grad = grad * gelu(gate)
            tl.store(grad_x + at + width, up_grad.to(grad_x.dtype.element_ty), mask=inside)
            if BIAS:
                up_sum += tl.sum(tl.where(inside, up_grad, 0.0), 0)
        tl.store(grad_x + at, gate_grad.to(grad_x.dtype.element_ty), mask=inside)
        if BIAS:
            gate_sum += tl.sum(tl.where(inside, gate_grad, 0.0), 0)
    if BIAS:
        part = tl.program_id(1).to(tl.int64) * in_width + cols
        tl.store(bias_part + part, gate_sum, mask=used)
        if KIND != 0:
            tl.store(bias_part + part + width, up_sum, mask=used)


class _BiasActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, kind: int, fp8_input_store: bool) -> Tensor:
        """input [..., f or 2f], bias of that width or None -> [..., f]."""
        rows = as_rows(input)
        count, in_width = rows.shape
        width = in_width if kind == GELU else in_width // 2
        y = torch.empty(count, width, dtype=input.dtype, device=input.device)
        if y.numel():
            grid = (triton.cdiv(width, COLS), triton.cdiv(count, 8))
            activation_forward[grid](
                rows, rows if bias is None else bias, y, count, width,
                KIND=kind, BIAS=bias is not None, ROWS=8, COLS=COLS, num_warps=4,
            )  # fmt: skip
        ctx.save_for_backward(rows.to(torch.float8_e4m3fn) if fp8_input_store else rows, bias)
        ctx.kind, ctx.shape, ctx.dtype = kind, input.shape, input.dtype
        return y.view(*input.shape[:-1], width)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """grad_output [..., f] -> gradients of input [..., f or 2f] and bias."""
        rows, bias = ctx.saved_tensors
        rows = rows.to(ctx.dtype)
        grad = as_rows(grad_output)
        count, width = grad.shape
        grad_x = torch.empty_like(rows)
        column_blocks = triton.cdiv(width, COLS)
        strips = max(min(triton.cdiv(count, 8), 8 * multiprocessors(rows) // max(column_blocks, 1)), 1)
        parts = torch.zeros(
            strips if bias is not None else 1, rows.shape[1], dtype=torch.float32, device=rows.device
        )
        if grad.numel():
            activation_backward[(column_blocks, strips)](
                rows, rows if bias is None else bias, grad, grad_x, parts, count, width,
                KIND=ctx.kind, BIAS=bias is not None, ROWS=8, COLS=COLS, num_warps=4,
            )  # fmt: skip
        bias_grad = column_sums(parts, bias.dtype) if bias is not None else None
        return grad_x.view(ctx.shape), bias_grad, None, None


def bias_gelu(input: Tensor, bias: Tensor) -> Tensor:
    """gelu_tanh(input + bias): input [..., f], bias [f] -> [..., f]."""
    return _BiasActivation.apply(input, bias, GELU, False)


def bias_swiglu(input: Tensor, bias: Tensor | None, fp8_input_store: bool = False) -> Tensor:
    """silu(gate) * up of input + bias: input [..., 2f], bias [2f] or None -> [..., f]."""
    return _BiasActivation.apply(input, bias, SWIGLU, fp8_input_store)


def bias_geglu(input: Tensor, bias: Tensor | None) -> Tensor:
    """gelu_tanh(gate) * up of input + bias: input [..., 2f], bias [2f] or None -> [..., f]."""
    return _BiasActivation.apply(input, bias, GEGLU, False)
