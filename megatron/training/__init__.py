"""The training shell: command line, loop, logging, checkpoints.

Names are imported when first used, so that a tool which needs one corner of the shell (the tokenizers, the corpus
preprocessing and its worker processes) starts without torch and the training loop.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import megatron.legacy.model  # noqa: F401  (as with v0.9, scripts need not import it themselves)

if TYPE_CHECKING:
    from megatron.training.global_vars import (
        get_adlr_autoresume,
        get_args,
        get_one_logger,
        get_signal_handler,
        get_tensorboard_writer,
        get_timers,
        get_tokenizer,
        get_wandb_writer,
    )
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import get_model, get_train_valid_test_num_samples, pretrain
    from megatron.training.utils import is_last_rank, print_rank_0, print_rank_last

__all__ = [
    "get_adlr_autoresume",
    "get_args",
    "get_model",
    "get_one_logger",
    "get_signal_handler",
    "get_tensorboard_writer",
    "get_timers",
    "get_tokenizer",
    "get_train_valid_test_num_samples",
    "get_wandb_writer",
    "initialize_megatron",
    "is_last_rank",
    "pretrain",
    "print_rank_0",
    "print_rank_last",
]

_HOME = {
    "initialize_megatron": "initialize",
    "get_model": "training",
    "get_train_valid_test_num_samples": "training",
    "pretrain": "training",
    "is_last_rank": "utils",
    "print_rank_0": "utils",
    "print_rank_last": "utils",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME.get(name, 'global_vars')}"), name)
    globals()[name] = value
    return value
