"""Which parameters decay, whose learning rate is scaled, which belong to experts: the optimizer's parameter groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

ParamCondition = Callable[[str, torch.nn.Parameter], bool]


class GroupKey(NamedTuple):
    """What makes two parameters share a group, under the names by which it is stored in the group itself."""

    wd_mult: float
    lr_mult: float
    is_expert_parallel: bool
    is_decoupled_lr: bool


def group_key(group: dict[str, Any]) -> GroupKey:
    """The identity of a parameter group, also of one read from a checkpoint (older ones lack the last fields)."""
    return GroupKey(
        group.get("wd_mult", 1.0),
        group.get("lr_mult", 1.0),
        group.get("is_expert_parallel", False),
        group.get("is_decoupled_lr", False),
    )


def default_no_weight_decay(name: str, param: torch.nn.Parameter) -> bool:
    """Biases and vectors (norm weights) do not decay; embeddings do."""
    return name.endswith(".bias") or param.dim() == 1


def get_param_groups(
    model_chunks: Iterable[torch.nn.Module],
    *,
    no_weight_decay_cond: ParamCondition | None,
    scale_lr_cond: ParamCondition | None,
    lr_mult: float,
    lr: float | None,
    min_lr: float | None,
    decoupled_lr: float | None = None,
    decoupled_min_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Sort the trainable parameters of all chunks into groups, in order of first appearance.

    Expert parameters are those marked `allreduce=False`; with `decoupled_lr`, parameters marked
    `is_embedding_or_output_parameter` have their own peak and smallest rate. `lr_mult` applies where `scale_lr_cond`
    says so. Checkpoints number parameters group after group in exactly this order.
    """
    no_weight_decay = no_weight_decay_cond or default_no_weight_decay
    params_of: dict[GroupKey, list[torch.nn.Parameter]] = {}
    for chunk in model_chunks:
        for name, param in chunk.named_parameters():
            if not param.requires_grad:
                continue
            key = GroupKey(
                wd_mult=0.0 if no_weight_decay(name, param) else 1.0,
                lr_mult=lr_mult if scale_lr_cond is not None and scale_lr_cond(name, param) else 1.0,
                is_expert_parallel=not getattr(param, "allreduce", True),
                is_decoupled_lr=decoupled_lr is not None
                and getattr(param, "is_embedding_or_output_parameter", False),
            )
            params_of.setdefault(key, []).append(param)
    plain = {"max_lr": lr, "min_lr": min_lr}
    decoupled = {"max_lr": decoupled_lr, "min_lr": min_lr if decoupled_min_lr is None else decoupled_min_lr}
    return [
        {"params": params, **key._asdict(), **(decoupled if key.is_decoupled_lr else plain)}
        for key, params in params_of.items()
    ]
