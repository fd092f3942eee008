"""`--sanity-checks`: what must hold at four points of a step, or the run stops with the rank and the parameter.

Replicas hold equal parameters before the forward pass and after the update; gradients are zero before it, and finite
after backward. No module makes a NaN on the way.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron.core.errors import TrainingError
from megatron.core.replicas import differing_parameters


def watch_outputs(args: Namespace, model: list[torch.nn.Module]) -> None:
    """From now on TrainingError, with module and rank, at the first output that holds a NaN."""
    if not args.sanity_checks:
        return
    for chunk in model:
        for name, module in chunk.named_modules():
            module.register_forward_hook(_Watch(name or type(module).__name__, args))


class _Watch:
    """Forward hook of one module. Children are called before their parents, so the first to speak is the innermost."""

    def __init__(self, name: str, args: Namespace) -> None:
        self._name, self._args = name, args

    def __call__(self, module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """output: what the module returned, a tensor of any shape or a tuple that may hold some."""
        for value in output if isinstance(output, tuple) else (output,):
            if isinstance(value, torch.Tensor) and value.is_floating_point() and bool(value.isnan().any()):
                raise TrainingError(
                    self._name,
                    f"its output holds a NaN on rank {dist.get_rank()} at iteration {self._args.curr_iteration + 1}, "
                    f"the first of this pass{self._blame(module)}",
                    "lower --lr, look at the sample, or resume from an earlier checkpoint",
                )

    def _blame(self, module: torch.nn.Module) -> str:
        bad = [name for name, param in module.named_parameters() if not torch.isfinite(param).all()]
        return f"; its {', '.join(bad[:3])} is not finite" if bad else "; its parameters are finite"


def before_forward(args: Namespace, model: list[torch.nn.Module]) -> None:
    """Replicas are equal and gradients zero; all ranks must call."""
    if not args.sanity_checks:
        return
    if not args.overlap_param_gather:
        replicas_equal(model)
    for name, param in _trainable(model):
        if param.main_grad.count_nonzero().item():
            raise TrainingError(
                name,
                f"its gradient on rank {dist.get_rank()} is not zero before the forward pass",
                "report this bug",
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
