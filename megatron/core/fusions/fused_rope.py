"""Rotary position embedding of queries and keys (arXiv:2104.09864), both pairings, batched or packed.

Half-split pairs element i with i + d/2; interleaved pairs 2i with 2i + 1. The angle table `freqs` [s, 1, 1,
d] holds one angle per element (both members of a pair share theirs), as the embedding module makes it; d
may be less than the head size (`--rotary-percent`), the rest of the head passes through.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.core.kernels.registry import register


def _halves(t: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return t[..., 0::2], t[..., 1::2]
    half = t.shape[-1] // 2
    return t[..., :half], t[..., half:]


def packed_positions(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """int64 [tokens]: position of each token inside its sequence; `cu_seqlens` [sequences + 1] starts with
    0.
    """
    index = torch.arange(tokens, device=cu_seqlens.device)
    row = torch.searchsorted(cu_seqlens[1:].contiguous(), index, right=True).clamp_(
        max=max(cu_seqlens.numel() - 2, 0)
    )
    return index - cu_seqlens[row]


def angles_of(t: Tensor, freqs: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The angles that apply to `t`, broadcastable against it: [s, 1, 1, d], or [t, 1, d] for packed tokens."""
    if cu_seqlens is None:
        return freqs[: t.shape[0]]
    return freqs[packed_positions(cu_seqlens, t.shape[0])].reshape(t.shape[0], *(1,) * (t.dim() - 2), -1)


def rope_eager(
    t: Tensor, freqs: Tensor, interleaved: bool = False, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Eager reference. t [s, b, np, hn] (packed: [tokens, np, hn]), freqs [s', 1, 1, d] with s' >= s -> as
    t.
    """
    angles = angles_of(t, freqs, cu_seqlens)
    d = angles.shape[-1]
    turned, passed = t[..., :d], t[..., d:]
    first, second = _halves(turned, interleaved)
    if interleaved:
        rotated = torch.stack((-second, first), dim=-1).flatten(-2)
    else:
        rotated = torch.cat((-second, first), dim=-1)
    cos, sin = torch.cos(angles).to(t.dtype), torch.sin(angles).to(t.dtype)
    return torch.cat((turned * cos + rotated * sin, passed), dim=-1)


def _rotate_into(
    out: Tensor, t: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, transpose: bool
) -> None:
    """Write the rotated first d elements of each head of `t` into `out`; `transpose` turns the other way
    (the backward).
    """
    d = cos.shape[-1]
    t1, t2 = _halves(t[..., :d], interleaved)
    o1, o2 = _halves(out[..., :d], interleaved)
    c1, c2 = _halves(cos, interleaved)
    s1, s2 = _halves(sin, interleaved)
    if transpose:
        s1, s2 = -s2, -s1
    new1 = torch.mul(t1, c1).addcmul_(t2, s1, value=-1)
    torch.mul(t2, c2, out=o2).addcmul_(t1, s2)
    o1.copy_(new1)


class RopeFunction(torch.autograd.Function):
    """Rotation without concatenations; saves the angle tables, not the activations."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        """t [s, b, np, hn], cos and sin broadcastable [s, 1, 1, d] -> as t."""
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        out = torch.empty_like(t, memory_format=torch.contiguous_format)
        d = cos.shape[-1]
        if d < t.shape[-1]:
            out[..., d:] = t[..., d:]
        _rotate_into(out, t, cos, sin, interleaved, False)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """grad [s, b, np, hn] -> gradient of t: the opposite rotation."""
        cos, sin = ctx.saved_tensors
        out = torch.empty_like(grad, memory_format=torch.contiguous_format)
        d = cos.shape[-1]
        if d < grad.shape[-1]:
            out[..., d:] = grad[..., d:]
        _rotate_into(out, grad, cos, sin, ctx.interleaved, True)
        return out, None, None, None


def fused_rope(
    t: Tensor, freqs: Tensor, interleaved: bool = False, cu_seqlens: Tensor | None = None
) -> Tensor:
    """t [s, b, np, hn] (packed: [tokens, np, hn] with `cu_seqlens`), freqs [s', 1, 1, d] -> rotated, as t."""
    angles = angles_of(t, freqs, cu_seqlens)
    return RopeFunction.apply(t, torch.cos(angles).to(t.dtype), torch.sin(angles).to(t.dtype), interleaved)


@torch.no_grad()
def fused_rope_(
    t: Tensor, freqs: Tensor, interleaved: bool = False, cu_seqlens: Tensor | None = None
) -> Tensor:
    """`fused_rope` in place, for inference: rotates `t` itself and returns it."""
    angles = angles_of(t, freqs, cu_seqlens)
    cos, sin = torch.cos(angles).to(t.dtype), torch.sin(angles).to(t.dtype)
    d = cos.shape[-1]
    _rotate_into(t, t[..., :d].clone(), cos, sin, interleaved, False)
    return t


@register("rope", "torch", rank=0)
def _load() -> Any:
    return fused_rope
