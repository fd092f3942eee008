"""What one training process knows beyond its model: a value, handed from function to function."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from megatron.core.timers import Timers
from megatron.training.dist_signal_handler import DistributedSignalHandler
from megatron.training.metrics import MetricsFile


@dataclass(frozen=True)
class TrainContext:
    """Arguments, tokenizer, timers and the places that measurements are written to.

    `tensorboard`, `wandb` and `metrics` are set on the last rank only (spec: training, section 18).
    """

    args: Namespace
    timers: Timers
    tokenizer: Any = None
    tensorboard: Any = None
    wandb: Any = None
    metrics: MetricsFile | None = None
    signal_handler: DistributedSignalHandler | None = None
