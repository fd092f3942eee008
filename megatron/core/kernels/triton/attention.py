"""Attention in tiles with an online softmax, forward and backward, deterministic (after FlashAttention-2,
arXiv:2307.08691).

Causality, packed documents and sliding windows are one rule: every query sees one interval of keys. Two
int32 vectors hold the interval of each query, two more its inverse (the queries that see each key), so one
kernel serves all of them, skips every tile outside the intervals and evaluates no mask in tiles inside
them. Keys and values of grouped queries are never repeated. Dropout masks are drawn again in the backward
pass from the same seed.
"""

# mypy: allow-untyped-defs
# (arguments of kernels are pointers and numbers of Triton's own language)

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.core.fusions.core_attention import Window
from megatron.core.kernels.triton.launch import draw_seed, power_of_two
from megatron.core.packed_seq_params import PackedSeqParams

LOG2_E = 1.4426950408889634


class Intervals(NamedTuple):
    """int32 vectors: query i sees keys first_key[i] .. last_key[i] - 1; key j is seen by first_query[j] ..
    last_query[j] - 1.
    """

    first_key: Tensor  # [sq]
    last_key: Tensor  # [sq]
    first_query: Tensor  # [sk]
    last_query: Tensor  # [sk]


def intervals(
    sq: int,
    sk: int,
    causal: bool,
    window: Window | None,
    packed: PackedSeqParams | None,
    device: torch.device,
) -> Intervals:
    """The intervals of [sq] queries over [sk] keys; with `packed`, documents of queries and keys correspond
    one to one.
    """
    if packed is None:
        return _plain_intervals(sq, sk, causal, window, device)
    if packed.cu_seqlens_q is None:
        raise ValueError("packed attention needs cu_seqlens_q")
    cu_k = packed.cu_seqlens_q if packed.cu_seqlens_kv is None else packed.cu_seqlens_kv
    return _intervals(packed.cu_seqlens_q, cu_k, sq, sk, causal, window)


@functools.lru_cache(maxsize=32)
def _plain_intervals(
    sq: int, sk: int, causal: bool, window: Window | None, device: torch.device
) -> Intervals:
    edges = [torch.tensor([0, n], dtype=torch.int32, device=device) for n in (sq, sk)]
    return _intervals(edges[0], edges[1], sq, sk, causal, window)


def _intervals(
    cu_q: Tensor, cu_k: Tensor, sq: int, sk: int, causal: bool, window: Window | None
) -> Intervals:
    query = torch.arange(sq, device=cu_q.device)
    document = torch.searchsorted(cu_q[1:].contiguous(), query, right=True).clamp_(max=cu_q.numel() - 2)
    first, last = cu_k[document].long(), cu_k[document + 1].long()
    # the key that stands level with the query: documents are aligned at their ends
    level = last - (cu_q[document + 1] - query)
    left, right = window if window is not None else (-1, -1)
    if causal:
        right = 0 if right < 0 else min(right, 0)
    if right >= 0:
        last = torch.minimum(last, level + right + 1)
    if left >= 0:
        first = torch.maximum(first, level - left)
    # empty intervals are placed where both vectors stay sorted, so that the inverse below is exact
    last = torch.maximum(first, last)
    key = torch.arange(sk, device=cu_q.device)
    first_query = torch.searchsorted(last.contiguous(), key, right=True)
    last_query = torch.searchsorted(first.contiguous(), key, right=True)
    return Intervals(first.int(), last.int(), first_query.int(), last_query.int())


@triton.jit
def survivors(seed, head, rows, cols, sk, prob):
    """bool of the broadcast shape of `rows` and `cols`: which probabilities of this head dropout keeps."""
    # 32-bit counters: a wider one would cost a third of the registers; heads differ in their key instead
    return tl.rand(seed + head, rows * sk + cols) >= prob


@triton.jit
def forward_tiles(
    acc, peak, total, q, k, v, k_s, v_s, begin, end, first, last, sk, seed, head, rows, sq, scale, prob,
    MASK: tl.constexpr, DROP: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    dims = tl.arange(0, WIDE)
    for start in range(begin, end, BN):
        cols = start + tl.arange(0, BN)
        there = (cols[:, None] < sk) & (dims[None, :] < HEAD)
        keys = tl.load(k + cols.to(tl.int64)[:, None] * k_s + dims[None, :], mask=there, other=0.0)
        score = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
        if MASK:
            seen = (cols[None, :] >= first[:, None]) & (cols[None, :] < last[:, None])
            score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - safe[:, None])
        fade = tl.exp2(peak - safe)
        total = total * fade + tl.sum(weight, 1)
        if DROP:
            weight = tl.where(
                survivors(seed, head, rows[:, None], cols[None, :], sk, prob), weight / (1.0 - prob), 0.0
            )
        values = tl.load(v + cols.to(tl.int64)[:, None] * v_s + dims[None, :], mask=there, other=0.0)
        acc = tl.dot(weight.to(values.dtype), values, acc * fade[:, None], input_precision=PRECISION)
        peak = higher
    return acc, peak, total


@triton.jit
def attention_forward(
    q, k, v, out, lse, first_key, last_key, seed_in, sq, sk, heads, share,
    q_s, q_b, q_h, k_s, k_b, k_h, v_s, v_b, v_h, o_s, o_b, o_h, scale, prob,
    DROP: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1)
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    dims = tl.arange(0, WIDE)
    valid = rows < sq
    tile = valid[:, None] & (dims[None, :] < HEAD)
    far = rows.to(tl.int64)[:, None]
    queries = tl.load(q + b * q_b + h * q_h + far * q_s + dims[None, :], mask=tile, other=0.0)
    first = tl.load(first_key + rows, mask=valid, other=0)
    last = tl.load(last_key + rows, mask=valid, other=0)
    begin = tl.min(tl.where(valid, first, sk), 0) // BN * BN
    end = tl.max(last, 0)
    # tiles between these two are seen by every query of the block
    full_begin = tl.maximum((tl.max(first, 0) + BN - 1) // BN * BN, begin)
    full_end = tl.maximum(tl.min(tl.where(valid, last, sk), 0) // BN * BN, full_begin)
    k += b * k_b + h // share * k_h
    v += b * v_b + h // share * v_h
    seed = tl.load(seed_in) if DROP else 0
    acc = tl.zeros([BM, WIDE], dtype=tl.float32)
    peak = tl.full([BM], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BM], dtype=tl.float32)
    acc, peak, total = forward_tiles(
        acc, peak, total, queries, k, v, k_s, v_s, begin, tl.minimum(full_begin, end), first, last, sk,
        seed, pair, rows, sq, scale, prob, True, DROP, HEAD, WIDE, BN, PRECISION,
    )  # fmt: skip
    acc, peak, total = forward_tiles(
        acc, peak, total, queries, k, v, k_s, v_s, full_begin, full_end, first, last, sk,
        seed, pair, rows, sq, scale, prob, False, DROP, HEAD, WIDE, BN, PRECISION,
    )  # fmt: skip
    acc, peak, total = forward_tiles(
        acc, peak, total, queries, k, v, k_s, v_s, full_end, end, first, last, sk,
        seed, pair, rows, sq, scale, prob, True, DROP, HEAD, WIDE, BN, PRECISION,
    )  # fmt: skip
    blind = total == 0.0
    result = acc / tl.where(blind, 1.0, total)[:, None]
    tl.store(out + b * o_b + h * o_h + far * o_s + dims[None, :], result.to(out.dtype.element_ty), mask=tile)
    # +inf for a query that sees nothing: the backward pass then finds all its weights zero
    tl.store(
        lse + pair.to(tl.int64) * sq + rows, tl.where(blind, float("inf"), peak + tl.log2(total)), mask=valid
    )


@triton.jit
def attention_delta(
    out,
    grad,
    delta,
    sq,
    heads,
    o_s,
    o_b,
    o_h,
    g_s,
    g_b,
    g_h,
    HEAD: tl.constexpr,
    WIDE: tl.constexpr,
    BM: tl.constexpr,
):
    pair = tl.program_id(1)
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    dims = tl.arange(0, WIDE)
    tile = (rows[:, None] < sq) & (dims[None, :] < HEAD)
    far = rows.to(tl.int64)[:, None]
    context = tl.load(out + b * o_b + h * o_h + far * o_s + dims[None, :], mask=tile, other=0.0).to(
        tl.float32
    )
    upstream = tl.load(grad + b * g_b + h * g_h + far * g_s + dims[None, :], mask=tile, other=0.0).to(
        tl.float32
    )
    tl.store(delta + pair.to(tl.int64) * sq + rows, tl.sum(context * upstream, 1), mask=rows < sq)


@triton.jit
def query_grad_tiles(
    acc, q, grad, lse, delta, k, v, k_s, v_s, begin, end, first, last, sk, seed, head, rows, sq, scale, prob,
    MASK: tl.constexpr, DROP: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    dims = tl.arange(0, WIDE)
    for start in range(begin, end, BN):
        cols = start + tl.arange(0, BN)
        there = (cols[:, None] < sk) & (dims[None, :] < HEAD)
        keys = tl.load(k + cols.to(tl.int64)[:, None] * k_s + dims[None, :], mask=there, other=0.0)
        weight = tl.exp2(tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale - lse[:, None])
        if MASK:
            seen = (cols[None, :] >= first[:, None]) & (cols[None, :] < last[:, None])
            weight = tl.where(seen, weight, 0.0)
        values = tl.load(v + cols.to(tl.int64)[:, None] * v_s + dims[None, :], mask=there, other=0.0)
        upstream = tl.dot(grad, tl.trans(values), input_precision=PRECISION)
        if DROP:
            upstream = tl.where(
                survivors(seed, head, rows[:, None], cols[None, :], sk, prob), upstream / (1.0 - prob), 0.0
            )
        score_grad = weight * (upstream - delta[:, None])
        acc = tl.dot(score_grad.to(keys.dtype), keys, acc, input_precision=PRECISION)
    return acc


@triton.jit
def attention_query_grad(
    q, k, v, grad, lse_in, delta_in, grad_q, first_key, last_key, seed_in, sq, sk, heads, share,
    q_s, q_b, q_h, k_s, k_b, k_h, v_s, v_b, v_h, g_s, g_b, g_h, d_s, d_b, d_h, scale, scale_log2, prob,
    DROP: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1)
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    dims = tl.arange(0, WIDE)
    valid = rows < sq
    tile = valid[:, None] & (dims[None, :] < HEAD)
    far = rows.to(tl.int64)[:, None]
    queries = tl.load(q + b * q_b + h * q_h + far * q_s + dims[None, :], mask=tile, other=0.0)
    upstream = tl.load(grad + b * g_b + h * g_h + far * g_s + dims[None, :], mask=tile, other=0.0)
    lse = tl.load(lse_in + pair.to(tl.int64) * sq + rows, mask=valid, other=0.0)
    delta = tl.load(delta_in + pair.to(tl.int64) * sq + rows, mask=valid, other=0.0)
    first = tl.load(first_key + rows, mask=valid, other=0)
    last = tl.load(last_key + rows, mask=valid, other=0)
    begin = tl.min(tl.where(valid, first, sk), 0) // BN * BN
    end = tl.max(last, 0)
    full_begin = tl.maximum((tl.max(first, 0) + BN - 1) // BN * BN, begin)
    full_end = tl.maximum(tl.min(tl.where(valid, last, sk), 0) // BN * BN, full_begin)
    k += b * k_b + h // share * k_h
    v += b * v_b + h // share * v_h
    seed = tl.load(seed_in) if DROP else 0
    acc = tl.zeros([BM, WIDE], dtype=tl.float32)
    acc = query_grad_tiles(
        acc, queries, upstream, lse, delta, k, v, k_s, v_s, begin, tl.minimum(full_begin, end), first, last, sk,
        seed, pair, rows, sq, scale_log2, prob, True, DROP, HEAD, WIDE, BN, PRECISION,
    )  # fmt: skip
    acc = query_grad_tiles(
        acc, queries, upstream, lse, delta, k, v, k_s, v_s, full_begin, full_end, first, last, sk,
        seed, pair, rows, sq, scale_log2, prob, False, DROP, HEAD, WIDE, BN, PRECISION,
    )  # fmt: skip
    acc = query_grad_tiles(
        acc, queries, upstream, lse, delta, k, v, k_s, v_s, full_end, end, first, last, sk,
        seed, pair, rows, sq, scale_log2, prob, True, DROP, HEAD, WIDE, BN, PRECISION,
    )  # fmt: skip
    place = grad_q + b * d_b + h * d_h + far * d_s + dims[None, :]
    tl.store(place, (acc * scale).to(grad_q.dtype.element_ty), mask=tile)


@triton.jit
def attention_key_grad(
    q, k, v, grad, lse_in, delta_in, grad_k, grad_v, first_query, last_query, seed_in, sq, sk, heads, groups,
    q_s, q_b, q_h, k_s, k_b, k_h, v_s, v_b, v_h, g_s, g_b, g_h, d_s, d_b, d_h, scale, scale_log2, prob,
    DROP: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(1)
    b, g = (pair // groups).to(tl.int64), (pair % groups).to(tl.int64)
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    dims = tl.arange(0, WIDE)
    valid = cols < sk
    tile = valid[:, None] & (dims[None, :] < HEAD)
    far = cols.to(tl.int64)[:, None]
    keys = tl.load(k + b * k_b + g * k_h + far * k_s + dims[None, :], mask=tile, other=0.0)
    values = tl.load(v + b * v_b + g * v_h + far * v_s + dims[None, :], mask=tile, other=0.0)
    first = tl.load(first_query + cols, mask=valid, other=0)
    last = tl.load(last_query + cols, mask=valid, other=0)
    begin = tl.min(tl.where(valid, first, sq), 0) // BM * BM
    end = tl.max(last, 0)
    seed = tl.load(seed_in) if DROP else 0
    key_acc = tl.zeros([BN, WIDE], dtype=tl.float32)
    value_acc = tl.zeros([BN, WIDE], dtype=tl.float32)
    share = heads // groups
    for member in range(share):
        h = g * share + member
        head = b * heads + h
        q_head = q + b * q_b + h * q_h
        g_head = grad + b * g_b + h * g_h
        # one masked loop: a second copy of it for unmasked tiles costs more in spilled registers than the
        # mask does
        for start in range(begin, end, BM):
            rows = start + tl.arange(0, BM)
            there = (rows[:, None] < sq) & (dims[None, :] < HEAD)
            queries = tl.load(
                q_head + rows.to(tl.int64)[:, None] * q_s + dims[None, :], mask=there, other=0.0
            )
            upstream = tl.load(
                g_head + rows.to(tl.int64)[:, None] * g_s + dims[None, :], mask=there, other=0.0
            )
            lse = tl.load(lse_in + head * sq + rows, mask=rows < sq, other=0.0)
            delta = tl.load(delta_in + head * sq + rows, mask=rows < sq, other=0.0)
            # everything is computed transposed, [keys, queries]: it then is the left operand of both
            # products as it stands
            weight = tl.exp2(
                tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale_log2 - lse[None, :]
            )
            seen = (rows[None, :] >= first[:, None]) & (rows[None, :] < last[:, None])
            weight = tl.where(seen, weight, 0.0)
            slope = tl.dot(values, tl.trans(upstream), input_precision=PRECISION)
            used = weight
            if DROP:
                kept = survivors(seed, head, rows[None, :], cols[:, None], sk, prob)
                used = tl.where(kept, weight / (1.0 - prob), 0.0)
                slope = tl.where(kept, slope / (1.0 - prob), 0.0)
            value_acc = tl.dot(used.to(upstream.dtype), upstream, value_acc, input_precision=PRECISION)
            score_grad = weight * (slope - delta[None, :])
            key_acc = tl.dot(score_grad.to(queries.dtype), queries, key_acc, input_precision=PRECISION)
    place = b * d_b + g * d_h + far * d_s + dims[None, :]
    tl.store(grad_k + place, (key_acc * scale).to(grad_k.dtype.element_ty), mask=tile)
    tl.store(grad_v + place, value_acc.to(grad_v.dtype.element_ty), mask=tile)


class Tiles(NamedTuple):
    """Block sizes and warps of the three kernels for one padded head size."""

    forward: tuple[int, int, int, int]  # BM, BN, warps, stages
    query_grad: tuple[int, int, int, int]
    key_grad: tuple[int, int, int, int]


def tiles_for(wide: int, half: bool, dropout: bool) -> Tiles:
    """Tiles whose registers fit sm_80, sm_90 and sm_100 without spilling in a loop
    (tools/compile_kernels.py lists them).
    """
    if not half:
        block = 32 if wide <= 128 else 16
        return Tiles((block, block, 4, 1), (block, block, 4, 1), (block, block, 4, 1))
    if wide <= 64:
        return Tiles((128, 32 if dropout else 64, 8, 2), (64, 32, 4, 2), (32, 64, 4, 2))
    if wide <= 128:
        if dropout:
            return Tiles((128, 32, 8, 2), (64, 32, 8, 2), (16, 64, 8, 2))
        return Tiles((128, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2))
    return Tiles((64, 32, 8, 2), (32, 32, 8, 1), (32, 32, 8, 1))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, spans: Intervals, scale: float, dropout_p: float
    ) -> Tensor:
        """q [sq, b, np, hn], k and v [sk, b, ng, hn] -> [sq, b, np, hn]."""
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        sq, b, heads, width = q.shape
        sk, groups = k.shape[0], k.shape[2]
        out = torch.empty(sq, b, heads, width, dtype=q.dtype, device=q.device)
        lse = torch.empty(b, heads, sq, dtype=torch.float32, device=q.device)
        seed = draw_seed(q) if dropout_p else None
        wide = max(power_of_two(width), 16)
        bm, bn, warps, stages = tiles_for(wide, q.dtype != torch.float32, dropout_p > 0.0).forward
        if q.numel():
            attention_forward[(triton.cdiv(sq, bm), b * heads)](
                q, k, v, out, lse, spans.first_key, spans.last_key, lse if seed is None else seed,
                sq, sk, heads, heads // groups,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], scale * LOG2_E, dropout_p,
                DROP=dropout_p > 0.0, HEAD=width, WIDE=wide, BM=bm, BN=bn, PRECISION="ieee",
                num_warps=warps, num_stages=stages,
            )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, lse, seed, *spans)
        ctx.scale, ctx.dropout_p = scale, dropout_p
        return out

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """grad_output [sq, b, np, hn] -> gradients of q, k and v."""
        q, k, v, out, lse, seed, *spans = ctx.saved_tensors
        span = Intervals(*spans)
        sq, b, heads, width = q.shape
        sk, groups = k.shape[0], k.shape[2]
        grad = grad_output if grad_output.stride(-1) == 1 else grad_output.contiguous()
        grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        grad_k, grad_v = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (k, v))
        if not q.numel() or not k.numel():
            return grad_q.zero_(), grad_k, grad_v, None, None, None
        wide = max(power_of_two(width), 16)
        tiles = tiles_for(wide, q.dtype != torch.float32, ctx.dropout_p > 0.0)
        delta = torch.empty_like(lse)
        attention_delta[(triton.cdiv(sq, 32), b * heads)](
            out, grad, delta, sq, heads, *out.stride()[:3], *grad.stride()[:3], HEAD=width, WIDE=wide, BM=32
        )
        drop, seed_or_any = ctx.dropout_p > 0.0, lse if seed is None else seed
        inputs = (q, k, v, grad, lse, delta)
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3])
        scales = (ctx.scale, ctx.scale * LOG2_E, ctx.dropout_p)
        bm, bn, warps, stages = tiles.query_grad
        attention_query_grad[(triton.cdiv(sq, bm), b * heads)](
            *inputs, grad_q, span.first_key, span.last_key, seed_or_any, sq, sk, heads, heads // groups,
            *strides, *grad_q.stride()[:3], *scales,
            DROP=drop, HEAD=width, WIDE=wide, BM=bm, BN=bn, PRECISION="ieee", num_warps=warps, num_stages=stages,
        )  # fmt: skip
        bm, bn, warps, stages = tiles.key_grad
        attention_key_grad[(triton.cdiv(sk, bn), b * groups)](
            *inputs, grad_k, grad_v, span.first_query, span.last_query, seed_or_any, sq, sk, heads, groups,
            *strides, *grad_k.stride()[:3], *scales,
            DROP=drop, HEAD=width, WIDE=wide, BM=bm, BN=bn, PRECISION="ieee", num_warps=warps, num_stages=stages,
        )  # fmt: skip
        return grad_q, grad_k, grad_v, None, None, None


def attention(
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
    """The contract of `core_attention` without mask tensors. q [sq, b, np, hn], k and v [sk, b, ng, hn] ->
    [sq, b, np*hn].
    """
    if mask is not None:
        raise ValueError("core_attention/triton takes no mask tensor; use causal, packed or window")
    if window == (-1, -1):
        window = None
    spans = intervals(q.shape[0], k.shape[0], causal and q.shape[0] > 1, window, packed, q.device)
    return _Attention.apply(q, k, v, spans, scale, dropout_p).reshape(q.shape[0], q.shape[1], -1)
