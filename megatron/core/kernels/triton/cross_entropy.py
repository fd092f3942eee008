"""Vocabulary cross entropy: one read of the logits forward, one read and one write backward, fp32 in
registers only.

The forward kernel leaves four numbers per row (maximum, sum of exp, target logit, sum of logits); joining
them over a divided vocabulary is arithmetic on [t] vectors. The backward kernel turns logits into
gradients, in place when allowed.
"""

# mypy: allow-untyped-defs
# (arguments of kernels are pointers and numbers of Triton's own language)

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from megatron.core.fusions.fused_cross_entropy import Group, group_size, smoothing_shares
from megatron.core.kernels.triton.launch import power_of_two

WIDEST_BLOCK = 8192


@triton.jit
def row_statistics(
    logits,
    target,
    peak_out,
    total_out,
    target_out,
    sum_out,
    width,
    start,
    BLOCK: tl.constexpr,
    SUM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * width
    cols = tl.arange(0, BLOCK)
    # running maxima and sums per lane: the only reductions over the block come after the loop
    peak = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    plain = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, width, BLOCK):
        inside = first + cols < width
        value = tl.load(base + first + cols, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, value)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - safe) + tl.exp(value - safe)
        peak = higher
        if SUM:
            plain += tl.where(inside, value, 0.0)
    top = tl.max(peak, 0)
    tl.store(peak_out + row, top)
    tl.store(total_out + row, tl.sum(total * tl.exp(peak - tl.where(top == float("-inf"), 0.0, top)), 0))
    if SUM:
        tl.store(sum_out + row, tl.sum(plain, 0))
    label = tl.load(target + row) - start
    mine = (label >= 0) & (label < width)
    tl.store(target_out + row, tl.load(base + label, mask=mine, other=0.0).to(tl.float32))


@triton.jit
def logits_to_gradient(
    logits, grad_logits, target, lse, grad_loss, width, start, keep, share, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    value = tl.load(logits + row * width + cols, mask=inside, other=0.0).to(tl.float32)
    grad = tl.exp(value - tl.load(lse + row)) - share
    grad -= tl.where(cols == tl.load(target + row) - start, keep, 0.0)
    grad *= tl.load(grad_loss + row).to(tl.float32)
    tl.store(grad_logits + row * width + cols, grad.to(grad_logits.dtype.element_ty), mask=inside)


def statistics(logits: Tensor, target: Tensor, start: int, with_sum: bool) -> tuple[Tensor, Tensor]:
    """logits [t, v/tp] contiguous, target [t] -> (maximum [t], rows (sum of exp, target logit, sum of
    logits) [3, t]).
    """
    rows, width = logits.shape
    peak = torch.empty(rows, dtype=torch.float32, device=logits.device)
    sums = torch.zeros(3, rows, dtype=torch.float32, device=logits.device)
    if logits.numel():
        row_statistics[(rows,)](
            logits, target, peak, sums[0], sums[1], sums[2], width, start,
            BLOCK=min(power_of_two(width), 4096), SUM=with_sum, num_warps=8,
        )  # fmt: skip
    return peak, sums


def join(peak: Tensor, sums: Tensor, group: Group | None, with_sum: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of this rank's slice -> (log-sum-exp, target logit, sum of logits) [t] over the whole
    vocabulary.
    """
    if group_size(group) > 1:
        whole = peak.clone()
        dist.all_reduce(whole, op=dist.ReduceOp.MAX, group=group)
        sums[0].mul_(torch.exp(peak - whole))
        dist.all_reduce(sums if with_sum else sums[:2], group=group)
        peak = whole
    return sums[0].log().add_(peak), sums[1], sums[2]


def write_gradient(
    logits: Tensor,
    out: Tensor,
    target: Tensor,
    lse: Tensor,
    grad_loss: Tensor,
    start: int,
    keep: float,
    share: float,
) -> None:
    """Write (softmax - share - keep * onehot) * grad_loss [t, v/tp] into `out`, which may be `logits`."""
    rows, width = logits.shape
    if logits.numel():
        block = min(power_of_two(width), WIDEST_BLOCK)
        logits_to_gradient[(rows, triton.cdiv(width, block))](
            logits,
            out,
            target,
            lse,
            grad_loss.contiguous(),
            width,
            start,
            keep,
            share,
            BLOCK=block,
            num_warps=8,
        )


def loss_of(
    lse: Tensor, target_logit: Tensor, logit_sum: Tensor, keep: float, spread: float, vocab: int
) -> Tensor:
    """The per-token loss [t] from the joined statistics."""
    loss = (lse - target_logit) * keep
    return loss if spread == 0.0 else loss + spread * (lse - logit_sum / vocab)


class _VocabCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, group: Group | None, label_smoothing: float, inplace: bool
    ) -> Tensor:
        """logits [..., v/tp], target [...] -> loss fp32 [...]."""
        flat = logits.reshape(-1, logits.shape[-1]).contiguous()
        labels = target.reshape(-1).contiguous()
        width, ranks = flat.shape[1], group_size(group)
        start = dist.get_rank(group) * width if ranks > 1 else 0
        keep, spread = smoothing_shares(label_smoothing, width * ranks)
        peak, sums = statistics(flat, labels, start, spread > 0.0)
        lse, target_logit, logit_sum = join(peak, sums, group, spread > 0.0)
        ctx.save_for_backward(flat, labels, lse)
        ctx.start, ctx.keep, ctx.share, ctx.inplace = start, keep, spread / (width * ranks), inplace
        ctx.shape, ctx.spent = logits.shape, False
        return loss_of(lse, target_logit, logit_sum, keep, spread, width * ranks).view(target.shape)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        """grad_output [...] -> gradient of the logits [..., v/tp]."""
        if ctx.spent:
            raise RuntimeError("the logits were overwritten by the first backward pass; run forward again")
        ctx.spent = ctx.inplace
        flat, labels, lse = ctx.saved_tensors
        out = flat if ctx.inplace else torch.empty_like(flat)
        write_gradient(flat, out, labels, lse, grad_output.reshape(-1), ctx.start, ctx.keep, ctx.share)
        return out.view(ctx.shape), None, None, None, None


def vocab_cross_entropy(
    logits: Tensor,
    target: Tensor,
    group: Group | None = None,
    label_smoothing: float = 0.0,
    inplace: bool = False,
) -> Tensor:
    """logits [..., v/tp], target int64 [...] -> loss fp32 [...]; `inplace` lets the backward pass overwrite
    the logits.
    """
    return _VocabCrossEntropy.apply(logits, target, group, label_smoothing, inplace)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        group: Group | None,
        label_smoothing: float,
        chunk: int,
    ) -> Tensor:
        """hidden [t, h], weight [v/tp, h], target [t] -> loss fp32 [t]."""
        width, ranks = weight.shape[0], group_size(group)
        labels = target.contiguous()
        start = dist.get_rank(group) * width if ranks > 1 else 0
        keep, spread = smoothing_shares(label_smoothing, width * ranks)
        chunks = [
            statistics(part @ weight.t(), ids, start, spread > 0.0)
            for part, ids in zip(hidden.split(chunk), labels.split(chunk))
        ]
        peak, sums = torch.cat([c[0] for c in chunks]), torch.cat([c[1] for c in chunks], dim=1)
        lse, target_logit, logit_sum = join(peak, sums, group, spread > 0.0)
        ctx.save_for_backward(hidden, weight, labels, lse)
        ctx.start, ctx.keep, ctx.share, ctx.chunk = start, keep, spread / (width * ranks), chunk
        return loss_of(lse, target_logit, logit_sum, keep, spread, width * ranks)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        """grad_output [t] -> gradients of hidden [t, h] (this rank's share) and weight [v/tp, h]."""
        hidden, weight, labels, lse = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for first in range(0, hidden.shape[0], ctx.chunk):
            rows = slice(first, first + ctx.chunk)
            logits = hidden[rows] @ weight.t()
            write_gradient(
                logits, logits, labels[rows], lse[rows], grad_output[rows], ctx.start, ctx.keep, ctx.share
            )
            torch.mm(logits, weight, out=grad_hidden[rows])
            if hidden.dtype == torch.float32:
                grad_weight.addmm_(logits.t(), hidden[rows])
            else:
                grad_weight.add_(logits.t() @ hidden[rows])
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    group: Group | None = None,
    label_smoothing: float = 0.0,
    chunk_tokens: int = 4096,
) -> Tensor:
    """hidden [t, h], weight [v/tp, h], target [t] -> loss fp32 [t]; logits exist for `chunk_tokens` tokens
    at a time.
    """
    return _LinearCrossEntropy.apply(hidden, weight, target, group, label_smoothing, chunk_tokens)
