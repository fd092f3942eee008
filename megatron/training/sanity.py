"""`--sanity-checks`: what must hold at four points of a step, or the run stops with the rank and the parameter.

Replicas hold equal parameters before the forward pass and after the update; gradients are zero before it and present and
finite after backward.
"""

from __future__ import annotations

from argparse import Namespace

import torch

from megatron.core.distributed import checks
from megatron.core.errors import TrainingError


def before_forward(args: Namespace, model: list[torch.nn.Module]) -> None:
    """Replicas are equal and gradients zero; all ranks must call."""
    if args.sanity_checks:
        checks.replicas_equal(model)
        for name, param in _trainable(model):
            if param.main_grad.count_nonzero().item():
                raise TrainingError(
                    name, "its gradient is not zero before the forward pass", "report this: it is a bug"
                )


def after_backward(args: Namespace, model: list[torch.nn.Module]) -> None:
    """Every gradient is finite; all ranks must call."""
    if args.sanity_checks:
        checks.gradients_finite(model)


def after_update(args: Namespace, model: list[torch.nn.Module]) -> None:
    """Replicas are equal again, once gathered; all ranks must call."""
    if args.sanity_checks and not args.overlap_param_gather:
        checks.replicas_equal(model)


def _trainable(model: list[torch.nn.Module]) -> list[tuple[str, torch.nn.Parameter]]:
    return [(n, p) for chunk in model for n, p in chunk.named_parameters() if p.requires_grad]
