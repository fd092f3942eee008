"""How programs that generate text begin: arguments, process groups, a model and its weights."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from megatron.core.errors import FlagError
from megatron.core.flags import Rule
from megatron.training.checkpointing import load_checkpoint
from megatron.training.config import rules
from megatron.training.initialize import initialize_megatron, print_start_report, start_distributed
from megatron.training.setup import ModelProvider, get_model

#: What is assumed where the command line does not say otherwise.
DEFAULTS = {"tokenizer_type": "GPT2BPETokenizer", "no_load_rng": True, "no_load_optim": True}


def start(
    add_flags: Callable[[Any], Any], checked: Iterable[Rule], defaults: dict[str, Any] | None = None
) -> Namespace:
    """Parse and check the command line, start process groups, report; FlagError, before any group, for broken rules."""
    args = initialize_megatron(add_flags, DEFAULTS | (defaults or {}), skip_mpu_initialization=True).args
    rules.check(args, checked)
    start_distributed(args)
    print_start_report()
    return args


def load_model(model_provider: ModelProvider, args: Namespace) -> torch.nn.Module:
    """This rank's part of the model for evaluation, with the weights of `--load`, without which they stay random."""
    model = get_model(model_provider, wrap_with_ddp=False)
    if args.load is not None:
        args.exit_on_missing_checkpoint = True
        load_checkpoint(model, None, None)
    return model[0].eval()


def check_prompts(
    args: Namespace,
    flag: str,
    prompts: Sequence[str],
    tokenize: Callable[[str], list[int]],
    new_tokens: int,
    batch_size: int,
) -> None:
    """FlagError for prompts, given as `flag`, that cannot be tokenized, or continued so far and so many at a time."""
    try:
        longest = max(len(tokenize(prompt)) for prompt in prompts)
    except ValueError as error:
        raise FlagError(flag, f"the tokenizer refuses it: {error}", "give another prompt") from error
    length, rows = longest + new_tokens, min(batch_size, len(prompts))
    if length > args.max_position_embeddings:
        raise FlagError(
            "--max-position-embeddings",
            f"{longest} prompt tokens and {new_tokens} new ones exceed its {args.max_position_embeddings}",
            "shorten the prompt or generate fewer tokens",
        )
    if rows * length > args.max_tokens_to_oom:
        raise FlagError(
            "--max-tokens-to-oom",
            f"{rows} rows of prompt and answer would hold {rows * length} tokens, the limit is {args.max_tokens_to_oom}",
            "give fewer or shorter prompts, or raise the limit",
        )
