"""Cross entropy over a vocabulary divided among ranks, in one pass and without fp32 copies of the logits.

With z the logits of one token, the loss is log(sum exp z) - z[target]; the gradient is softmax(z) - onehot(target). The
eager reference is v0.9's arithmetic: everything in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.collectives import all_gather_single
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


#: exp(x) = exp2(x log2 e): torch's exp2 takes a third of its exp's time on a CPU, with the same error of one rounding.
_LOG2_E = 1.4426950408889634

#: Logits per block of rows on a CPU: 1 MB of fp32, which stays in a core's cache.
_BLOCK_ELEMENTS = 1 << 18


def _row_blocks(z: Tensor) -> Iterator[slice]:
    """Blocks of rows that fit a cache; one block on an accelerator, where launches cost more than memory passes."""
    rows, columns = z.shape
    step = max(1, _BLOCK_ELEMENTS // max(columns, 1)) if z.device.type == "cpu" else max(rows, 1)
    for start in range(0, rows, step):
        yield slice(start, start + step)


class _VocabCrossEntropy(torch.autograd.Function):
    """Every rank reduces its slice of the logits z to two or three numbers per token (log-sum-exp, the target's logit if
    it holds it, sum of z for label smoothing); one small all-gather joins them.

    Wide logits: their exponentials are kept, in the buffer that backward turns into the gradient, so nothing is
    exponentiated or allocated twice. Half-precision logits: they are kept themselves and exp(z - lse) is computed again in
    fp32, because a probability rounded to half precision loses the gradient of every confident prediction.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, group: Group | None, label_smoothing: float, inplace: bool
    ) -> Tensor:
        """logits [..., v/tp], target [...] with global ids -> loss [...] in fp32 (fp64 for fp64 logits)."""
        columns, ranks = logits.shape[-1], group_size(group)
        z, local = logits.detach().reshape(-1, columns), target.reshape(-1)
        if ranks > 1:
            local = local - columns * dist.get_rank(group)
        foreign = (local < 0) | (local >= columns)  # held by another rank, or (labels of padding, -1) by none
        local = local.masked_fill(foreign, 0)

        wide = torch.promote_types(logits.dtype, torch.float32)
        kept = None
        if z.dtype == wide:
            kept = z if inplace else torch.empty_like(z) if ctx.needs_input_grad[0] else None
        peak = torch.empty(z.shape[0], dtype=wide, device=z.device)
        summary = peak.new_empty((3 if label_smoothing else 2, z.shape[0]))
        summary[1] = z.gather(1, local.unsqueeze(1)).squeeze(1).masked_fill(foreign, 0.0)
        for rows in _row_blocks(z):
            block = z[rows].to(wide)
            if label_smoothing:
                torch.sum(block, dim=-1, out=summary[2, rows])
            torch.amax(block, dim=-1, out=peak[rows])
            exponentials = None if kept is None else kept[rows]
            exponentials = torch.sub(block, peak[rows].unsqueeze(1), out=exponentials)
            exponentials.mul_(_LOG2_E).exp2_()
            torch.sum(exponentials, dim=-1, out=summary[0, rows])
        summary[0].log_().add_(peak)

        if ranks > 1:
            parts = summary.new_empty((ranks, *summary.shape))
            all_gather_single(parts, summary.unsqueeze(0), group=group)
            summary = torch.cat((parts[:, 0].logsumexp(dim=0, keepdim=True), parts[:, 1:].sum(dim=0)))

        log_sum = summary[0]
        keep, spread = smoothing_shares(label_smoothing, columns * ranks)
        loss = log_sum - summary[1]
        if spread:
            loss = keep * loss + spread * (log_sum - summary[2] / (columns * ranks))
        ctx.keep, ctx.share, ctx.shape = keep, spread / (columns * ranks), logits.shape
        ctx.exponentiated, ctx.overwrite, ctx.spent = kept is not None, kept is not None or inplace, False
        # Kept exponentials are relative to this rank's maximum, kept logits to nothing.
        shift = log_sum if kept is None else torch.exp(peak - log_sum)
        ctx.save_for_backward(z if kept is None else kept, shift, local, foreign)
        return loss.view(target.shape)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        """grad_output [...] -> gradient of the logits [..., v/tp]."""
        if ctx.spent:
            raise RuntimeError("the buffer of the first backward pass was overwritten; run forward again")
        ctx.spent = ctx.overwrite
        kept, shift, local, foreign = ctx.saved_tensors
        weight = grad_output.reshape(-1, 1).to(shift.dtype)
        minus_one_hot = (weight * -ctx.keep).masked_fill(foreign.unsqueeze(1), 0.0)
        local, shift = local.unsqueeze(1), shift.unsqueeze(1)
        if ctx.exponentiated:
            factor = shift * weight
            for rows in _row_blocks(kept):
                block = kept[rows].mul_(factor[rows])
                if ctx.share:
                    block.sub_(ctx.share * weight[rows])
                block.scatter_add_(1, local[rows], minus_one_hot[rows])
            return kept.view(ctx.shape), None, None, None, None
        grad = kept if ctx.overwrite else torch.empty_like(kept)
        for rows in _row_blocks(kept):
            block = torch.sub(kept[rows], shift[rows]).mul_(_LOG2_E).exp2_()
            if ctx.share:
                block.sub_(ctx.share)
            grad[rows] = block.mul_(weight[rows]).scatter_add_(1, local[rows], minus_one_hot[rows])
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
