"""The tokenizer for data that already consists of ids, written as numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy

from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer


class _NullTokenizer(MegatronTokenizer):
    """`--tokenizer-type NullTokenizer`: ids separated by single spaces; the id after the last ends a document."""

    def __init__(self, vocab_size: int | str) -> None:
        super().__init__(None, vocab_size=vocab_size)
        self._vocab_size_without_eod = int(vocab_size)
        self._eod_id = self._vocab_size_without_eod

    def tokenize(self, text: str) -> list[int]:
        try:
            return [int(number) for number in text.split(" ")]
        except ValueError as error:
            raise ValueError(
                f"{text[:40]!r} is not a list of ids with single spaces between them, all that NullTokenizer reads"
            ) from error

    def detokenize(self, ids: Sequence[int] | numpy.ndarray) -> str:
        return " ".join(str(int(token_id)) for token_id in ids)

    def offsets(self, ids: Sequence[int], text: str) -> list[int]:
        """Position at which each number starts."""
        starts: list[int] = []
        position = 0
        for token_id in ids:
            starts.append(position)
            position += len(str(int(token_id))) + 1
        return starts

    @property
    def vocab_size(self) -> int:
        return self._vocab_size_without_eod + 1

    @property
    def vocab(self) -> dict[str, int]:
        raise self._without("vocab")

    @property
    def inv_vocab(self) -> dict[int, str]:
        raise self._without("inv_vocab")

    @property
    def cls(self) -> int:
        return -1

    @property
    def sep(self) -> int:
        return -1

    @property
    def mask(self) -> int:
        return -1

    @property
    def eod(self) -> int:
        return self._eod_id

    @property
    def additional_special_tokens_ids(self) -> list[int] | None:
        return None
