"""The output projection and its cross entropy together, a chunk of tokens at a time.

The logits [t, v/tp] of a large vocabulary are the biggest activation of a training step. Here they exist
for one chunk only: the forward pass keeps the loss and one normaliser per token, the backward pass computes
each chunk's logits again and turns them at once into the gradients of hidden states and weight. One GEMM in
four more, memory independent of t * v.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core.fusions.fused_cross_entropy import (
    Group,
    group_size,
    smoothing_shares,
    vocab_cross_entropy_eager,
)
from megatron.core.kernels.registry import register


def linear_cross_entropy_eager(
    hidden: Tensor, weight: Tensor, target: Tensor, group: Group | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Eager reference. hidden [t, h], weight [v, h], target [t] -> loss [t]."""
    return vocab_cross_entropy_eager(hidden @ weight.t(), target, group, label_smoothing)


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
        """hidden [t, h], weight [v/tp, h], target [t] -> loss [t]."""
        tokens, width = hidden.shape[0], weight.shape[0]
        ranks = group_size(group)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        start = dist.get_rank(group) * width if ranks > 1 else 0
        outside = (target < start) | (target >= start + width)
        local = (target - start).masked_fill(outside, 0)
        keep, spread = smoothing_shares(label_smoothing, width * ranks)
        # rows: log-sum-exp over this rank's slice, target logit, sum of logits
        parts = torch.empty(3, tokens, dtype=wide, device=hidden.device)
        for first in range(0, tokens, chunk):
            rows = slice(first, min(first + chunk, tokens))
            logits = hidden[rows] @ weight.t()
            parts[0, rows] = torch.logsumexp(logits.to(wide), dim=-1)
            parts[1, rows] = logits.gather(1, local[rows].unsqueeze(1)).squeeze(1).to(wide)
            if spread:
                parts[2, rows] = logits.sum(-1, dtype=wide)
        parts[1].masked_fill_(outside, 0.0)
        lse = parts[0]
        if ranks > 1:
            peak = lse.clone()
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
            parts[0] = (lse - peak).exp_()
            dist.all_reduce(parts if spread else parts[:2], group=group)
            lse = parts[0].log().add_(peak)
        ctx.save_for_backward(hidden, weight, local, outside, lse)
        ctx.chunk, ctx.keep, ctx.share = chunk, keep, spread / (width * ranks)
        loss = keep * (lse - parts[1])
        return loss if spread == 0.0 else loss + spread * (lse - parts[2] / (width * ranks))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        """grad_output [t] -> gradients of hidden [t, h] (this rank's share) and weight [v/tp, h]."""
        hidden, weight, local, outside, lse = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=lse.dtype, device=weight.device)
        for first in range(0, hidden.shape[0], ctx.chunk):
            rows = slice(first, min(first + ctx.chunk, hidden.shape[0]))
            probs = (hidden[rows] @ weight.t()).to(lse.dtype).sub_(lse[rows].unsqueeze(1)).exp_()
            if ctx.share:
                probs.sub_(ctx.share)
            at_target = probs.new_full((probs.shape[0], 1), -ctx.keep).masked_fill_(
                outside[rows].unsqueeze(1), 0.0
            )
            probs.scatter_add_(1, local[rows].unsqueeze(1), at_target)
            grad_logits = probs.mul_(grad_output[rows].unsqueeze(1)).to(hidden.dtype)
            torch.mm(grad_logits, weight, out=grad_hidden[rows])
            if grad_weight.dtype == hidden.dtype:
                grad_weight.addmm_(grad_logits.t(), hidden[rows])
            else:
                grad_weight.add_(grad_logits.t() @ hidden[rows])
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    group: Group | None = None,
    label_smoothing: float = 0.0,
    chunk_tokens: int = 1024,
) -> Tensor:
    """hidden [t, h], weight [v/tp, h], target int64 [t] (global ids) -> loss [t] in fp32.

    All ranks of `group` must call. The gradient of `hidden` is this rank's share: sum it over `group` (as
    the input gradient of a column-parallel linear).
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be positive, not {chunk_tokens}")
    return _LinearCrossEntropy.apply(hidden, weight, target, group, label_smoothing, chunk_tokens)


@register("linear_cross_entropy", "torch", rank=0)
def _load() -> Any:
    return linear_cross_entropy
