"""The work of one worker: a chunk of input to the tokens, lengths and document sizes of every key."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy

from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer
from megatron.training.preprocessing.documents import BadDocument, Texts, read_documents
from megatron.training.preprocessing.inputs import Chunk
from megatron.training.preprocessing.sentences import SentenceSplitter, build_splitter
from megatron.training.tokenizer import build_tokenizer
from megatron.training.tokenizer.null import _NullTokenizer


@dataclass
class Encoded:
    """Documents of one key: tokens [t], lengths of their sequences [n], number of sequences of each [d]."""

    tokens: numpy.ndarray
    lengths: numpy.ndarray
    sequences: numpy.ndarray

    def select(self, chosen: numpy.ndarray) -> Encoded:
        """The documents where `chosen` [d] is true."""
        sequences = numpy.repeat(chosen, self.sequences)
        tokens = numpy.repeat(sequences, self.lengths)
        return Encoded(self.tokens[tokens], self.lengths[sequences], self.sequences[chosen])


@dataclass
class EncodedChunk:
    """What a worker sends back; the documents are those of the lines not in `bad`."""

    keys: list[Encoded]
    lines: int
    characters: int
    bad: list[tuple[int, str]]


@dataclass(frozen=True)
class EncoderSettings:
    """All that decides how a text becomes tokens. `tokenizer` is the namespace `build_tokenizer` reads."""

    tokenizer: argparse.Namespace
    keys: list[str]
    dtype: numpy.dtype
    append_eod: bool = False
    stop_at_bad: bool = True
    splitter: tuple[str, str, bool] | None = None


class Encoder:
    """Turns chunks into tokens. Built once per process."""

    def __init__(self, settings: EncoderSettings, tokenizer: MegatronTokenizer | None = None) -> None:
        self.settings = settings
        self.tokenizer = build_tokenizer(settings.tokenizer) if tokenizer is None else tokenizer
        self._encode_text = getattr(self.tokenizer, "encode_document", self._encode_by_list)
        self._ids_may_exceed_vocabulary = isinstance(self.tokenizer, _NullTokenizer)
        self._splitter: SentenceSplitter | None = None
        if settings.splitter is not None:
            self._splitter = build_splitter(*settings.splitter)
        self._eod = numpy.array([self.tokenizer.eod]) if settings.append_eod else None

    def encode(self, chunk: Chunk) -> EncodedChunk:
        """Encode a chunk; with `stop_at_bad`, no further than its first bad line."""
        parts: list[list[numpy.ndarray]] = [[] for _ in self.settings.keys]
        lengths: list[list[int]] = [[] for _ in self.settings.keys]
        sequences: list[list[int]] = [[] for _ in self.settings.keys]
        result = EncodedChunk([], 0, 0, [])
        for number, line in enumerate(read_documents(chunk, self.settings.keys)):
            result.lines += 1
            result.characters += line.characters
            try:
                if isinstance(line.texts, BadDocument):
                    raise line.texts
                document = [self._document(texts) for texts in line.texts]
            except BadDocument as reason:
                result.bad.append((number, str(reason)))
                if self.settings.stop_at_bad:
                    break
                continue
            for key, arrays in enumerate(document):
                parts[key] += arrays
                lengths[key] += map(len, arrays)
                sequences[key].append(len(arrays))
                if arrays and self._eod is not None:
                    parts[key].append(self._eod)
                    lengths[key][-1] += 1
        result.keys = [
            Encoded(self._join(part), numpy.array(length, numpy.int32), numpy.array(count, numpy.int32))
            for part, length, count in zip(parts, lengths, sequences)
        ]
        return result

    def _document(self, texts: Texts) -> list[numpy.ndarray]:
        """The ids of each sentence of one document that has any."""
        if self._splitter is not None:
            if not isinstance(texts, str):
                raise BadDocument(
                    "the text is a list already; drop --split-sentences to take its items as sentences"
                )
            sentences = self._splitter(texts)
        else:
            sentences = [texts] if isinstance(texts, str) else texts
        try:
            arrays = [self._encode_text(sentence) for sentence in sentences]
        except UnicodeEncodeError as error:
            raise BadDocument(
                f"the text holds a lone surrogate, {error.object[error.start]!r}, which is no character; remove it"
            ) from error
        except (ValueError, OverflowError) as error:
            raise BadDocument(f"the tokenizer refuses the text: {error}") from error
        kept = [array for array in arrays if len(array)]
        if self._ids_may_exceed_vocabulary:
            for array in kept:
                self._check_range(array)
        return kept

    def _encode_by_list(self, text: str) -> numpy.ndarray:
        return numpy.array(self.tokenizer.tokenize(text), dtype=numpy.int64)

    def _check_range(self, ids: numpy.ndarray) -> None:
        limits = numpy.iinfo(self.settings.dtype)
        if ids.min() < limits.min or ids.max() > limits.max:
            raise BadDocument(
                f"token ids {ids.min()} to {ids.max()} do not fit the {self.settings.dtype} tokens of a vocabulary of "
                f"{self.tokenizer.vocab_size}; raise --vocab-size or correct the text"
            )

    def _join(self, parts: list[numpy.ndarray]) -> numpy.ndarray:
        if not parts:
            return numpy.empty(0, self.settings.dtype)
        return numpy.concatenate(parts, dtype=self.settings.dtype, casting="unsafe")
