"""The GPT-2 tokenizer: `vocab.json` and `merges.txt` to ids and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy

from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer
from megatron.core.errors import DataError
from megatron.training.tokenizer.bpe import (
    PRETOKEN_PATTERN,
    build_engine,
    bytes_to_unicode,
    load_merges,
    merge_word,
)

END_OF_TEXT = "<|endoftext|>"


class GPT2Tokenizer:
    """Byte-level BPE over a vocabulary file and a merge file.

    Special tokens in text are ordinary characters. A piece that the vocabulary lacks has id 0.
    """

    def __init__(
        self, vocab_file: str, merges_file: str, errors: str = "replace", engine: str = "auto"
    ) -> None:
        with open(vocab_file, encoding="utf-8") as file:
            self.encoder: dict[str, int] = json.load(file)
        self.decoder = {token_id: token for token, token_id in self.encoder.items()}
        self.errors = errors
        self.bpe_ranks = load_merges(merges_file)
        self.byte_encoder = bytes_to_unicode()
        self.byte_decoder = {character: byte for byte, character in self.byte_encoder.items()}
        self.engine, self.engine_report = build_engine(engine, self.encoder, self.bpe_ranks)

    def __len__(self) -> int:
        return len(self.encoder)

    def bpe(self, token: str) -> str:
        """The pieces of one mapped word, separated by spaces."""
        return " ".join(merge_word(token, self.bpe_ranks))

    def tokenize(self, text: str) -> list[str]:
        """Text to pieces, written with the stand-in characters of `bytes_to_unicode`."""
        import regex

        mapped = (
            "".join(map(self.byte_encoder.__getitem__, word.encode("utf-8")))
            for word in regex.findall(PRETOKEN_PATTERN, text)
        )
        return [piece for word in mapped for piece in merge_word(word, self.bpe_ranks)]

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> int | list[int]:
        """Pieces to ids; a single string is one piece."""
        if isinstance(tokens, str):
            return self.encoder.get(tokens, 0)
        return [self.encoder.get(token, 0) for token in tokens]

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]:
        """Ids to pieces."""
        return [self.decoder[token_id] for token_id in ids]

    def encode(self, text: str) -> list[int]:
        """Text to ids."""
        return self.engine.encode(text).tolist()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one id stands for; characters outside the byte alphabet (added tokens) count as UTF-8."""
        token = self.decoder.get(token_id)
        if token is None:
            raise ValueError(
                f"{token_id} is not an id of this vocabulary, which has {len(self.decoder)} tokens"
            )
        if all(character in self.byte_decoder for character in token):
            return bytes(self.byte_decoder[character] for character in token)
        return token.encode("utf-8")

    def decode(self, tokens: Iterable[int]) -> str:
        """Ids to text; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.token_bytes(int(token)) for token in tokens).decode("utf-8", errors=self.errors)


class _GPT2BPETokenizer(MegatronTokenizer):
    """`--tokenizer-type GPT2BPETokenizer`; `<|endoftext|>` ends a document."""

    def __init__(self, vocab_file: str, merge_file: str, engine: str = "auto") -> None:
        super().__init__(vocab_file, merge_file)
        self.tokenizer = GPT2Tokenizer(vocab_file, merge_file, engine=engine)
        if END_OF_TEXT not in self.tokenizer.encoder:
            raise DataError(
                vocab_file,
                f"the vocabulary has no {END_OF_TEXT}, which this tokenizer puts at the end of documents",
                f'add "{END_OF_TEXT}" with the next free id',
            )
        self.eod_id = self.tokenizer.encoder[END_OF_TEXT]

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer.encoder)

    @property
    def vocab(self) -> dict[str, int]:
        return self.tokenizer.encoder

    @property
    def inv_vocab(self) -> dict[int, str]:
        return self.tokenizer.decoder

    @property
    def engine_report(self) -> str:
        """Which BPE engine encodes, and why."""
        return self.tokenizer.engine_report

    def tokenize(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def encode_document(self, text: str) -> numpy.ndarray:
        """Ids [t] of a text, as an array."""
        return self.tokenizer.engine.encode(text)

    def detokenize(self, ids: Sequence[int] | numpy.ndarray) -> str:
        return self.tokenizer.decode(ids)

    def offsets(self, ids: Sequence[int], text: str) -> list[int]:
        """Index of the character that holds the first byte of each token."""
        character_of_byte = numpy.repeat(
            numpy.arange(len(text)), [len(character.encode("utf-8")) for character in text]
        )
        sizes = numpy.array(
            [len(self.tokenizer.token_bytes(token_id)) for token_id in ids], dtype=numpy.int64
        )
        starts: Any = numpy.cumsum(sizes) - sizes
        return character_of_byte[starts].tolist()

    @property
    def eod(self) -> int:
        return self.eod_id
