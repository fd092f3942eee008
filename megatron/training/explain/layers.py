"""What transformer layers, an embedding and an output layer do to one micro-batch on one rank."""

from __future__ import annotations

from megatron.core.fusions.blocked_attention import QUERIES_PER_BLOCK
from megatron.training.explain.work import Gemm, Work, column, column_input, join, norm, row, row_input
from megatron.training.explain.workload import Workload

_SMALL_LOGITS = 1 << 20


def _attention(w: Workload, rows: float, queries: int, keys: int, causal: bool) -> Work:
    """softmax(q k^T) v of this rank's heads; `rows` query tokens of sequences of `queries`, attending to `keys`."""
    heads, e = w.heads / w.tp, w.bytes
    pairs = rows * keys * heads
    out = rows * heads * w.head * e
    key_value = 2 * w.keyed_heads * w.head * e * rows * keys / queries
    half = (1 + 1 / queries) / 2 if causal else 1.0
    if w.attention == "flash":
        kept, flops, moved = 4 * rows * heads, 4 * pairs * half * w.head, 3 * out
        if w.on_cpu:  # plain torch goes over the scores of a block several times
            moved += pairs * half * 8 * e
    elif w.attention == "blocked":  # whole blocks of a causal matrix are kept
        half = min(1.0, (1 + QUERIES_PER_BLOCK[e] / queries) / 2) if causal else 1.0
        kept, flops = pairs * half * (e + w.attention_dropout), 4 * pairs * half * w.head
        moved = pairs * half * 4 * e
    else:
        flops = 4 * pairs * w.head
        softmax = 4 + e if w.softmax_in_fp32 and e == 2 else e  # its result, and a copy in half precision
        kept = pairs * (softmax + (e + 1 if w.attention_dropout else 0))
        moved = pairs * (4 * e + 4)
    repeated = 0.0
    if w.attention != "flash" and w.keyed_heads < heads:
        repeated = 2 * rows * heads * w.head * e  # grouped keys and values are spread over the query heads
    ring = key_value * (w.cp - 1)
    return Work(
        "attention",
        attention=flops,
        moved=moved,
        moved_back=2 * moved,
        kept=kept + repeated,
        ring=ring,
        again="selective",
    )


def _mlp(w: Workload, rows: float, held: float, name: str = "", fp8: bool = False) -> list[Work]:
    """Up, activation, down; `rows` tokens of which this rank holds `held` outside."""
    width = w.ffn / w.tp
    up, e = rows * width * (2 if w.gated else 1) * w.bytes, w.bytes
    down = rows * width * e
    # What the activation keeps beside its input: on a CPU, where time is scarcer, an intermediate.
    extra = down if w.on_cpu and (w.gated or e == 4) and w.fused_activation else 0.0
    return [
        column(
            f"{name}fc1",
            w,
            rows,
            w.hidden,
            width * (2 if w.gated else 1),
            kept=column_input(w, rows, held, w.hidden, fp8),
            fp8=fp8,
        ),
        Work(f"{name}activation", moved=up + down, moved_back=2 * up + down, kept=up + extra),
        row(
            f"{name}fc2",
            w,
            rows,
            width,
            w.hidden,
            kept=row_input(w, rows * width, fp8, needed=False),
            fp8=fp8,
        ),
    ]


def _experts(w: Workload, rows: float, held: float) -> list[Work]:
    """Router, exchange of tokens, and the experts of this rank under an even load."""
    routed = held * w.topk
    spread = routed * w.hidden * w.bytes
    away = 2 * spread * (w.ep - 1) / w.ep
    dispatch = Work(
        "dispatch",
        gemms=(Gemm(held, w.experts, w.hidden),),
        moved=4 * spread,
        moved_back=4 * spread,
        kept=held * w.hidden * w.bytes + 2 * spread + held * w.experts * 8,
        exchanged=away,
    )
    return [dispatch, *_mlp(w, rows * w.topk, routed, "expert ")]


def _projection(name: str, w: Workload, rows: float, fp8: bool) -> Work:
    """Of the heads' outputs back to the hidden state."""
    inner = w.heads * w.head / w.tp
    kept = row_input(w, rows * inner, fp8, needed=w.attention == "flash")
    return row(name, w, rows, inner, w.hidden, kept, fp8)


def attention_part(w: Workload, *, decoder: bool, cross: bool = False, fp8: bool = False) -> list[Work]:
    """Norm, self-attention, residual; `cross`: and the same with attention to an encoder's output."""
    rows, keys = (w.decoder_tokens, w.decoder_seq) if cross else (w.tokens, w.seq)
    held, e = rows * w.replicated, w.bytes
    per_token = (w.heads + 2 * w.groups) * w.head / w.tp
    rotated = rows * (w.heads / w.tp + w.keyed_heads) * w.head * e if w.rope else 0.0
    copied = rows * w.heads / w.tp * w.head * e if w.groups < w.heads and not w.rope else 0.0
    causal = cross or (decoder and w.causal)
    works = [
        norm(w, held),
        column("qkv", w, rows, w.hidden, per_token, kept=column_input(w, rows, held, w.hidden, fp8), fp8=fp8),
        Work(
            "rope" if w.rope else "heads",
            moved=2 * rotated + 2 * copied,
            moved_back=2 * rotated,
            kept=rows * per_token * e + rotated + copied,
        ),
        _attention(w, rows, keys, keys, causal),
        _projection("proj", w, rows, fp8),
        join(w, held),
    ]
    return works + _cross_attention(w, rows, keys, fp8) if cross else works


def _cross_attention(w: Workload, rows: float, queries: int, fp8: bool) -> list[Work]:
    held, e = rows * w.replicated, w.bytes
    inner = w.heads * w.head / w.tp
    source = column_input(w, w.tokens, 0.0, w.hidden, fp8)  # as it came it is kept once, by the encoder
    return [
        norm(w, held),
        column(
            "cross q",
            w,
            rows,
            w.hidden,
            inner,
            kept=column_input(w, rows, held, w.hidden, fp8) + rows * inner * e,
            fp8=fp8,
        ),
        column("cross kv", w, w.tokens, w.hidden, 2 * inner, kept=source + 2 * w.tokens * inner * e, fp8=fp8),
        _attention(w, rows, queries, w.seq, False),
        _projection("cross proj", w, rows, fp8),
        join(w, held),
    ]


def mlp_part(w: Workload, *, cross: bool = False, fp8: bool = False) -> list[Work]:
    """Norm, MLP or experts, residual; `cross`: of the tokens of a decoder beside an encoder."""
    rows = w.decoder_tokens if cross else w.tokens
    held = rows * w.replicated
    inside = _experts(w, rows, held) if w.experts else _mlp(w, rows, held, fp8=fp8)
    return [norm(w, held), *inside, join(w, held)]


def transformer_layer(w: Workload, *, decoder: bool, cross: bool = False, fp8: bool = False) -> list[Work]:
    """One transformer layer; `cross`: with attention to an encoder's output, `fp8`: with fp8 products."""
    return attention_part(w, decoder=decoder, cross=cross, fp8=fp8) + mlp_part(w, cross=cross, fp8=fp8)


def embedding(w: Workload) -> list[Work]:
    """Look up, add positions, drop."""
    stream = w.tokens * w.hidden * w.bytes
    whole = stream if w.tp > 1 else 0.0
    mask = w.tokens * w.replicated * w.hidden if w.dropout else 0.0
    return [
        Work(
            "embedding",
            moved=3 * stream,
            moved_back=3 * stream,
            kept=16 * w.tokens + mask,
            gathered=2 * whole,
            gathered_back=whole if w.sequence_parallel else 0.0,
        )
    ]


def head(w: Workload, rows: float) -> list[Work]:
    """Final norm, logits and loss."""
    held, width = rows * w.replicated, w.vocab / w.tp
    logits = rows * width
    # Few logits on one CPU rank go through torch's own loss, which keeps them in fp32.
    small = w.on_cpu and w.tp == 1 and logits <= _SMALL_LOGITS
    return [
        norm(w, held),
        column("logits", w, rows, w.hidden, width, kept=held * w.hidden * w.bytes),
        Work(
            "loss",
            moved=logits * (w.bytes + 4),
            moved_back=logits * (2 * w.bytes),
            kept=logits * (4 if small else w.bytes) + 24 * rows,
        ),
    ]
