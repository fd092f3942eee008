"""Models of v0.9's first stack, as types only.

`megatron.training` imports this, for scripts name `megatron.legacy.model.GPTModel` after importing no more than that.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from megatron.core.errors import FlagError

if TYPE_CHECKING:
    from megatron.core.transformer.module import Float16Module

__all__ = ["BertModel", "Float16Module", "GPTModel", "T5Model"]


class _FirstGeneration:
    """A model that scripts name in annotations, and build where --use-legacy-models is given."""

    def __init__(self, *_: Any, **__: Any) -> NoReturn:
        raise FlagError(
            "--use-legacy-models",
            f"there is one model stack here, that of megatron.core, and no {type(self).__name__} of the first one",
            "drop the flag; checkpoints of the first stack load into today's models",
        )


class GPTModel(_FirstGeneration):
    """The first GPT."""


class BertModel(_FirstGeneration):
    """The first BERT."""


class T5Model(_FirstGeneration):
    """The first T5."""


def __getattr__(name: str) -> Any:
    if name != "Float16Module":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("megatron.core.transformer.module").Float16Module
