"""What a dataset needs of a tokenizer: ids of special tokens and an identity for cache keys."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import OrderedDict
from typing import Any

import numpy


class MegatronTokenizer(ABC):
    """Base of all tokenizers.

    `tokenizer_paths` and `tokenizer_options` identify the tokenizer. They become part of every dataset cache
    key, in the order given, so a subclass must keep both stable.
    """

    def __init__(self, *tokenizer_paths: str | None, **tokenizer_options: Any) -> None:
        self.unique_identifiers: OrderedDict[str, Any] = OrderedDict()
        self.unique_identifiers["class"] = type(self).__name__
        self.unique_identifiers["tokenizer_path"] = list(tokenizer_paths)
        for option, value in tokenizer_options.items():
            self.unique_identifiers[option] = str(value)
        self.unique_description = json.dumps(self.unique_identifiers, indent=4)

    @abstractmethod
    def tokenize(self, text: str) -> Any:
        """Text to a list (or array) of token ids."""

    def detokenize(self, ids: numpy.ndarray) -> str:
        """Token ids to text."""
        raise self._without("detokenize")

    def offsets(self, ids: list[int], text: str) -> list[int]:
        """Position in `text`, in characters, at which each token starts."""
        raise self._without("offsets")

    @property
    @abstractmethod
    def vocab(self) -> dict[Any, int]:
        """Token to id."""

    @property
    @abstractmethod
    def inv_vocab(self) -> dict[int, Any]:
        """Id to token, in order of ids."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, added special tokens included, padding for tensor parallelism not."""

    @property
    def cls(self) -> int:
        raise self._without("cls")

    @property
    def sep(self) -> int:
        raise self._without("sep")

    @property
    def pad(self) -> int:
        raise self._without("pad")

    @property
    def eod(self) -> int:
        raise self._without("eod")

    @property
    def bos(self) -> int:
        raise self._without("bos")

    @property
    def eos(self) -> int:
        raise self._without("eos")

    @property
    def mask(self) -> int:
        raise self._without("mask")

    def _without(self, name: str) -> NotImplementedError:
        """The documented answer of a tokenizer that lacks a special token; callers test for this type."""
        return NotImplementedError(f"{type(self).__name__} has no attribute {name!r}")
