"""How programs that generate text begin: arguments, process groups, a model and its weights."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable
from typing import Any

import torch

from megatron.core.flags import Rule
from megatron.training.checkpointing import load_checkpoint
from megatron.training.config import rules
from megatron.training.initialize import initialize_megatron, start_distributed
from megatron.training.setup import ModelProvider, get_model

#: What is assumed where the command line does not say otherwise.
DEFAULTS = {"tokenizer_type": "GPT2BPETokenizer", "no_load_rng": True, "no_load_optim": True}


def start(
    add_flags: Callable[[Any], Any], checked: Iterable[Rule], defaults: dict[str, Any] | None = None
) -> Namespace:
    """Parse and check the command line and start the process groups; FlagError, before any group, for broken rules."""
    args = initialize_megatron(add_flags, DEFAULTS | (defaults or {}), skip_mpu_initialization=True).args
    rules.check(args, checked)
    start_distributed(args)
    return args


def load_model(model_provider: ModelProvider, args: Namespace) -> torch.nn.Module:
    """This rank's part of the model for evaluation, with the weights of `--load`, without which they stay random."""
    model = get_model(model_provider, wrap_with_ddp=False)
    if args.load is not None:
        args.exit_on_missing_checkpoint = True
        load_checkpoint(model, None, None)
    return model[0].eval()
