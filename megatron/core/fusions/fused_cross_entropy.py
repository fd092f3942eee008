"""Cross entropy over a vocabulary divided among ranks, in one pass and without fp32 copies of the logits.

With z the logits of one token, the loss is log(sum exp z) - z[target]. Each rank holds a slice of z; two
small all-reduces (maximum, then sum and target logit together) join them. The forward pass leaves
softmax(z) in the dtype of the logits, which is all the backward pass needs: softmax(z) - onehot(target).
The eager reference is v0.9's arithmetic: everything in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.kernels.registry import register

Group = dist.ProcessGroup


def group_size(group: Group | None) -> int:
    """Ranks over which the vocabulary is divided; None stands for one."""
    return 1 if group is None else group.size()


def smoothing_shares(label_smoothing: float, vocab_size: int) -> tuple[float, float]:
    """Weights of (loss of the target, mean negative log-probability) under label smoothing over
    `vocab_size` classes.

    The target keeps 1 - a, the other classes share a: with a' = a v / (v - 1) the loss is (1 - a') loss -
    a' mean(log p).
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must lie in [0, 1), not {label_smoothing}")
    if label_smoothing == 0.0:
        return 1.0, 0.0
    smoothing = label_smoothing * vocab_size / (vocab_size - 1)
    return 1.0 - smoothing, smoothing


def calculate_logits_max(vocab_parallel_logits: Tensor) -> tuple[Tensor, Tensor]:
    """logits [..., v/tp] -> (the same in fp32, their maximum over this rank's slice [...])."""
    wide = vocab_parallel_logits.float()
    return wide, wide.amax(dim=-1)


def calculate_predicted_logits(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    logits_max: Tensor,
    vocab_start_index: int,
    vocab_end_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(target mask [...], local target [t], stacked (target logit, sum of exp) [2...], exp of the shifted
    logits [..., v/tp]).
    """
    shifted = vocab_parallel_logits - logits_max.unsqueeze(-1)
    target_mask = (target < vocab_start_index) | (target >= vocab_end_index)
    masked_target_1d = (target - vocab_start_index).masked_fill(target_mask, 0).view(-1)
    flat = shifted.view(-1, shifted.shape[-1])
    rows = torch.arange(flat.shape[0], device=flat.device)
    predicted = flat[rows, masked_target_1d].view_as(target).masked_fill(target_mask, 0.0)
    exp_logits = shifted.exp_()
    return target_mask, masked_target_1d, torch.cat((predicted, exp_logits.sum(dim=-1))), exp_logits


def calculate_cross_entropy_loss(
    exp_logits: Tensor, predicted_logits_sum_exp_logits: Tensor
) -> tuple[Tensor, Tensor]:
    """exp_logits [..., v/tp] and the reduced pair [2...] -> (softmax [..., v/tp], loss [...])."""
    predicted, total = predicted_logits_sum_exp_logits.chunk(2, dim=0)
    return exp_logits.div_(total.unsqueeze(-1)), torch.log(total) - predicted


def calculate_gradients(
    softmax: Tensor, grad_output: Tensor, target_mask: Tensor, masked_target_1d: Tensor
) -> Tensor:
    """Gradient of the logits, written over `softmax` [..., v/tp]; grad_output [...]."""
    flat = softmax.view(-1, softmax.shape[-1])
    rows = torch.arange(flat.shape[0], device=flat.device)
    flat[rows, masked_target_1d] -= (~target_mask).view(-1).to(flat.dtype)
    return softmax.mul_(grad_output.unsqueeze(-1))


def vocab_cross_entropy_eager(
    logits: Tensor, target: Tensor, group: Group | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Eager reference for one rank or an undivided vocabulary. logits [..., v], target int64 [...] -> loss
    fp32 [...].
    """
    if group_size(group) > 1:
        raise ValueError(
            "the eager reference takes the whole vocabulary; use vocab_cross_entropy for a divided one"
        )
    log_probs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    keep, spread = smoothing_shares(label_smoothing, logits.shape[-1])
    loss = -keep * log_probs.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return loss if spread == 0.0 else loss - spread * log_probs.mean(-1)


_CHUNK_ELEMENTS = (
    1 << 18
)  # rows are taken so many elements at a time: about 1 MB of fp32, which stays in a core's cache


def _softmax_rows(logits: Tensor, out: Tensor, target: Tensor, keep: float, spread: float) -> Tensor:
    """Write softmax of [t, v] rows to `out` (may be `logits`) chunk by chunk; returns the loss [t] in fp32
    or wider.
    """
    tokens, vocab = logits.shape
    loss = torch.empty(tokens, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    step = max(1, _CHUNK_ELEMENTS // max(vocab, 1))
    for start in range(0, tokens, step):
        rows = slice(start, min(start + step, tokens))
        # fp32 inside the chunk only: the logarithm must not be rounded to half precision
        log_probs = torch.log_softmax(logits[rows], dim=-1, dtype=loss.dtype)
        part = log_probs.gather(1, target[rows].unsqueeze(1)).squeeze(1).mul_(-keep)
        if spread:
            part.sub_(log_probs.mean(-1), alpha=spread)
        loss[rows] = part
        out[rows] = log_probs.exp_()
    return loss


class _VocabCrossEntropy(torch.autograd.Function):
    """One pass over the logits; the probabilities replace them when `inplace`."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, group: Group | None, label_smoothing: float, inplace: bool
    ) -> Tensor:
        """logits [..., v/tp], target [...] -> loss [...]."""
        flat, labels = logits.detach().reshape(-1, logits.shape[-1]), target.reshape(-1)
        probs = flat if inplace else torch.empty_like(flat)
        ranks = group_size(group)
        keep, spread = smoothing_shares(label_smoothing, flat.shape[-1] * ranks)
        if ranks == 1:
            local, outside = labels, None
            loss = _softmax_rows(flat, probs, labels, keep, spread)
        else:
            local, outside, loss = _divided(flat, probs, labels, group, keep, spread)
        ctx.save_for_backward(probs, local, outside if outside is not None else local)
        ctx.divided, ctx.shape, ctx.keep = outside is not None, logits.shape, keep
        ctx.share = spread / (flat.shape[-1] * ranks)
        ctx.spent = False
        return loss.view(target.shape)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        """grad_output [...] -> gradient of the logits [..., v/tp], in the buffer of the probabilities."""
        if ctx.spent:
            raise RuntimeError(
                "the probabilities were overwritten by the first backward pass; run forward again"
            )
        ctx.spent = True
        probs, local, outside = ctx.saved_tensors
        weight = grad_output.reshape(-1, 1).to(probs.dtype)
        if ctx.share:
            probs.sub_(ctx.share)
        grad = probs.mul_(weight)
        at_target = weight * -ctx.keep
        if ctx.divided:
            at_target = at_target.masked_fill(outside.unsqueeze(1), 0.0)
        grad.scatter_add_(1, local.unsqueeze(1), at_target)
        return grad.view(ctx.shape), None, None, None, None


def _divided(
    logits: Tensor, probs: Tensor, target: Tensor, group: Group | None, keep: float, spread: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward over a vocabulary divided among `group`: (local target [t], not-mine mask [t], loss [t])."""
    tokens, width = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32)
    start = dist.get_rank(group) * width
    outside = (target < start) | (target >= start + width)
    local = (target - start).masked_fill(outside, 0)
    peak = logits.amax(dim=-1).to(wide)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    # rows: sum of exp, target logit, sum of logits; one reduction for all three
    sums = torch.empty(3 if spread else 2, tokens, dtype=wide, device=logits.device)
    step = max(1, _CHUNK_ELEMENTS // max(width, 1))
    for first in range(0, tokens, step):
        rows = slice(first, min(first + step, tokens))
        shifted = logits[rows].to(wide) - peak[rows].unsqueeze(1)
        sums[1, rows] = (
            shifted.gather(1, local[rows].unsqueeze(1)).squeeze(1).masked_fill_(outside[rows], 0.0)
        )
        if spread:
            sums[2, rows] = shifted.sum(-1)
        sums[0, rows] = shifted.exp_().sum(-1)
        probs[rows] = shifted
    dist.all_reduce(sums, group=group)
    probs.div_(sums[0].unsqueeze(1).to(probs.dtype))
    log_total = sums[0].log()
    loss = (log_total - sums[1]) * keep
    if spread:
        loss += spread * (log_total - sums[2] / (width * group_size(group)))
    return local, outside, loss


def vocab_cross_entropy(
    logits: Tensor,
    target: Tensor,
    group: Group | None = None,
    label_smoothing: float = 0.0,
    inplace: bool = False,
) -> Tensor:
    """logits [..., v/tp], target int64 [...] (global ids) -> loss [...] in fp32 (fp64 for fp64 logits).

    All ranks of `group` must call. `inplace` lets the probabilities overwrite the logits: right when the
    logits are used by nothing else (a matrix product does not need its output again), and the largest
    activation of the model is then held once.
    """
    return _VocabCrossEntropy.apply(logits, target, group, label_smoothing, inplace)


def fused_vocab_parallel_cross_entropy(vocab_parallel_logits: Tensor, target: Tensor) -> Tensor:
    """v0.9's name: logits [s, b, v/tp], target [s, b] -> loss [s, b], over the tensor-parallel group."""
    return vocab_cross_entropy(
        vocab_parallel_logits, target, parallel_state.get_tensor_model_parallel_group()
    )


@register("vocab_cross_entropy", "torch", rank=0)
def _load() -> Any:
    return vocab_cross_entropy
