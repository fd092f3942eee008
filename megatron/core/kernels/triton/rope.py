"""Rotary position embedding, both pairings, batched or packed, out of place or in place; its backward is
the opposite turn.
"""

# mypy: allow-untyped-defs
# (arguments of kernels are pointers and numbers of Triton's own language)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.core.fusions.fused_rope import packed_positions
from megatron.core.kernels.triton.launch import power_of_two


@triton.jit
def rope_kernel(
    t, out, cos, sin, positions, heads, batch, width, turned,
    t_s, t_b, t_h, out_s, out_b, out_h,
    INTERLEAVED: tl.constexpr, PACKED: tl.constexpr, BACKWARD: tl.constexpr, COPY: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    s, b = token // batch, token % batch
    position = tl.load(positions + s) if PACKED else s
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, PAIRS)
    if INTERLEAVED:
        one, two = 2 * pair, 2 * pair + 1
    else:
        one, two = pair, pair + turned // 2
    valid = pair < turned // 2
    angle = position * turned
    c1 = tl.load(cos + angle + one, mask=valid, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos + angle + two, mask=valid, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin + angle + one, mask=valid, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin + angle + two, mask=valid, other=0.0).to(tl.float32)[None, :]
    source = t + s * t_s + b * t_b + head[:, None] * t_h
    target = out + s * out_s + b * out_b + head[:, None] * out_h
    inside = (head[:, None] < heads) & valid[None, :]
    x1 = tl.load(source + one[None, :], mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(source + two[None, :], mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:
        y1 = x1 * c1 + x2 * s2
        y2 = x2 * c2 - x1 * s1
    else:
        y1 = x1 * c1 - x2 * s1
        y2 = x2 * c2 + x1 * s2
    tl.store(target + one[None, :], y1.to(out.dtype.element_ty), mask=inside)
    tl.store(target + two[None, :], y2.to(out.dtype.element_ty), mask=inside)
    if COPY:
        rest = turned + tl.arange(0, TAIL)
        tail = (head[:, None] < heads) & (rest[None, :] < width)
        tl.store(target + rest[None, :], tl.load(source + rest[None, :], mask=tail), mask=tail)


def _turn(
    t: Tensor,
    out: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None,
    interleaved: bool,
    backward: bool,
) -> None:
    """Rotate t [s, b, np, hn] into `out` (may be `t`); cos and sin [s', d]; positions int64 [s] for packed
    tokens.
    """
    s, batch, heads, width = t.shape
    turned = cos.shape[-1]
    if not t.numel():
        return
    copy = turned < width and out.data_ptr() != t.data_ptr()
    per_program = min(power_of_two(heads), 8)
    rope_kernel[(s * batch, triton.cdiv(heads, per_program))](
        t, out, cos, sin, cos if positions is None else positions, heads, batch, width, turned,
        t.stride(0), t.stride(1), t.stride(2), out.stride(0), out.stride(1), out.stride(2),
        INTERLEAVED=interleaved, PACKED=positions is not None, BACKWARD=backward, COPY=copy,
        HEADS=per_program, PAIRS=power_of_two(turned // 2), TAIL=power_of_two(max(width - turned, 1)), num_warps=4,
    )  # fmt: skip


def _last_contiguous(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        t: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        interleaved: bool,
        inplace: bool,
    ) -> Tensor:
        """t [s, b, np, hn], cos and sin [s', d] -> as t."""
        ctx.save_for_backward(cos, sin, positions)
        ctx.interleaved = interleaved
        if inplace:
            ctx.mark_dirty(t)
            _turn(t, t, cos, sin, positions, interleaved, False)
            return t
        source = _last_contiguous(t)
        out = torch.empty(t.shape, dtype=t.dtype, device=t.device)
        _turn(source, out, cos, sin, positions, interleaved, False)
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """grad_output [s, b, np, hn] -> gradient of t."""
        cos, sin, positions = ctx.saved_tensors
        source = _last_contiguous(grad_output)
        grad = torch.empty(grad_output.shape, dtype=grad_output.dtype, device=grad_output.device)
        _turn(source, grad, cos, sin, positions, ctx.interleaved, True)
        return grad, None, None, None, None, None


def _apply(t: Tensor, freqs: Tensor, interleaved: bool, cu_seqlens: Tensor | None, inplace: bool) -> Tensor:
    positions = None if cu_seqlens is None else packed_positions(cu_seqlens, t.shape[0])
    table = freqs.reshape(freqs.shape[0], -1)
    cos, sin = torch.cos(table).to(t.dtype), torch.sin(table).to(t.dtype)
    if t.dim() == 3:
        return _Rope.apply(t.unsqueeze(1), cos, sin, positions, interleaved, inplace).squeeze(1)
    return _Rope.apply(t, cos, sin, positions, interleaved, inplace)


def rope(t: Tensor, freqs: Tensor, interleaved: bool = False, cu_seqlens: Tensor | None = None) -> Tensor:
    """t [s, b, np, hn] (packed: [tokens, np, hn] with `cu_seqlens`), freqs [s', 1, 1, d] -> rotated, as t."""
    return _apply(t, freqs, interleaved, cu_seqlens, False)


def rope_(t: Tensor, freqs: Tensor, interleaved: bool = False, cu_seqlens: Tensor | None = None) -> Tensor:
    """`rope` written over `t` (last dimension contiguous); differentiable where autograd allows in-place
    changes of `t`.
    """
    return _apply(t, freqs, interleaved, cu_seqlens, True)
