"""Scale, saturate and round a matrix to fp8, write it as it is and transposed, and note its amax: one pass over it."""

# mypy: allow-untyped-defs
# (arguments of kernels are pointers and numbers of Triton's own language)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64


@triton.jit
def quantize_tiles(
    x, scale, amax, out, flipped, rows, cols, top,
    AMAX: tl.constexpr, FLIP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    lines = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    places = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (lines[:, None] < rows) & (places[None, :] < cols)
    values = tl.load(x + lines[:, None] * cols + places[None, :], mask=inside, other=0.0).to(tl.float32)
    if AMAX:
        tl.atomic_max(amax, tl.max(tl.max(tl.abs(values), 1), 0))
    scaled = values * tl.load(scale)
    # minimum and maximum would turn NaN into a number
    scaled = tl.where(scaled > top, top, tl.where(scaled < -top, -top, scaled))
    small = scaled.to(out.dtype.element_ty)
    tl.store(out + lines[:, None] * cols + places[None, :], small, mask=inside)
    if FLIP:
        turned = (places[:, None] < cols) & (lines[None, :] < rows)
        tl.store(flipped + places[:, None].to(tl.int64) * rows + lines[None, :], tl.trans(small), mask=turned)


def quantize(
    x: Tensor, scale: Tensor, fmt: torch.dtype, amax: Tensor | None = None, transposed: bool = False
) -> tuple[Tensor, Tensor | None]:
    """x [r, c] -> fp8 [r, c] and, if asked for, its transposed copy [c, r]; as `fp8.quantize.quantize`."""
    x = x.contiguous()
    rows, cols = x.shape
    out = torch.empty(rows, cols, dtype=fmt, device=x.device)
    flipped = torch.empty(cols, rows, dtype=fmt, device=x.device) if transposed else None
    if x.numel():
        quantize_tiles[(triton.cdiv(rows, TILE), triton.cdiv(cols, TILE))](
            x, scale, scale if amax is None else amax, out, out if flipped is None else flipped, rows, cols,
            torch.finfo(fmt).max, AMAX=amax is not None, FLIP=transposed, TILE=TILE, num_warps=8,
        )  # fmt: skip
    return out, flipped
