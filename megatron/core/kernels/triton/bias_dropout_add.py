"""residual + dropout(x + bias) in one pass; the mask is never stored but drawn again from the same seed (Philox)."""

# mypy: allow-untyped-defs
# (arguments of kernels are pointers and numbers of Triton's own language)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.core.kernels.triton.launch import as_rows, draw_seed, multiprocessors
from megatron.core.kernels.triton.norm import column_sums

BLOCK = 1024
ROWS, COLS = 8, 256


@triton.jit
def keep(seed, first, BLOCK: tl.constexpr, prob):
    """bool [BLOCK]: which of the elements first .. first + BLOCK survive; one Philox call serves four elements."""
    quads = first // 4 + tl.arange(0, BLOCK // 4)
    a, b, c, d = tl.rand4x(seed, quads)
    uniform = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK])
    return uniform >= prob


@triton.jit
def forward_kernel(
    x,
    bias,
    residual,
    y,
    seed_in,
    count,
    width,
    prob,
    BIAS: tl.constexpr,
    DROP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias + at % width, mask=inside, other=0.0).to(tl.float32)
    if DROP:
        survives = keep(tl.load(seed_in), first, BLOCK, prob)
        value = tl.where(survives, value / (1.0 - prob), 0.0)
    value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(grad_y, grad_x, seed_in, count, prob, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    inside = at < count
    grad = tl.load(grad_y + at, mask=inside, other=0.0).to(tl.float32)
    survives = keep(tl.load(seed_in), first, BLOCK, prob)
    grad = tl.where(survives, grad / (1.0 - prob), 0.0)
    tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=inside)


@triton.jit
def strip_sums(grad, parts, rows, width, ROWS: tl.constexpr, COLS: tl.constexpr):
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros([COLS], dtype=tl.float32)
    for first in range(tl.program_id(1).to(tl.int64) * ROWS, rows, tl.num_programs(1) * ROWS):
        lines = first + tl.arange(0, ROWS)
        inside = (lines[:, None] < rows) & (cols[None, :] < width)
        total += tl.sum(
            tl.load(grad + lines[:, None] * width + cols[None, :], mask=inside, other=0.0).to(tl.float32), 0
        )
    tl.store(parts + tl.program_id(1).to(tl.int64) * width + cols, total, mask=cols < width)


def sum_over_rows(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, h] -> [h] in `dtype`: summed in fp32 in a fixed order."""
    rows, width = grad.shape
    blocks = triton.cdiv(width, COLS)
    strips = max(min(triton.cdiv(rows, ROWS), 8 * multiprocessors(grad) // max(blocks, 1)), 1)
    parts = torch.zeros(strips, width, dtype=torch.float32, device=grad.device)
    if grad.numel():
        strip_sums[(blocks, strips)](grad, parts, rows, width, ROWS=ROWS, COLS=COLS)
    return column_sums(parts, dtype)


class _BiasDropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, residual: Tensor, prob: float) -> Tensor:
        """x, residual [..., h], bias [h] or None -> [..., h] in the wider dtype of both."""
        rows, other = as_rows(x), as_rows(residual)
        y = torch.empty_like(rows, dtype=torch.promote_types(x.dtype, residual.dtype))
        seed = draw_seed(x) if prob else None
        if rows.numel():
            forward_kernel[(triton.cdiv(rows.numel(), BLOCK),)](
                rows, rows if bias is None else bias, other, y, rows if seed is None else seed,
                rows.numel(), rows.shape[1], prob, BIAS=bias is not None, DROP=prob > 0.0, BLOCK=BLOCK,
            )  # fmt: skip
        ctx.save_for_backward(seed)
        ctx.prob, ctx.dtypes = prob, (x.dtype, None if bias is None else bias.dtype, residual.dtype)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None]:
        """grad_output [..., h] -> gradients of x [..., h], bias [h], residual [..., h]."""
        (seed,) = ctx.saved_tensors
        x_dtype, bias_dtype, residual_dtype = ctx.dtypes
        rows = as_rows(grad_output)
        grad = rows.to(x_dtype)
        if ctx.prob and rows.numel():
            grad = torch.empty_like(rows, dtype=x_dtype)
            backward_kernel[(triton.cdiv(rows.numel(), BLOCK),)](
                rows, grad, seed, rows.numel(), ctx.prob, BLOCK=BLOCK
            )
        bias_grad = None if bias_dtype is None else sum_over_rows(grad, bias_dtype)
        return grad.view(grad_output.shape), bias_grad, grad_output.to(residual_dtype), None


def bias_dropout_add(x: Tensor, bias: Tensor | None, residual: Tensor, prob: float) -> Tensor:
    """residual + dropout(x + bias, prob): x, residual [..., h], bias [h] or None -> [..., h]."""
    return _BiasDropoutAdd.apply(x, bias, residual, prob)
