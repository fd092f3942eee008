"""Flags about evaluation during and after training."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.flags import flag


@dataclass
class ValidationConfig:
    """When the model is evaluated, and on how much."""

    # fmt: off
    eval_iters: int = flag(100, group="validation", help="Batches per evaluation; 0 switches evaluation off.")
    eval_interval: int = flag(
        1000, group="validation", unless="--eval-iters 0", help="Steps between evaluations.")
    skip_train: bool = flag(False, group="validation", help="Load, evaluate and end.")
    # fmt: on
