"""Cross entropy over logits whose vocabulary is divided among ranks.

For one token with logits z and target y the loss is lse(z) - z[y], lse = log sum exp. Every rank reduces its slice
of z to three numbers (lse, z[y] if it owns y, sum z for label smoothing); one small all-gather joins them. The
gradient is softmax(z) - onehot(y). Logits of fp32 and fp64: the exponentials of the forward pass are kept, in the
buffer that the backward pass turns into the gradient, so nothing is exponentiated or allocated twice. Half-precision
logits: they are kept themselves and exp(z - lse) is recomputed in fp32, because a probability rounded to half
precision loses the gradient of every confident prediction. Rows are taken in blocks that fit a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import parallel_state
from megatron.core.collectives import all_gather_single
from megatron.core.process_groups_config import group_rank, group_size

#: Logits per block: 1 MB of fp32.
_BLOCK_ELEMENTS = 1 << 18
#: Up to so many logits torch's own kernels are faster than ours on a CPU.
_SMALL_ELEMENTS = 1 << 20


def _row_blocks(z: Tensor) -> Iterator[slice]:
    """Blocks of rows that fit a cache; one block on an accelerator, where launches cost more than memory passes."""
    rows, columns = z.shape
    step = max(1, _BLOCK_ELEMENTS // max(columns, 1)) if z.device.type == "cpu" else max(rows, 1)
    for start in range(0, rows, step):
        yield slice(start, start + step)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """The loss and its gradient; see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, label_smoothing: float, group: ProcessGroup | None
    ) -> Tensor:
        """logits [.., v/tp], target [..] with global ids -> loss [..] in fp32 (fp64 for fp64 logits)."""
        columns, ranks = logits.shape[-1], group_size(group)
        z, local = logits.reshape(-1, columns), target.reshape(-1) - columns * group_rank(group)
        foreign = (local < 0) | (local >= columns)  # held by another rank, or (labels of padding, -1) by none
        local = local.masked_fill(foreign, 0)

        wide = torch.promote_types(logits.dtype, torch.float32)
        kept = torch.empty_like(z) if z.dtype == wide and ctx.needs_input_grad[0] else None
        peak = torch.empty(z.shape[0], dtype=wide, device=z.device)
        summary = peak.new_empty((3 if label_smoothing else 2, z.shape[0]))
        for rows in _row_blocks(z):
            block = z[rows].to(wide)
            if label_smoothing:
                torch.sum(block, dim=-1, out=summary[2, rows])
            torch.amax(block, dim=-1, out=peak[rows])
            exponentials = None if kept is None else kept[rows]
            exponentials = torch.sub(block, peak[rows].unsqueeze(1), out=exponentials).exp_()
            torch.sum(exponentials, dim=-1, out=summary[0, rows])
        summary[0].log_().add_(peak)
        own = z.gather(1, local.unsqueeze(1)).squeeze(1)
        summary[1] = own.masked_fill(foreign, 0.0)

        if group is not None and ranks > 1:
            parts = summary.new_empty((ranks, *summary.shape))
            all_gather_single(parts, summary.unsqueeze(0), group=group)
            summary = torch.cat((parts[:, 0].logsumexp(dim=0, keepdim=True), parts[:, 1:].sum(dim=0)))

        log_sum = summary[0]
        loss = log_sum - summary[1]
        ctx.keep, ctx.spread = 1.0, 0.0
        if label_smoothing:
            # The target keeps 1 - a and each of the other v - 1 words gets a / (v - 1), written as a mixture of
            # the plain loss and the mean over all v words.
            vocabulary = columns * ranks
            smoothing = label_smoothing * vocabulary / (vocabulary - 1)
            ctx.keep, ctx.spread = 1.0 - smoothing, smoothing / vocabulary
            loss = ctx.keep * loss + smoothing * (log_sum - summary[2] / vocabulary)
        ctx.shape, ctx.exponentiated = logits.shape, kept is not None
        # Kept exponentials are relative to this rank's maximum, kept logits to nothing.
        shift = log_sum if kept is None else torch.exp(peak - log_sum)
        ctx.save_for_backward(z if kept is None else kept, shift, local, foreign)
        return loss.view(target.shape)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        """grad of the loss [..] -> gradient of the logits [.., v/tp]."""
        kept, shift, local, foreign = ctx.saved_tensors
        weight = grad_output.reshape(-1, 1).to(shift.dtype)
        minus_one_hot = (weight * -ctx.keep).masked_fill(foreign.unsqueeze(1), 0.0)
        local, shift = local.unsqueeze(1), shift.unsqueeze(1)
        if ctx.exponentiated:
            grad = kept.mul_(shift * weight)
            if ctx.spread:
                grad.sub_(ctx.spread * weight)
            return grad.scatter_add_(1, local, minus_one_hot).view(ctx.shape), None, None, None
        grad = torch.empty_like(kept)
        for rows in _row_blocks(kept):
            block = torch.sub(kept[rows], shift[rows]).exp_()
            if ctx.spread:
                block.sub_(ctx.spread)
            grad[rows] = block.mul_(weight[rows]).scatter_add_(1, local[rows], minus_one_hot[rows])
        return grad.view(ctx.shape), None, None, None


def vocab_parallel_cross_entropy(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Loss [s, b] per token of logits [s, b, v/tp] for target ids [s, b]; fp32, or fp64 for fp64 logits.

    label_smoothing in [0, 1): probability mass spread over the words of the whole vocabulary. group: ranks that
    hold the slices (None = tensor-parallel); all must call. One backward pass per forward pass. A target outside the
    vocabulary, such as the -1 of padding, gives lse: a value for the loss mask to drop.
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if group is None:
        group = parallel_state.resolve(None).tp
    small = vocab_parallel_logits.device.type == "cpu" and vocab_parallel_logits.numel() <= _SMALL_ELEMENTS
    if group_size(group) == 1 and label_smoothing == 0.0 and small and bool((target >= 0).all()):
        return _undivided(vocab_parallel_logits, target)
    return _VocabParallelCrossEntropy.apply(vocab_parallel_logits, target, label_smoothing, group)


def _undivided(logits: Tensor, target: Tensor) -> Tensor:
    """The loss [..] of few logits on one rank: there torch's two vectorised kernels beat blocks of rows by a third.

    (From a few million logits on they are two to four times slower, for want of cache and for three big buffers.)
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_probs = F.log_softmax(logits, dim=-1, dtype=wide)
    return F.nll_loss(log_probs.flatten(0, -2), target.flatten(), reduction="none").view(target.shape)


class VocabParallelCrossEntropy:
    """The steps of the textbook computation, for code that puts its own collectives between them.

    logits_max, and then predicted_logits and sum_exp_logits, are to be reduced over the group by the caller.
    """

    @staticmethod
    def calculate_logits_max(vocab_parallel_logits: Tensor) -> tuple[Tensor, Tensor]:
        """logits [.., v/tp] -> the same in fp32 and their maximum [..] on this rank."""
        wide = vocab_parallel_logits.to(torch.promote_types(vocab_parallel_logits.dtype, torch.float32))
        return wide, wide.amax(dim=-1)

    @staticmethod
    def calculate_predicted_logits(
        vocab_parallel_logits: Tensor,
        target: Tensor,
        logits_max: Tensor,
        vocab_start_index: int,
        vocab_end_index: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Shift the logits in place by their maximum and take the exponential, in place as well.

        Returns: mask [..] of targets held elsewhere, local target [t] (0 there), shifted logit of the target [..]
        (0 there), sum of exponentials [..], exponentials [.., v/tp].
        """
        shifted = vocab_parallel_logits.sub_(logits_max.unsqueeze(-1))
        target_mask = (target < vocab_start_index) | (target >= vocab_end_index)
        masked_target = (target - vocab_start_index).masked_fill(target_mask, 0)
        predicted = shifted.gather(-1, masked_target.unsqueeze(-1)).squeeze(-1).masked_fill(target_mask, 0.0)
        exp_logits = shifted.exp_()
        return target_mask, masked_target.view(-1), predicted, exp_logits.sum(dim=-1), exp_logits

    @staticmethod
    def calculate_cross_entropy_loss(
        exp_logits: Tensor, predicted_logits: Tensor, sum_exp_logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Softmax [.., v/tp], written over exp_logits, and the loss [..]."""
        loss = torch.log(sum_exp_logits) - predicted_logits
        return exp_logits.div_(sum_exp_logits.unsqueeze(-1)), loss

    @staticmethod
    def prepare_gradient_calculation_operands(
        softmax: Tensor, target_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """softmax as [t, v/tp], row numbers [t], 1 where the target is on this rank [t], softmax itself."""
        grad_2d = softmax.view(-1, softmax.shape[-1])
        rows = torch.arange(grad_2d.shape[0], device=softmax.device)
        return grad_2d, rows, (~target_mask).view(-1).to(softmax.dtype), softmax

    @staticmethod
    def calculate_gradients(
        grad_2d: Tensor,
        arange_1d: Tensor,
        masked_target_1d: Tensor,
        softmax_update: Tensor,
        grad_input: Tensor,
        grad_output: Tensor,
    ) -> Tensor:
        """Turn softmax into the gradient of the logits, in place: (softmax - one-hot) x grad_output [..]."""
        grad_2d[arange_1d, masked_target_1d] -= softmax_update
        return grad_input.mul_(grad_output.unsqueeze(-1))
