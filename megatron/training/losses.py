"""Losses shared by the entry scripts, in the form the schedules expect (spec: training, section 14)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import device, parallel_state
from megatron.core.errors import TrainingError
from megatron.training.global_vars import get_context

TokenLoss = tuple[Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]


def masked_token_loss(loss_mask: Tensor, output_tensor: Tensor, name: str = "lm loss") -> TokenLoss:
    """Loss over the tokens that count: (sum, number of tokens, what to report).

    output_tensor: loss per token [b, s/cp]; loss_mask [b, s/cp]. Sums run over the context-parallel group; the sum is
    multiplied by its size, which the average of gradients over data and context ranks undoes. With
    `--calculate-per-token-loss` gradients are summed instead, and so nothing is multiplied. All ranks of the groups call.
    Raises TrainingError if the loss is NaN and `--no-check-for-nan-in-loss-and-grad` was not given.
    """
    args = get_context().args
    losses = in_full_precision(output_tensor)
    mask = loss_mask.reshape(-1).to(losses.dtype)
    total = torch.stack([torch.sum(losses.reshape(-1) * mask), mask.sum()])
    own = total[0]
    cp = parallel_state.get_context_parallel_world_size()
    if cp > 1:
        # Only the value is summed: each rank differentiates its own tokens.
        summed = total.detach().clone()
        dist.all_reduce(summed, group=parallel_state.get_context_parallel_group())
        total = summed
    check_loss(total[0], name)
    reported = total.detach().clone()
    if parallel_state.get_data_parallel_world_size() > 1:
        dist.all_reduce(reported, group=parallel_state.get_data_parallel_group())
    scale = 1 if args.calculate_per_token_loss else cp
    return own * scale, total[1].detach().to(torch.int), {name: (reported[0], reported[1])}


def in_full_precision(values: Tensor) -> Tensor:
    """Half-precision values as fp32, others as they are."""
    return values if values.dtype == torch.float64 else values.float()


def check_loss(loss: Tensor, name: str) -> None:
    """Stop at the first NaN: before it reaches the weights on a CPU, before it reaches a checkpoint elsewhere."""
    args = get_context().args
    if args.check_for_nan_in_loss_and_grad:
        error = TrainingError(
            name,
            f"is NaN on rank {args.rank} at iteration {args.curr_iteration + 1}",
            "lower --lr or resume from an earlier checkpoint; --sanity-checks names the layer, "
            "--no-check-for-nan-in-loss-and-grad goes on regardless",
        )
        device.raise_later(loss.isnan(), lambda: error)
