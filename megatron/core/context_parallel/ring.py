"""Ring attention: queries stay, keys and values travel round the context-parallel ranks (arXiv:2310.01889).

Each rank holds the tokens that split.py gives it. In step j it attends to the keys of rank r - j while those of the
next step are under way, and merges the partial results by their log-sum-exp. The backward pass repeats the journey;
the gradients of keys and values travel with them and arrive at home after the last step. Only q, k, v, the output
and one log-sum-exp per query are kept.

Work is cut into tiles: a few consecutive queries against one consecutive stretch of keys. A tile that the causal
mask, a window or document edges hide is never computed, and where nothing in it is hidden no mask is made. Sums run
in fp32 (fp64 for fp64 inputs) and in a fixed order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import parallel_state
from megatron.core.context_parallel.split import Run, document_runs, runs
from megatron.core.fusions.core_attention import AttentionSpec, Window
from megatron.core.fusions.dropout import keep_mask, keep_scale
from megatron.core.fusions.fused_softmax import MASKED_SCORE
from megatron.core.kernels.registry import register
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import group_rank, group_size

#: Queries per tile: on the CPU a tile's scores should stay in the cache, an accelerator wants fewer launches.
_TILE_ON_CPU, _TILE_ELSEWHERE = 128, 2048


@dataclass(frozen=True)
class Tile:
    """Local rows of q and k that meet, their places in the whole sequence, and whether anything in it is hidden."""

    rows: slice
    columns: slice
    row_start: int
    column_start: int
    partial: bool


@dataclass(frozen=True)
class Visibility:
    """Which keys a query may see, by place in the whole sequence."""

    causal: bool = False
    window: Window = (-1, -1)
    edges: tuple[int, ...] | None = None  # document offsets of a packed row

    def columns(self, first: int, last: int, keys: Run) -> tuple[int, int, bool]:
        """Of `keys`, the stretch [low, high) that queries first..last may see, and whether parts of it are hidden."""
        low, high, partial = keys.start, keys.stop, False
        left, right = self.window
        if self.causal:
            high = min(high, last + 1)
            partial |= high - 1 > first
        if right >= 0:
            high = min(high, last + right + 1)
            partial |= high - 1 > first + right
        if left >= 0:
            low = max(low, first - left)
            partial |= low < last - left
        if self.edges is not None:
            opening, closing = bisect_right(self.edges, first) - 1, bisect_right(self.edges, last)
            low, high = max(low, self.edges[opening]), min(high, self.edges[closing])
            partial |= closing - opening > 1
        return low, high, partial

    def hidden(self, rows: Tensor, columns: Tensor) -> Tensor:
        """bool [rows, columns], True where the key must not be seen; arguments are places in the whole sequence."""
        distance = columns.unsqueeze(0) - rows.unsqueeze(1)
        left, right = self.window
        blocked = distance > 0 if self.causal else torch.zeros_like(distance, dtype=torch.bool)
        if right >= 0:
            blocked |= distance > right
        if left >= 0:
            blocked |= distance < -left
        if self.edges is not None:
            edges = torch.tensor(self.edges, device=rows.device)
            documents = (torch.searchsorted(edges, place, right=True) for place in (rows, columns))
            of_row, of_column = documents
            blocked |= of_row.unsqueeze(1) != of_column.unsqueeze(0)
        return blocked


def tiles(queries: list[Run], keys: list[Run], visibility: Visibility, size: int) -> Iterator[Tile]:
    """All tiles with something to see, in order of queries, then keys."""
    for query_run in queries:
        for offset in range(0, query_run.length, size):
            first = query_run.start + offset
            count = min(size, query_run.length - offset)
            for key_run in keys:
                low, high, partial = visibility.columns(first, first + count - 1, key_run)
                if low < high:
                    row, column = query_run.local + offset, key_run.local + low - key_run.start
                    yield Tile(
                        slice(row, row + count), slice(column, column + high - low), first, low, partial
                    )


@dataclass(frozen=True)
class _Plan:
    """Everything about one call that is not a tensor to differentiate."""

    group: ProcessGroup | None
    visibility: Visibility
    query_runs: list[Run]
    key_runs: list[list[Run]]  # of every rank
    scale: float
    dropout_p: float
    tile: int
    mask: Tensor | None  # bool [b or 1, np or 1, sq, s of all keys], True = hidden

    @property
    def size(self) -> int:
        return group_size(self.group)

    def source(self, step: int) -> int:
        """Whose keys are here in this step."""
        return (group_rank(self.group) - step) % self.size

    def tiles(self, step: int) -> Iterator[Tile]:
        """The tiles of this step."""
        return tiles(self.query_runs, self.key_runs[self.source(step)], self.visibility, self.tile)


class _Exchange:
    """Tensors on their way to the next rank while the previous rank's arrive."""

    def __init__(self, outgoing: tuple[Tensor, ...], group: ProcessGroup, tag: int) -> None:
        me, size = group.rank(), group.size()
        self.outgoing = [tensor.contiguous() for tensor in outgoing]  # referenced until sent
        self.incoming = tuple(torch.empty_like(tensor) for tensor in self.outgoing)
        operations = []
        for index, (sent, received) in enumerate(zip(self.outgoing, self.incoming)):
            label = 2 * tag + index
            operations += [
                dist.P2POp(dist.isend, sent, group=group, tag=label, group_peer=(me + 1) % size),
                dist.P2POp(dist.irecv, received, group=group, tag=label, group_peer=(me - 1) % size),
            ]
        self.work = dist.batch_isend_irecv(operations)

    def wait(self) -> tuple[Tensor, ...]:
        """What the previous rank sent."""
        for work in self.work:
            work.wait()
        return self.incoming


class _Blocks:
    """One rank's tensors with heads first, and the arithmetic of a tile.

    Query heads that share a key head are extra rows of it, so keys are never repeated: q [b * ng, np / ng, sq, hn].
    """

    def __init__(self, plan: _Plan, q: Tensor, groups: int) -> None:
        _, b, heads, _ = q.shape
        self.plan, self.batch, self.groups, self.shared = plan, b, groups, heads // groups
        self.native, self.wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
        self.device = q.device
        self.q = self.by_head(q)

    def product(self, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
        """alpha a b for batches of matrices, summed and delivered in the wide type.

        Accelerators multiply halves natively and sum them in fp32; the CPU is asked to multiply fp32.
        """
        if self.native != self.wide and self.device.type != "cpu":
            return torch.bmm(a.to(self.native), b.to(self.native), out_dtype=self.wide).mul_(alpha)
        a, b = a.to(self.wide), b.to(self.wide)
        return torch.baddbmm(a.new_empty(()), a, b, beta=0.0, alpha=alpha)

    def by_head(self, t: Tensor) -> Tensor:
        """[s, b, np, d] -> view [b * ng, np / ng, s, d]."""
        s, b, _, d = t.shape
        return t.reshape(s, b * self.groups, self.shared, d).permute(1, 2, 0, 3)

    def from_head(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """[b * ng, np / ng, s, d] -> [s, b, np, d]."""
        s, d = t.shape[2:]
        return t.permute(2, 0, 1, 3).reshape(s, self.batch, self.groups * self.shared, d).to(dtype)

    def rows(self, t: Tensor, tile: Tile) -> Tensor:
        """The tile's rows of all heads that share keys, [b * ng, rows, d]."""
        return t[:, :, tile.rows].reshape(t.shape[0], -1, t.shape[-1])

    def scores(self, queries: Tensor, keys: Tensor, tile: Tile) -> Tensor:
        """Scaled scores [b * ng, rows, columns] in the wide type, hidden pairs filled."""
        plan = self.plan
        scores = self.product(queries, keys.transpose(1, 2), plan.scale)
        if not tile.partial and plan.mask is None:
            return scores
        rows, columns = tile.rows.stop - tile.rows.start, tile.columns.stop - tile.columns.start
        grid = scores.view(self.batch, self.groups * self.shared, rows, columns)
        if tile.partial:
            row_places = torch.arange(tile.row_start, tile.row_start + rows, device=self.device)
            column_places = torch.arange(tile.column_start, tile.column_start + columns, device=self.device)
            grid.masked_fill_(plan.visibility.hidden(row_places, column_places), MASKED_SCORE)
        if plan.mask is not None:
            block = plan.mask[..., tile.column_start : tile.column_start + columns]
            grid.masked_fill_(block if block.shape[-2] == 1 else block[..., tile.rows, :], MASKED_SCORE)
        return scores


def _heads_first(t: Tensor) -> Tensor:
    """[s, b, n, d] -> view [b * n, s, d]."""
    s, b, n, d = t.shape
    return t.reshape(s, b * n, d).transpose(0, 1)


class RingAttention(torch.autograd.Function):
    """softmax(q k^T scale) v over keys that live on all ranks of a group."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: _Plan) -> Tensor:
        """q [sq, b, np, hn], k [sk, b, ng, hn], v [sk, b, ng, d], this rank's tokens -> [sq, b, np, d]."""
        blocks = _Blocks(plan, q, k.shape[2])
        shape = blocks.q.shape[:3]
        # Running maximum, sum of exponentials and weighted values of every query.
        peak = torch.full(shape, float("-inf"), dtype=blocks.wide, device=q.device)
        total = torch.zeros(shape, dtype=blocks.wide, device=q.device)
        context = torch.zeros((*shape, v.shape[-1]), dtype=blocks.wide, device=q.device)
        kept: list[Tensor] = []

        here: tuple[Tensor, ...] = (k, v)
        for step in range(plan.size):
            moving = None
            if step + 1 < plan.size:
                assert plan.group is not None, "more than one rank needs a group"
                moving = _Exchange(here, plan.group, tag=0)
            keys, values = (_heads_first(t) for t in here)
            for tile in plan.tiles(step):
                scores = blocks.scores(blocks.rows(blocks.q, tile), keys[:, tile.columns], tile)
                old = peak[:, :, tile.rows]
                new = torch.maximum(old, scores.amax(dim=-1).view(old.shape))
                weights = scores.sub_(new.view(scores.shape[:2]).unsqueeze(-1)).exp_()
                fade = torch.exp(old - new)
                total[:, :, tile.rows] = total[:, :, tile.rows] * fade + weights.sum(dim=-1).view(old.shape)
                if plan.dropout_p:
                    kept.append(keep_mask(weights.shape, plan.dropout_p, weights.device))
                    weights = weights * kept[-1]
                part = blocks.product(weights, values[:, tile.columns])
                block = context[:, :, tile.rows]
                block.mul_(fade.unsqueeze(-1)).add_(part.view(block.shape))
                peak[:, :, tile.rows] = new
            if moving is not None:
                here = moving.wait()

        context.div_(total.clamp_min(torch.finfo(blocks.wide).tiny).unsqueeze(-1))
        if plan.dropout_p:
            context.mul_(keep_scale(plan.dropout_p))
        log_sum = peak.add_(total.log())
        output = blocks.from_head(context, q.dtype)
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, output, log_sum, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """grad of the output [sq, b, np, d] -> gradients of q, k and v, all of this rank's tokens."""
        plan: _Plan = ctx.plan
        q, k, v, output, log_sum, *kept = ctx.saved_tensors
        blocks = _Blocks(plan, q, k.shape[2])
        upstream = blocks.by_head(grad_output)
        # sum_j p_j dp_j of a query is the product of its output and its output's gradient
        inner = (upstream.to(blocks.wide) * blocks.by_head(output)).sum(dim=-1)
        q_grad = torch.zeros(blocks.q.shape, dtype=blocks.wide, device=q.device)
        masks = iter(kept)
        factor = keep_scale(plan.dropout_p) if plan.dropout_p else 1.0

        here: tuple[Tensor, ...] = (k, v)
        returning: _Exchange | None = None
        for step in range(plan.size):
            moving = None
            if step + 1 < plan.size:
                assert plan.group is not None, "more than one rank needs a group"
                moving = _Exchange(here, plan.group, tag=0)
            keys, values = (_heads_first(t) for t in here)
            k_grad, v_grad = (
                torch.zeros(t.shape, dtype=blocks.wide, device=q.device) for t in (keys, values)
            )
            for tile in plan.tiles(step):
                queries, out_grad = blocks.rows(blocks.q, tile), blocks.rows(upstream, tile)
                scores = blocks.scores(queries, keys[:, tile.columns], tile)
                flat = scores.shape[:2]
                weights = scores.sub_(log_sum[:, :, tile.rows].reshape(flat).unsqueeze(-1)).exp_()
                weight_grad = blocks.product(out_grad, values[:, tile.columns].transpose(1, 2), factor)
                used = weights
                if plan.dropout_p:
                    keep = next(masks)
                    used = weights * keep
                    weight_grad.mul_(keep)
                v_grad[:, tile.columns] += blocks.product(used.transpose(1, 2), out_grad, factor)
                score_grad = weight_grad.sub_(inner[:, :, tile.rows].reshape(flat).unsqueeze(-1)).mul_(
                    weights
                )
                part = blocks.product(score_grad, keys[:, tile.columns], plan.scale)
                block = q_grad[:, :, tile.rows]
                block.add_(part.view(block.shape))
                k_grad[:, tile.columns] += blocks.product(score_grad.transpose(1, 2), queries, plan.scale)
            if moving is not None:
                here = moving.wait()
            k_sum, v_sum = k_grad, v_grad
            if returning is not None:
                before = returning.wait()
                k_sum, v_sum = before[0].add_(k_grad), before[1].add_(v_grad)
            if plan.size > 1:
                assert plan.group is not None, "more than one rank needs a group"
                returning = _Exchange((k_sum, v_sum), plan.group, tag=1)
        if returning is not None:
            k_sum, v_sum = returning.wait()

        def home(t: Tensor, like: Tensor) -> Tensor:
            s, b, n, d = like.shape
            return t.transpose(0, 1).reshape(s, b, n, d).to(like.dtype)

        return blocks.from_head(q_grad, q.dtype), home(k_sum, k), home(v_sum, v), None


def ring_attention(
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
    group: ProcessGroup | None = None,
    documents_are_split: bool = False,
) -> Tensor:
    """The contract of fusions/core_attention.py over a sequence divided among `group` (None = context-parallel).

    q [s/cp, b, np, hn], k and v [s/cp, b, ng, hn] -> [s/cp, b, np * hn]; all ranks of the group must call. mask has
    this rank's queries and the keys of the whole sequence in order, [b, 1 or np, s/cp or 1, s]. packed holds the
    document offsets of the whole row, which is divided like any sequence, or, with documents_are_split, document by
    document (each length a multiple of 2 cp). ValueError for packed documents that differ between q and k.
    """
    group = parallel_state.resolve(None).cp if group is None else group
    size, rank = group_size(group), group_rank(group)
    edges = _edges(packed)
    if documents_are_split and edges is not None:
        key_runs = [document_runs(list(edges), size, each) for each in range(size)]
        query_runs = key_runs[rank]
    else:
        query_runs = runs(q.shape[0] * size, size, rank)
        key_runs = [runs(k.shape[0] * size, size, each) for each in range(size)]
    if mask is not None and mask.dim() < 4:
        mask = mask.view((1,) * (4 - mask.dim()) + mask.shape)
    plan = _Plan(
        group=group,
        visibility=Visibility(causal, window or (-1, -1), edges),
        query_runs=query_runs,
        key_runs=key_runs,
        scale=scale,
        dropout_p=dropout_p,
        tile=_TILE_ON_CPU if q.device.type == "cpu" else _TILE_ELSEWHERE,
        mask=mask,
    )
    return RingAttention.apply(q, k, v, plan).flatten(2)


def _edges(packed: PackedSeqParams | None) -> tuple[int, ...] | None:
    if packed is None:
        return None
    if packed.cu_seqlens_q is None:
        raise ValueError("packed attention needs cu_seqlens_q")
    edges = tuple(packed.cu_seqlens_q.tolist())
    if packed.cu_seqlens_kv is not None and tuple(packed.cu_seqlens_kv.tolist()) != edges:
        raise ValueError(
            "context parallelism packs queries and keys alike: cu_seqlens_q and cu_seqlens_kv differ"
        )
    return edges


def _accepts(spec: AttentionSpec) -> str | None:
    return None if spec.context_parallel > 1 else "made for sequences divided among context-parallel ranks"


@register("core_attention", "ring", rank=5, accepts=_accepts)
def _load() -> Any:
    return ring_attention
