"""Models of v0.9's first stack, as types only."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from megatron.core.errors import FlagError
from megatron.core.transformer.module import Float16Module

__all__ = ["BertModel", "Float16Module", "GPTModel", "T5Model"]


class _FirstGeneration(torch.nn.Module):
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
