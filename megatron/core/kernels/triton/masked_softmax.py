"""softmax(scale * scores) under a causal or arbitrary mask, forward and backward; one program per row of
scores.
"""

# mypy: allow-untyped-defs
# (arguments of kernels are pointers and numbers of Triton's own language)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.core.kernels.triton.launch import row_block


@triton.jit
def softmax_forward(
    scores, mask, probs, heads, sq, sk, mask_b, mask_h, mask_q, mask_k, scale,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    query = row % sq
    seen = cols < sk
    if CAUSAL:
        seen = seen & (cols <= query + sk - sq)
    if MASK:
        base = mask + (row // sq // heads) * mask_b + (row // sq % heads) * mask_h + query * mask_q
        seen = seen & (tl.load(base + cols * mask_k, mask=cols < sk, other=1) == 0)
    value = tl.load(scores + row * sk + cols, mask=seen, other=0.0).to(tl.float32) * scale
    value = tl.where(seen, value, float("-inf"))
    peak = tl.max(value, 0)
    # a row without any visible key has peak -inf: shift by 0 instead, and divide its zero sum by 1
    weight = tl.where(seen, tl.exp(value - tl.where(peak == float("-inf"), 0.0, peak)), 0.0)
    total = tl.sum(weight, 0)
    out = weight / tl.where(total == 0.0, 1.0, total)
    tl.store(probs + row * sk + cols, out.to(probs.dtype.element_ty), mask=cols < sk)


@triton.jit
def softmax_backward(probs, grad_probs, grad_scores, sk, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < sk
    prob = tl.load(probs + row * sk + cols, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_probs + row * sk + cols, mask=inside, other=0.0).to(tl.float32)
    out = scale * prob * (grad - tl.sum(prob * grad, 0))
    tl.store(grad_scores + row * sk + cols, out.to(grad_scores.dtype.element_ty), mask=inside)


class _MaskedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
        """scores [b, np, sq, sk], mask bool broadcastable (True = masked) -> [b, np, sq, sk]."""
        scores = scores.contiguous()
        *_, heads, sq, sk = (1, *scores.shape) if scores.dim() == 3 else scores.shape
        probs = torch.empty_like(scores)
        strides: tuple[int, ...] = (0, 0, 0, 0)
        if mask is not None:
            mask = mask.expand(scores.shape[0], heads, sq, sk)
            strides = mask.stride()
        if scores.numel():
            block, warps = row_block(sk)
            softmax_forward[(scores.numel() // sk,)](
                scores, scores if mask is None else mask.view(torch.uint8), probs, heads, sq, sk, *strides, scale,
                CAUSAL=causal, MASK=mask is not None, BLOCK=block, num_warps=warps,
            )  # fmt: skip
        ctx.save_for_backward(probs)
        ctx.scale = scale
        return probs

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        """grad_output [b, np, sq, sk] -> gradient of the scores."""
        (probs,) = ctx.saved_tensors
        grad = torch.empty_like(probs)
        if probs.numel():
            sk = probs.shape[-1]
            block, warps = row_block(sk)
            softmax_backward[(probs.numel() // sk,)](
                probs, grad_output.contiguous(), grad, sk, ctx.scale, BLOCK=block, num_warps=warps
            )
        return grad, None, None, None


def masked_softmax(scores: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """scores [b, np, sq, sk], mask bool broadcastable (True = masked) -> probabilities; fully masked rows
    are zero.
    """
    return _MaskedSoftmax.apply(scores, mask, scale, causal)
