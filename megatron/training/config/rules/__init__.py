"""Claims about several flags at once that no single configuration owns.

Rules about one configuration live beside it, in core; these relate flags of different owners. Importing the package
fills the lists `GIVEN`, `DERIVED` and `TRAINING`.
"""

from megatron.training.config.rules import layout, loop, machine, model, run
from megatron.training.config.rules.base import (
    DERIVED,
    GIVEN,
    TRAINING,
    check,
    check_supported,
    ignored_flags,
)

__all__ = [
    "DERIVED", "GIVEN", "TRAINING", "check", "check_supported", "ignored_flags",
    "layout", "loop", "machine", "model", "run",
]  # fmt: skip
