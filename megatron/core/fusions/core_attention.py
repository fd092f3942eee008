"""Core attention: softmax(q k^T scale) v under a mask. Its contract, the eager reference, and torch's fused
forms.

Every provider is called as

    provider(q, k, v, mask=None, *, causal, scale, dropout_p=0.0, packed=None, window=None) -> context

with q [sq, b, np, hn], k and v [sk, b, ng, hn] (ng divides np: grouped queries share keys), mask bool
broadcastable to [b, np, sq, sk] with True where attention is forbidden, and context [sq, b, np*hn].
`causal` aligns the last query with the last key. `packed` gives documents laid end to end in one row (b =
1): tokens see their own document only. `window` = (left, right) limits the distance, -1 for no limit.
Dropout draws from the default generator, so the caller sets up the RNG fork. A query that may see no key
attends to all keys equally in eager and sdpa (v0.9's -10000 fill), and gives zeros in device kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.fusions.fused_softmax import MASKED_SCORE, causal_mask
from megatron.core.kernels.registry import Spec, register
from megatron.core.packed_seq_params import PackedSeqParams

Window = tuple[int, int]


@dataclass(frozen=True)
class AttentionSpec(Spec):
    """What one attention module will see, as far as it is known when the model is built."""

    head_dim: int = 64
    heads: int = 1
    groups: int = 1
    causal: bool = True
    masked: bool = False  # calls may pass an explicit mask tensor
    packed: bool = False  # calls may pass PackedSeqParams
    dropout: bool = False
    window: bool = False
    context_parallel: int = 1
    softmax_in_fp32: bool = True
    layer_scaling: bool = (
        False  # query-key layer scaling: half-precision scores must be divided before they overflow
    )
    deterministic: bool = False
    short_query: bool = False  # inference: fewer queries than keys


def document_mask(cu_q: Tensor, cu_k: Tensor, sq: int, sk: int, causal: bool) -> Tensor:
    """bool [sq, sk], True where query and key belong to different documents (or the key comes later, when
    causal).
    """
    q_index, k_index = torch.arange(sq, device=cu_q.device), torch.arange(sk, device=cu_k.device)
    q_doc = torch.searchsorted(cu_q[1:].contiguous(), q_index, right=True)
    k_doc = torch.searchsorted(cu_k[1:].contiguous(), k_index, right=True)
    hidden = q_doc.unsqueeze(1) != k_doc.unsqueeze(0)
    if causal:
        # positions count from each document's end, so a shorter query document lines up with the last keys
        last = q_doc.clamp(max=cu_q.numel() - 2)
        q_left = cu_q[last + 1] - q_index
        k_left = cu_k[k_doc.clamp(max=cu_k.numel() - 2) + 1] - k_index
        hidden |= k_left.unsqueeze(0) < q_left.unsqueeze(1)
    return hidden


def window_mask(sq: int, sk: int, window: Window, device: torch.device) -> Tensor:
    """bool [sq, sk], True where key is more than window[0] before or window[1] after the query (-1: no
    limit).
    """
    distance = torch.arange(sk, device=device) - (torch.arange(sq, device=device) + sk - sq).unsqueeze(1)
    left, right = window
    hidden = torch.zeros(sq, sk, dtype=torch.bool, device=device)
    if left >= 0:
        hidden |= distance < -left
    if right >= 0:
        hidden |= distance > right
    return hidden


def hidden_pairs(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    causal: bool,
    packed: PackedSeqParams | None,
    window: Window | None,
) -> Tensor | None:
    """All restrictions as one bool mask broadcastable to [b, np, sq, sk], True = forbidden; None if there
    is none.
    """
    sq, sk = q.shape[0], k.shape[0]
    hidden = mask
    if packed is not None:
        if packed.cu_seqlens_q is None:
            raise ValueError("packed attention needs cu_seqlens_q")
        cu_k = packed.cu_seqlens_kv if packed.cu_seqlens_kv is not None else packed.cu_seqlens_q
        documents = document_mask(packed.cu_seqlens_q, cu_k, sq, sk, causal)
        hidden = documents if hidden is None else hidden | documents
    elif causal and sq > 1:
        above = causal_mask(sq, sk, q.device)
        hidden = above if hidden is None else hidden | above
    if window is not None and window != (-1, -1):
        far = window_mask(sq, sk, window, q.device)
        hidden = far if hidden is None else hidden | far
    return hidden


def matmul_softmax(
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
    softmax_in_fp32: bool = True,
    layer_coefficient: float = 1.0,
) -> Tensor:
    """Eager reference, v0.9's arithmetic: explicit scores, fill, softmax, dropout. Shapes as in the head of
    this file.

    `layer_coefficient` (query-key layer scaling) divides the scores before they are rounded to half
    precision and multiplies them back inside the fp32 softmax.
    """
    sq, b, heads, width = q.shape
    sk, groups = k.shape[0], k.shape[2]
    if groups != heads:
        k, v = (t.repeat_interleave(heads // groups, dim=2) for t in (k, v))
    queries = q.reshape(sq, b * heads, width).transpose(0, 1)
    keys = k.reshape(sk, b * heads, width).permute(1, 2, 0)
    values = v.reshape(sk, b * heads, -1).transpose(0, 1)
    scores = torch.baddbmm(
        q.new_empty(b * heads, sq, sk), queries, keys, beta=0.0, alpha=scale / layer_coefficient
    ).view(b, heads, sq, sk)  # fmt: skip
    if softmax_in_fp32:
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if layer_coefficient != 1.0:
        scores = scores * layer_coefficient
    hidden = hidden_pairs(q, k, mask, causal, packed, window)
    if hidden is not None:
        scores = scores.masked_fill(hidden, MASKED_SCORE)
    probs = torch.softmax(scores, dim=-1).to(q.dtype)
    probs = F.dropout(probs, dropout_p, training=dropout_p > 0.0)
    context = torch.bmm(probs.view(b * heads, sq, sk), values)
    return context.view(b, heads, sq, -1).permute(2, 0, 1, 3).reshape(sq, b, -1)


def sdpa(
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
    """torch's scaled_dot_product_attention: no [sq, sk] tensor for causal attention, grouped keys are not
    repeated.
    """
    sq, sk = q.shape[0], k.shape[0]
    plain_causal = causal and packed is None and mask is None and window in (None, (-1, -1)) and sq == sk
    hidden = None if plain_causal else hidden_pairs(q, k, mask, causal, packed, window)
    queries, keys, values = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    blind = None
    if hidden is not None:
        hidden = hidden.expand(*(1,) * (4 - hidden.dim()), *hidden.shape) if hidden.dim() < 4 else hidden
        blind = hidden.all(-1, keepdim=True)
        # rows that see nothing are computed unmasked and then replaced: torch gives them NaN or zeros
        # depending on backend
        hidden = hidden & ~blind
    context = F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=None if hidden is None else ~hidden,
        dropout_p=dropout_p,
        is_causal=plain_causal and sq > 1,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    if blind is not None and mask is not None:
        mean = values.mean(-2, keepdim=True)
        if mean.shape[1] != queries.shape[1]:
            mean = mean.repeat_interleave(queries.shape[1] // mean.shape[1], dim=1)
        context = torch.where(blind, mean, context)
    return context.permute(2, 0, 1, 3).reshape(sq, q.shape[1], -1)


def _whole_sequence(spec: AttentionSpec) -> str | None:
    return "sees one context-parallel shard only" if spec.context_parallel > 1 else None


@register("core_attention", "matmul_softmax", rank=0, accepts=_whole_sequence)
def _load_matmul_softmax() -> Any:
    return matmul_softmax


def _accepts_sdpa(spec: AttentionSpec) -> str | None:
    if spec.context_parallel > 1:
        return "sees one context-parallel shard only"
    if spec.layer_scaling and spec.dtype == torch.float16:
        return "does not divide fp16 scores before they overflow (query-key layer scaling)"
    if spec.device == "cuda" and (spec.packed or spec.window):
        return "needs a dense mask for packed documents and windows"
    return None


@register("core_attention", "sdpa", rank=10, accepts=_accepts_sdpa)
def _load_sdpa() -> Any:
    return sdpa
