"""Losses a router adds to the model's: their formulas, how they join the backward pass, and their logging."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import parallel_state
from megatron.core.process_groups_config import group_size


def switch_load_balancing_loss_func(
    probs: Tensor,
    tokens_per_expert: Tensor,
    topk: int,
    moe_aux_loss_coeff: float,
    sequence_partition_group: ProcessGroup | None = None,
) -> Tensor:
    """E * coeff / (T^2 k) * sum over experts of (probability mass x assignments) (Switch, arXiv:2101.03961,
    eq. 4-6).

    probs [t, e] over all experts, tokens_per_expert [e] before dropping. The sequence of T tokens may be
    divided over a group: both its factors then count the whole sequence, and all ranks must call.
    """
    tokens = probs.shape[0] * group_size(sequence_partition_group)
    counts = tokens_per_expert
    if group_size(sequence_partition_group) > 1:
        counts = counts.clone()
        dist.all_reduce(counts, group=sequence_partition_group)
    mass = probs.sum(dim=0)
    experts = probs.shape[1]
    return torch.sum(mass * counts) * (experts * moe_aux_loss_coeff / (tokens * tokens * topk))


def z_loss_func(logits: Tensor, z_loss_coeff: float) -> Tensor:
    """coeff * mean over tokens of logsumexp(logits [t, e])^2 (ST-MoE, arXiv:2202.08906)."""
    return torch.mean(torch.square(torch.logsumexp(logits, dim=-1))) * z_loss_coeff


class MoEAuxLossAutoScaler(torch.autograd.Function):
    """The identity, which sends a gradient of the main loss's scale into a side loss."""

    main_loss_backward_scale: Tensor = torch.tensor(1.0)

    @staticmethod
    def forward(ctx: Any, output: Tensor, aux_loss: Tensor) -> Tensor:
        """output of any shape -> itself; the side loss is remembered."""
        ctx.save_for_backward(aux_loss)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """The output's gradient unchanged, and the scale for the side loss."""
        (aux_loss,) = ctx.saved_tensors
        scale = MoEAuxLossAutoScaler.main_loss_backward_scale.to(aux_loss.device)
        return grads[0], torch.ones_like(aux_loss) * scale

    @staticmethod
    def set_loss_scale(scale: Tensor) -> None:
        """Set the factor: loss scale / number of microbatches; the schedule calls it before each backward."""
        MoEAuxLossAutoScaler.main_loss_backward_scale = scale


def save_to_aux_losses_tracker(
    name: str,
    loss: Tensor,
    layer_number: int | None,
    num_layers: int,
    reduce_group: ProcessGroup | None = None,
    avg_group: ProcessGroup | None = None,
) -> None:
    """Add a layer's side loss (without its coefficient) to the table that is logged; layer_number counts
    from 1.
    """
    if layer_number is None:
        return
    tracker = parallel_state.get_moe_layer_wise_logging_tracker()
    if name not in tracker:
        tracker[name] = {"values": torch.zeros(num_layers, device=loss.device)}
    entry: dict[str, Any] = tracker[name]
    entry["values"][layer_number - 1] += loss.detach()
    entry["reduce_group"], entry["avg_group"] = reduce_group, avg_group


def clear_aux_losses_tracker() -> None:
    """Zero the table."""
    for entry in parallel_state.get_moe_layer_wise_logging_tracker().values():
        entry["values"].zero_()
        entry["reduce_group"] = entry["avg_group"] = None  # type: ignore[assignment]


def reduce_aux_losses_tracker_across_ranks() -> None:
    """Sum the table over pipeline stages, then over its group or as a mean. All ranks must call."""
    if not dist.is_initialized():
        return
    pipeline = parallel_state.resolve(None).pp
    for entry in parallel_state.get_moe_layer_wise_logging_tracker().values():
        values = entry["values"]
        if group_size(pipeline) > 1:
            dist.all_reduce(values, group=pipeline)
        if entry.get("reduce_group") is not None:
            dist.all_reduce(values, group=entry["reduce_group"])
        if entry.get("avg_group") is not None:
            dist.all_reduce(values, group=entry["avg_group"])
            values /= group_size(entry["avg_group"])  # type: ignore[arg-type]


def track_moe_metrics(
    loss_scale: float,
    iteration: int,
    writer: Any,
    wandb_writer: Any = None,
    total_loss_dict: dict[str, Tensor] | None = None,
    per_layer_logging: bool = False,
) -> None:
    """Reduce the table, add each loss's mean over layers times `loss_scale` (1 / microbatches) to
    `total_loss_dict`, write it to the writers, and clear the table. All ranks must call.
    """
    reduce_aux_losses_tracker_across_ranks()
    tracker = parallel_state.get_moe_layer_wise_logging_tracker()
    for name in sorted(tracker, reverse=True):  # z_loss before load_balancing_loss
        values = tracker[name]["values"].float() * loss_scale
        mean = values.sum() / values.numel()
        if total_loss_dict is not None:
            total_loss_dict[name] = total_loss_dict.get(name, torch.zeros_like(mean)) + mean
        scalars = {name: mean}
        if per_layer_logging:
            scalars |= {f"moe/{name}_layer_{i}": value for i, value in enumerate(values)}
        for tag, value in scalars.items():
            if writer is not None:
                writer.add_scalar(tag, value, iteration)
            if wandb_writer is not None:
                wandb_writer.log({tag: value}, iteration)
    clear_aux_losses_tracker()
