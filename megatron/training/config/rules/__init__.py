"""Claims about several flags at once that no single configuration owns.

Rules about one configuration live beside it, in core; these relate flags of different owners. Importing the package
fills the lists `GIVEN`, `DERIVED` and `TRAINING`, `ONE_STACK` with what depends on the kind of model, `FROM_FILES` with
what all entry scripts of this project check, and `GPT`, `HYBRID`, `BERT` and `T5` with what only some do.
"""

from megatron.training.config.rules import causal_models, layout, loop, machine, masked_models, model, run
from megatron.training.config.rules.base import (
    DERIVED,
    FROM_FILES,
    GIVEN,
    ONE_STACK,
    TRAINING,
    UNREAD,
    check,
    check_supported,
    ignored_flags,
    unread_by,
    unread_flags,
)
from megatron.training.config.rules.causal_models import GPT, HYBRID
from megatron.training.config.rules.masked_models import BERT, T5

__all__ = [
    "BERT", "DERIVED", "FROM_FILES", "GIVEN", "GPT", "HYBRID", "ONE_STACK", "T5", "TRAINING", "UNREAD", "causal_models",
    "check", "check_supported", "ignored_flags", "layout", "loop", "machine", "masked_models", "model", "run", "unread_by",
    "unread_flags",
]  # fmt: skip
