"""What a layer, an embedding and an output layer do to one micro-batch on one rank: GEMMs, memory passes, transfers, and
what is kept for the backward pass.

One inventory serves predicted time, traffic, FLOPs and activation memory. GEMMs are (m, n, k) = [m, k] x [k, n]; each is
followed in the backward pass by two of the same size. Kept bytes follow Korthikanti et al. 2022 (arXiv:2205.05198, section
4), with this library's kernels in place of theirs: every tensor is counted once, however many operations keep it.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.fusions.blocked_attention import QUERIES_PER_BLOCK
from megatron.training.explain.parameters import Chunk
from megatron.training.explain.workload import Workload

_SMALL_LOGITS = 1 << 20

Gemm = tuple[float, float, float]


@dataclass(frozen=True)
class Work:
    """One operation on one micro-batch of one rank.

    `attention` counts FLOPs of fused attention in the forward pass (two and a half times as many follow). `moved` and
    `moved_back` are bytes read and written beside GEMMs, `kept` bytes held until the backward pass. Transfers are whole
    tensors in bytes: `gathered` over the tensor-parallel group (all-gather or reduce-scatter) in the forward pass,
    `gathered_back` waited for in the backward pass, `gathered_behind` behind a GEMM of the backward pass, `ring` the keys
    and values that pass around the context-parallel ranks, `exchanged` what a rank sends to other experts' ranks. `core` is
    what selective recomputation runs again. `fp8`: the GEMMs have fp8 operands.
    """

    name: str
    gemms: tuple[Gemm, ...] = ()
    attention: float = 0.0
    moved: float = 0.0
    moved_back: float = 0.0
    kept: float = 0.0
    gathered: float = 0.0
    gathered_back: float = 0.0
    gathered_behind: float = 0.0
    ring: float = 0.0
    exchanged: float = 0.0
    weights: float = 0.0
    core: bool = False
    fp8: bool = False

    @property
    def flops(self) -> float:
        """Of the forward pass."""
        return self.attention + sum(2 * m * n * k for m, n, k in self.gemms)


def _column(
    name: str, w: Workload, rows: float, inputs: int, outputs: float, kept: float, fp8: bool = False
) -> Work:
    """A column-parallel linear: gathers its input's tokens, or sums its input's gradient."""
    whole = rows * inputs * w.bytes if w.tp > 1 else 0.0
    weights = inputs * outputs
    return Work(
        name,
        gemms=((rows, outputs, inputs),),
        kept=kept,
        gathered=whole if w.sequence_parallel else 0.0,
        gathered_behind=2 * whole,  # gather again and reduce-scatter, or an all-reduce
        moved=_quantising(w, rows * inputs) if fp8 else 0.0,
        # The weight gradient is added to its accumulator.
        moved_back=2 * weights * w.gradient_bytes + (_quantising(w, rows * outputs) if fp8 else 0.0),
        weights=weights,
        fp8=fp8,
    )


def _row(
    name: str, w: Workload, rows: float, inputs: float, outputs: int, kept: float, fp8: bool = False
) -> Work:
    """A row-parallel linear: sums its output over the ranks."""
    whole = rows * outputs * w.bytes if w.tp > 1 else 0.0
    weights = inputs * outputs
    return Work(
        name,
        gemms=((rows, outputs, inputs),),
        kept=kept,
        gathered=whole if w.sequence_parallel else 2 * whole,
        gathered_back=whole if w.sequence_parallel else 0.0,
        moved=_quantising(w, rows * inputs) if fp8 else 0.0,
        moved_back=2 * weights * w.gradient_bytes + (_quantising(w, rows * outputs) if fp8 else 0.0),
        weights=weights,
        fp8=fp8,
    )


def _quantising(w: Workload, elements: float) -> float:
    """Bytes moved to make an fp8 operand: read once, written as it is and transposed."""
    return elements * (w.bytes + 2)


def _input(w: Workload, rows: float, held: float, width: float, fp8: bool) -> float:
    """Bytes that a column-parallel linear keeps of its input: as it came, or in fp8 what is not gathered again."""
    gathers = w.sequence_parallel and w.tp > 1
    return rows * width if fp8 and w.fp8_wgrad and not gathers else held * width * w.bytes


def _divided_input(w: Workload, elements: float, fp8: bool, needed: bool) -> float:
    """Bytes that are kept of a row-parallel linear's input; `needed`: whoever made it keeps it too."""
    if not (fp8 and w.fp8_wgrad):
        return elements * w.bytes
    return elements * (1 + w.bytes * needed)


def _norm(w: Workload, held: float) -> Work:
    """A norm of the residual stream: keeps its input; its output is kept by who reads it."""
    stream, out = held * w.hidden * w.residual_bytes, held * w.hidden * w.bytes
    return Work("norm", moved=stream + out, moved_back=2 * stream + out, kept=stream + 8 * held)


def _join(w: Workload, held: float) -> Work:
    """residual + dropout(x + bias): keeps the mask."""
    out = held * w.hidden * w.bytes
    mask = held * w.hidden if w.dropout else 0.0
    return Work("residual", moved=3 * out + mask, moved_back=2 * out + mask if w.dropout else 0.0, kept=mask)


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
        core=True,
    )


def _mlp(w: Workload, rows: float, held: float, name: str = "", fp8: bool = False) -> list[Work]:
    """Up, activation, down; `rows` tokens of which this rank holds `held` outside."""
    width = w.ffn / w.tp
    up, e = rows * width * (2 if w.gated else 1) * w.bytes, w.bytes
    down = rows * width * e
    # What the activation keeps beside its input: on a CPU, where time is scarcer, an intermediate.
    extra = down if w.on_cpu and (w.gated or e == 4) and w.fused_activation else 0.0
    return [
        _column(
            f"{name}fc1",
            w,
            rows,
            w.hidden,
            width * (2 if w.gated else 1),
            kept=_input(w, rows, held, w.hidden, fp8),
            fp8=fp8,
        ),
        Work(f"{name}activation", moved=up + down, moved_back=2 * up + down, kept=up + extra),
        _row(
            f"{name}fc2",
            w,
            rows,
            width,
            w.hidden,
            kept=_divided_input(w, rows * width, fp8, needed=False),
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
        gemms=((held, w.experts, w.hidden),),
        moved=4 * spread,
        moved_back=4 * spread,
        kept=held * w.hidden * w.bytes + 2 * spread + held * w.experts * 8,
        exchanged=away,
    )
    return [dispatch, *_mlp(w, rows * w.topk, routed, "expert ")]


def layer(w: Workload, *, decoder: bool, cross: bool = False, fp8: bool = False) -> list[Work]:
    """One transformer layer; `cross`: with attention to an encoder's output, `fp8`: with fp8 products."""
    rows, keys = (w.decoder_tokens, w.decoder_seq) if cross else (w.tokens, w.seq)
    held, e = rows * w.replicated, w.bytes
    inner = w.heads * w.head / w.tp
    per_token = (w.heads + 2 * w.groups) * w.head / w.tp
    rotated = rows * (w.heads / w.tp + w.keyed_heads) * w.head * e if w.rope else 0.0
    copied = rows * w.heads / w.tp * w.head * e if w.groups < w.heads and not w.rope else 0.0
    causal = cross or (decoder and w.causal)
    works = [
        _norm(w, held),
        _column("qkv", w, rows, w.hidden, per_token, kept=_input(w, rows, held, w.hidden, fp8), fp8=fp8),
        Work(
            "rope" if w.rope else "heads",
            moved=2 * rotated + 2 * copied,
            moved_back=2 * rotated,
            kept=rows * per_token * e + rotated + copied,
        ),
        _attention(w, rows, keys, keys, causal),
        _row(
            "proj",
            w,
            rows,
            inner,
            w.hidden,
            kept=_divided_input(w, rows * inner, fp8, needed=w.attention == "flash"),
            fp8=fp8,
        ),
        _join(w, held),
    ]
    if cross:
        source = _input(w, w.tokens, 0.0, w.hidden, fp8)  # as it came it is kept once, by the encoder
        works += [
            _norm(w, held),
            _column(
                "cross q",
                w,
                rows,
                w.hidden,
                inner,
                kept=_input(w, rows, held, w.hidden, fp8) + rows * inner * e,
                fp8=fp8,
            ),
            _column(
                "cross kv", w, w.tokens, w.hidden, 2 * inner, kept=source + 2 * w.tokens * inner * e, fp8=fp8
            ),
            _attention(w, rows, keys, w.seq, False),
            _row(
                "cross proj",
                w,
                rows,
                inner,
                w.hidden,
                kept=_divided_input(w, rows * inner, fp8, needed=w.attention == "flash"),
                fp8=fp8,
            ),
            _join(w, held),
        ]
    works.append(_norm(w, held))
    works += _experts(w, rows, held) if w.experts else _mlp(w, rows, held, fp8=fp8)
    works.append(_join(w, held))
    return works


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
        _norm(w, held),
        _column("logits", w, rows, w.hidden, width, kept=held * w.hidden * w.bytes),
        Work(
            "loss",
            moved=logits * (w.bytes + 4),
            moved_back=logits * (2 * w.bytes),
            kept=logits * (4 if small else w.bytes) + 24 * rows,
        ),
    ]


@dataclass(frozen=True)
class LayerGroup:
    """Equal layers of a chunk that are treated alike. `segment`: how many are recomputed together (0: kept)."""

    works: tuple[Work, ...]
    layers: int
    segment: int


@dataclass(frozen=True)
class ChunkWork:
    """The operations of one model chunk: before its layers, in them, after them; `stream` is one hidden state."""

    front: tuple[Work, ...]
    groups: tuple[LayerGroup, ...]
    back: tuple[Work, ...]
    stream_bytes: float

    def all(self) -> list[tuple[Work, int]]:
        """(operation, how often it runs forward before any recomputation)."""
        counted = [(work, 1) for work in (*self.front, *self.back)]
        for group in self.groups:
            counted += [(work, group.layers) for work in group.works]
        return counted


def chunk_work(w: Workload, chunk: Chunk) -> ChunkWork:
    """What a chunk of the model does."""
    front = embedding(w) if chunk.embeds else []
    back = head(w, w.decoder_tokens if w.encoder_decoder else w.tokens) if chunk.scores else []
    kinds = [(chunk.encoder_layers, False, False), (chunk.decoder_layers, True, w.encoder_decoder)]
    groups = []
    for layers, decoder, cross in kinds:
        for alike, fp8 in ((layers - chunk.fp8_layers, False), (min(layers, chunk.fp8_layers), True)):
            if alike > 0:
                works = tuple(layer(w, decoder=decoder, cross=cross, fp8=fp8))
                groups += [LayerGroup(works, count, segment) for count, segment in _segments(w, alike)]
    held = w.tokens * w.replicated * w.hidden * w.residual_bytes
    return ChunkWork(tuple(front), tuple(groups), tuple(back), held)


def _segments(w: Workload, layers: int) -> list[tuple[int, int]]:
    """(layers, layers recomputed together) of each group of a stack."""
    if w.recompute != "full":
        return [(layers, 0)]
    if w.recompute_method == "uniform":
        return [(layers, min(w.recompute_layers, layers))]
    again = min(w.recompute_layers, layers)
    return [(count, segment) for count, segment in ((again, 1), (layers - again, 0)) if count]


def kept_bytes(w: Workload, chunk: ChunkWork) -> float:
    """Bytes that a micro-batch of this chunk occupies between its forward and its backward pass."""
    return sum(work.kept for work in (*chunk.front, *chunk.back)) + sum(
        _kept_by(w, chunk, group) for group in chunk.groups
    )


def _kept_by(w: Workload, chunk: ChunkWork, group: LayerGroup) -> float:
    if group.segment:
        return -(-group.layers // group.segment) * chunk.stream_bytes * w.distributed_segments
    return group.layers * sum(
        work.kept for work in group.works if not (work.core and w.recompute == "selective")
    )


def recompute_bytes(w: Workload, chunk: ChunkWork) -> float:
    """By how much the backward pass exceeds what was kept, because it brings recomputed activations to life again.

    By the time it comes to them, everything that lies behind them has been freed.
    """
    freed = sum(work.kept for work in chunk.back)
    excess = 0.0
    for group in reversed(chunk.groups):
        if group.segment:
            alive = group.segment * sum(work.kept for work in group.works) - chunk.stream_bytes
            excess = max(excess, alive - freed)
        elif w.recompute == "selective":
            for position, work in enumerate(group.works):
                behind = sum(later.kept for later in group.works[position + 1 :] if not later.core)
                excess = max(excess, work.kept - behind - freed if work.core else 0.0)
        freed += _kept_by(w, chunk, group)
    return excess
