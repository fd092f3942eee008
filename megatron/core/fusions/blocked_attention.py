"""Attention for the CPU: explicit scores in blocks of queries, so causal attention skips what it would mask
away.

Compared with matmul-softmax on whole matrices: the upper triangle is neither multiplied nor exponentiated,
softmax works in place on a block that fits the cache, dropout masks are cheap, and the backward pass is
written out. The numbers are the same but for the order of sums. torch's own CPU flash attention is slower
at the lengths trained on a CPU and has no dropout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.core.fusions.core_attention import AttentionSpec, Window, hidden_pairs, sdpa
from megatron.core.fusions.dropout import keep_mask, keep_scale
from megatron.core.fusions.fused_softmax import MASKED_SCORE
from megatron.core.kernels.registry import register
from megatron.core.packed_seq_params import PackedSeqParams

#: Queries per block by bytes per number, measured best for 256 <= s <= 1024: small blocks skip more of the triangle,
#: large ones multiply faster.
QUERIES_PER_BLOCK = {2: 128, 4: 64, 8: 64}
FLASH_LENGTH = (
    2048  # from here on the saved [s, s] probabilities cost more than torch's recomputing attention
)


def _heads_first(t: Tensor) -> Tensor:
    """[s, b, n, hn] -> view [b*n, s, hn] (a copy only if batch and head strides do not merge)."""
    s, b, n, width = t.shape
    return t.reshape(s, b * n, width).transpose(0, 1)


class BlockedAttention(torch.autograd.Function):
    """softmax(q k^T scale) v, saving the probabilities (and, with dropout, one byte per probability)."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        hidden: Tensor | None,
        causal: bool,
        scale: float,
        dropout_p: float,
    ) -> Tensor:
        """q [sq, b, np, hn], k and v [sk, b, np, hn], hidden bool [., ., sq, sk] or None -> [sq, b, np*hn]."""
        sq, b, heads, _ = q.shape
        sk = k.shape[0]
        queries, keys, values = _heads_first(q), _heads_first(k), _heads_first(v)
        out = q.new_empty(sq, b * heads, v.shape[-1])
        block = QUERIES_PER_BLOCK[q.dtype.itemsize]
        above = torch.full((block, block), float("-inf"), dtype=q.dtype).triu_(1) if causal else None
        probs: list[Tensor] = []
        masks: list[Tensor] = []
        for first in range(0, sq, block):
            last = min(first + block, sq)
            # Keys from here on are later than every query of the block.
            end = last + sk - sq if causal else sk
            scores = q.new_empty(b * heads, last - first, end)
            torch.baddbmm(
                scores, queries[:, first:last], keys[:, :end].transpose(1, 2), beta=0, alpha=scale, out=scores
            )
            if above is not None:
                scores[:, :, end - (last - first) :].add_(above[: last - first, : last - first])
            if hidden is not None:
                rows = hidden[..., first:last, :] if hidden.shape[-2] > 1 else hidden
                scores.view(b, heads, last - first, end).masked_fill_(rows, MASKED_SCORE)
            weights = torch.softmax(scores, dim=-1, out=scores)
            probs.append(weights)
            if dropout_p:
                masks.append(keep_mask(weights.shape, dropout_p, weights.device))
                weights = weights * masks[-1]
            out[first:last] = torch.bmm(weights, values[:, :end]).transpose(0, 1)
        if dropout_p:
            out.mul_(keep_scale(dropout_p))
        ctx.save_for_backward(q, k, v, hidden, *probs, *masks)
        ctx.block, ctx.blocks, ctx.scale, ctx.dropout_p = block, len(probs), scale, dropout_p
        return out.view(sq, b, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """grad [sq, b, np*hn] -> gradients of q [sq, b, np, hn], k and v [sk, b, np, hn]."""
        q, k, v, hidden, *saved = ctx.saved_tensors
        probs, masks = saved[: ctx.blocks], saved[ctx.blocks :]
        sq = q.shape[0]
        queries, keys, values = _heads_first(q), _heads_first(k), _heads_first(v)
        if ctx.dropout_p:
            grad = grad * keep_scale(ctx.dropout_p)
        out_grad = grad.reshape(sq, queries.shape[0], -1).transpose(0, 1)
        q_grad, k_grad, v_grad = (t.new_zeros(t.shape) for t in (queries, keys, values))
        for index, first in enumerate(range(0, sq, ctx.block)):
            rows = slice(first, min(first + ctx.block, sq))
            weights = probs[index]
            end = weights.shape[-1]
            upstream = torch.bmm(out_grad[:, rows], values[:, :end].transpose(1, 2))
            used = weights
            if masks:
                used = weights * masks[index]
                upstream.mul_(masks[index])
            v_grad[:, :end].baddbmm_(used.transpose(1, 2), out_grad[:, rows])
            score_grad = torch._softmax_backward_data(upstream, weights, -1, weights.dtype)
            if hidden is not None:
                # only a query that sees nothing has weight on forbidden keys; its scores are constants
                forbidden = hidden[..., rows, :] if hidden.shape[-2] > 1 else hidden
                score_grad.view(q.shape[1], -1, *score_grad.shape[1:]).masked_fill_(forbidden, 0.0)
            torch.baddbmm(
                q_grad[:, rows], score_grad, keys[:, :end], beta=0, alpha=ctx.scale, out=q_grad[:, rows]
            )
            k_grad[:, :end].baddbmm_(score_grad.transpose(1, 2), queries[:, rows], alpha=ctx.scale)
        grads = (
            t_grad.transpose(0, 1).reshape(t.shape) for t_grad, t in ((q_grad, q), (k_grad, k), (v_grad, v))
        )
        return *grads, None, None, None, None


def blocked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    packed: PackedSeqParams | None = None,
    window: Window | None = None,
) -> Tensor:
    """The contract of `core_attention` for CPU tensors. q [sq, b, np, hn], k and v [sk, b, ng, hn] -> [sq,
    b, np*hn].
    """
    if dropout_p == 0.0 and k.shape[0] > FLASH_LENGTH:
        return sdpa(q, k, v, mask, causal=causal, scale=scale, packed=packed, window=window)
    if packed is not None and mask is None and window in (None, (-1, -1)):
        return _document_by_document(q, k, v, packed, causal, scale, dropout_p)
    if q.shape[2] != k.shape[2]:
        k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    hidden = None
    skip = causal and q.shape[0] > 1 and q.shape[0] <= k.shape[0]
    if mask is not None or packed is not None or window not in (None, (-1, -1)) or (causal and not skip):
        hidden, skip = hidden_pairs(q, k, mask, causal, packed, window), False
    return BlockedAttention.apply(q, k, v, hidden, skip, scale, dropout_p)


def _document_by_document(
    q: Tensor, k: Tensor, v: Tensor, packed: PackedSeqParams, causal: bool, scale: float, dropout_p: float
) -> Tensor:
    if packed.cu_seqlens_q is None:
        raise ValueError("packed attention needs cu_seqlens_q")
    q_edges = packed.cu_seqlens_q.tolist()
    k_edges = q_edges if packed.cu_seqlens_kv is None else packed.cu_seqlens_kv.tolist()
    parts = [
        blocked(q[q0:q1], k[k0:k1], v[k0:k1], causal=causal, scale=scale, dropout_p=dropout_p)
        for q0, q1, k0, k1 in zip(q_edges, q_edges[1:], k_edges, k_edges[1:])
        if q1 > q0
    ]
    return torch.cat(parts) if parts else q.reshape(q.shape[0], q.shape[1], -1)


def _accepts(spec: AttentionSpec) -> str | None:
    if spec.device != "cpu":
        return "made for the CPU"
    if spec.context_parallel > 1:
        return "sees one context-parallel shard only"
    if spec.layer_scaling and spec.dtype == torch.float16:
        return "does not divide fp16 scores before they overflow (query-key layer scaling)"
    return None


@register("core_attention", "blocked", rank=20, accepts=_accepts)
def _load() -> Any:
    return blocked
