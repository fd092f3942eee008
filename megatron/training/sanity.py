"""`--sanity-checks`: what must hold at four points of a step, or the run stops with the rank and the parameter.

Replicas hold equal parameters before the forward pass and after the update; gradients are zero before it, and finite
after backward.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator

import torch
import torch.distributed as dist

from megatron.core.errors import TrainingError
from megatron.core.replicas import differing_parameters


def before_forward(args: Namespace, model: list[torch.nn.Module]) -> None:
    """Replicas are equal and gradients zero; all ranks must call."""
    if not args.sanity_checks:
        return
    if not args.overlap_param_gather:
        replicas_equal(model)
    for name, param in _trainable(model):
        if param.main_grad.count_nonzero().item():
            raise TrainingError(
                name, f"its gradient on rank {dist.get_rank()} is not zero before the forward pass", "report this bug"
            )


def after_backward(args: Namespace, model: list[torch.nn.Module]) -> None:
    """Every gradient is finite, unless a loss scaler will see to it."""
    if not args.sanity_checks or args.fp16:
        return
    for name, param in _trainable(model):
        if not torch.isfinite(param.main_grad).all():
            raise TrainingError(
                name,
                f"its gradient on rank {dist.get_rank()} is not finite at iteration {args.curr_iteration + 1}",
                "lower --lr, or resume from a checkpoint before it",
            )


def after_update(args: Namespace, model: list[torch.nn.Module]) -> None:
    """Replicas are equal again; with `--overlap-param-gather` that is known only in the next forward. All ranks call."""
    if args.sanity_checks and not args.overlap_param_gather:
        replicas_equal(model)


def replicas_equal(model: list[torch.nn.Module]) -> None:
    """TrainingError, with the first parameter and the ranks that differ, if data-parallel replicas have parted."""
    for name, ranks in differing_parameters(model):
        raise TrainingError(
            name,
            f"rank(s) {', '.join(map(str, ranks))} hold other values than the first replica",
            "resume from the last checkpoint; a rank that drifts again has faulty memory or software",
        )


def _trainable(model: list[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    for chunk in model:
        yield from ((name, param) for name, param in chunk.named_parameters() if param.requires_grad)
