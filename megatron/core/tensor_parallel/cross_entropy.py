"""Cross entropy over logits whose vocabulary is divided among ranks, under v0.9's names.

The computation is `fusions.fused_cross_entropy`'s; here are the choice for few logits and the textbook's single steps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import parallel_state
from megatron.core.errors import InvariantError
from megatron.core.fusions.fused_cross_entropy import vocab_cross_entropy
from megatron.core.process_groups_config import group_size

#: Up to so many logits torch's own kernels are faster than ours on a CPU.
_SMALL_ELEMENTS = 1 << 20


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
        raise InvariantError("label_smoothing", f"must be in [0, 1), got {label_smoothing}")
    if group is None:
        group = parallel_state.resolve(None).tp
    small = vocab_parallel_logits.device.type == "cpu" and vocab_parallel_logits.numel() <= _SMALL_ELEMENTS
    if group_size(group) == 1 and label_smoothing == 0.0 and small and bool((target >= 0).all()):
        return _undivided(vocab_parallel_logits, target)
    return vocab_cross_entropy(vocab_parallel_logits, target, group, label_smoothing)


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
