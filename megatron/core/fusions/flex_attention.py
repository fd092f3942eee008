"""FlexAttention (torch.nn.attention.flex_attention) for packed documents and windows without a dense mask,
on the GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron.core.fusions.core_attention import AttentionSpec, Window
from megatron.core.kernels.registry import Needs, register
from megatron.core.packed_seq_params import PackedSeqParams


@functools.lru_cache(maxsize=1)
def _compiled() -> tuple[Callable[..., Tensor], Callable[..., Any]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention, dynamic=False), torch.compile(create_block_mask)


def visible(
    sq: int, sk: int, causal: bool, q_docs: Tensor | None, k_docs: Tensor | None, window: Window | None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The predicate (batch, head, query index, key index) -> True where a query may look at a key."""
    shift = sk - sq
    left, right = window if window is not None else (-1, -1)

    def predicate(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = key >= 0
        if causal:
            seen = seen & (key <= query + shift)
        if left >= 0:
            seen = seen & (key >= query + shift - left)
        if right >= 0:
            seen = seen & (key <= query + shift + right)
        if q_docs is not None and k_docs is not None:
            seen = seen & (q_docs[query] == k_docs[key])
        return seen

    return predicate


def document_of(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """int32 [tokens]: the number of the document each token belongs to; `cu_seqlens` [documents + 1]."""
    index = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), index, right=True, out_int32=True)


def flex(
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
    """The contract of `core_attention` without mask tensor and dropout; packed q and k have equal
    boundaries.
    """
    if mask is not None or dropout_p > 0.0:
        raise ValueError("core_attention/flex takes neither a mask tensor nor dropout")
    attend, block_mask = _compiled()
    sq, b, heads, _ = q.shape
    sk = k.shape[0]
    q_docs = k_docs = None
    if packed is not None and packed.cu_seqlens_q is not None:
        q_docs = document_of(packed.cu_seqlens_q, sq)
        k_docs = q_docs if packed.cu_seqlens_kv is None else document_of(packed.cu_seqlens_kv, sk)
    seen = visible(sq, sk, causal, q_docs, k_docs, window)
    blocks = block_mask(seen, None, None, sq, sk, device=q.device)
    context = attend(
        *(t.permute(1, 2, 0, 3) for t in (q, k, v)),
        block_mask=blocks,
        scale=scale,
        enable_gqa=heads != k.shape[2],
    )
    return context.permute(2, 0, 1, 3).reshape(sq, b, -1)


def _accepts(spec: AttentionSpec) -> str | None:
    if spec.context_parallel > 1:
        return "sees one context-parallel shard only"
    if spec.masked or spec.dropout:
        return "takes neither a mask tensor nor dropout"
    if spec.layer_scaling and spec.dtype == torch.float16:
        return "does not divide fp16 scores before they overflow (query-key layer scaling)"
    return None


@register("core_attention", "flex", rank=8, needs=Needs(cuda=True, capability=(8, 0)), accepts=_accepts)
def _load() -> Any:
    return flex
