"""Cross entropy over a vocabulary divided among ranks, in one pass and without fp32 copies of the logits.

With z the logits of one token, the loss is log(sum exp z) - z[target]. Each rank holds a slice of z; two
small all-reduces (maximum, then sum and target logit together) join them. The gradient is softmax(z) -
onehot(target). The eager reference is v0.9's arithmetic: everything in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
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


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Blocks of rows that fit a cache; one block on an accelerator, where a launch costs more than a pass
    over memory.
    """
    rows, width = logits.shape
    step = max(1, _CHUNK_ELEMENTS // max(width, 1)) if logits.device.type == "cpu" else max(rows, 1)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def _statistics(
    logits: Tensor, exponentials: Tensor | None, local: Tensor, outside: Tensor, with_sum: bool
) -> tuple[Tensor, Tensor]:
    """logits [t, v/tp], local target [t] -> (maximum [t], rows (sum of exp, target logit, sum of logits) [2
    or 3, t]).

    exp(logits - maximum) is left in `exponentials` (may be `logits`) if given.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    peak = torch.empty(logits.shape[0], dtype=wide, device=logits.device)
    sums = torch.empty(3 if with_sum else 2, logits.shape[0], dtype=wide, device=logits.device)
    own = logits.gather(1, local.unsqueeze(1)).squeeze(1).to(wide)
    sums[1] = own.masked_fill(outside, 0.0)
    for rows in _chunks(logits):
        block = logits[rows].to(wide)
        torch.amax(block, dim=-1, out=peak[rows])
        if with_sum:
            torch.sum(block, dim=-1, out=sums[2, rows])
        shifted = (
            block if exponentials is None else exponentials[rows]
        )  # without a buffer `block` is a copy of our own
        torch.sub(block, peak[rows].unsqueeze(1), out=shifted)
        torch.sum(shifted.exp_(), dim=-1, out=sums[0, rows])
    return peak, sums


class _VocabCrossEntropy(torch.autograd.Function):
    """Wide logits: their exponentials are kept and become the gradient. Half-precision logits: they are
    kept themselves and the probabilities recomputed in fp32, because a probability near 1 rounded to half
    precision would lose its gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, group: Group | None, label_smoothing: float, inplace: bool
    ) -> Tensor:
        """logits [..., v/tp], target [...] -> loss [...]."""
        flat, labels = logits.detach().reshape(-1, logits.shape[-1]), target.reshape(-1)
        width, ranks = flat.shape[1], group_size(group)
        keep, spread = smoothing_shares(label_smoothing, width * ranks)
        local = labels if ranks == 1 else labels - dist.get_rank(group) * width
        outside = (local < 0) | (local >= width)  # held by another rank, or (labels of padding, -1) by none
        local = local.masked_fill(outside, 0)
        wide = flat.dtype in (torch.float32, torch.float64)
        exponentials = (flat if inplace else torch.empty_like(flat)) if wide else None
        peak, sums = _statistics(flat, exponentials, local, outside, spread > 0.0)
        if ranks > 1:
            whole = peak.clone()
            dist.all_reduce(whole, op=dist.ReduceOp.MAX, group=group)
            sums[0].mul_(torch.exp(peak - whole))
            dist.all_reduce(sums, group=group)
        else:
            whole = peak
        lse = sums[0].log().add_(whole)
        ctx.save_for_backward(flat if exponentials is None else exponentials, local, outside, lse, peak)
        ctx.wide, ctx.overwrite, ctx.spent = wide, inplace or wide, False
        ctx.shape, ctx.keep, ctx.share = logits.shape, keep, spread / (width * ranks)
        loss = (lse - sums[1]) * keep
        if spread:
            loss += spread * (lse - sums[2] / (width * ranks))
        return loss.view(target.shape)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        """grad_output [...] -> gradient of the logits [..., v/tp]."""
        if ctx.spent:
            raise RuntimeError("the buffer of the first backward pass was overwritten; run forward again")
        ctx.spent = ctx.overwrite
        kept, local, outside, lse, peak = ctx.saved_tensors
        weight = grad_output.reshape(-1).to(lse.dtype)
        at_target = (weight * -ctx.keep).masked_fill_(outside, 0.0)
        grad = kept if ctx.overwrite else torch.empty_like(kept)
        factor = weight * torch.exp(peak - lse) if ctx.wide else weight
        for rows in _chunks(kept):
            if ctx.wide:
                block = grad[rows].mul_(factor[rows].unsqueeze(1))
            else:
                block = (
                    kept[rows]
                    .to(lse.dtype)
                    .sub_(lse[rows].unsqueeze(1))
                    .exp_()
                    .mul_(factor[rows].unsqueeze(1))
                )
            if ctx.share:
                block.sub_(weight[rows].unsqueeze(1), alpha=ctx.share)
            block.scatter_add_(1, local[rows].unsqueeze(1), at_target[rows].unsqueeze(1))
            if not ctx.wide:
                grad[rows] = block
        return grad.view(ctx.shape), None, None, None, None


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
