"""The tokenizers that read a SentencePiece model (Kudo & Richardson 2018)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

import numpy

from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer
from megatron.core.errors import DataError


class _SentencePieceTokenizer(MegatronTokenizer):
    """`--tokenizer-type SentencePieceTokenizer`: the model's pieces and the special tokens that BERT, T5 and GPT use.

    A special token written out in a text is that special token.
    """

    def __init__(self, model_file: str, vocab_extra_ids: int = 0) -> None:
        super().__init__(model_file, vocab_extra_ids=vocab_extra_ids)
        self._load(model_file)
        self._initialize(vocab_extra_ids)

    def _load(self, model_file: str) -> None:
        import sentencepiece

        if not os.path.isfile(model_file):
            raise DataError(
                model_file, "there is no such file", "give --tokenizer-model a SentencePiece model"
            )
        try:
            self.tokenizer = sentencepiece.SentencePieceProcessor(model_file=model_file)
        except RuntimeError as error:
            raise DataError(model_file, f"this is no SentencePiece model ({error})") from error

    def _initialize(self, vocab_extra_ids: int) -> None:
        """Read the pieces, then register the special tokens in the order that fixes their ids."""
        model = self.tokenizer
        self._vocab: dict[str, int] = {}
        self._inv_vocab: dict[int, str] = {}
        self._special_tokens: dict[str, int] = {}
        for token_id in range(len(model)):
            piece = model.id_to_piece(token_id)
            self._inv_vocab[token_id] = piece
            self._vocab[piece] = token_id
        self._cls_id = self._register("<CLS>")
        self._sep_id = self._register("<SEP>")
        self._eod_id = self._register("<EOD>")
        self._mask_id = self._register("<MASK>")
        self._pad_id = self._register(self._model_piece(model.pad_id(), "<PAD>"))
        self._bos_id = self._register(self._model_piece(model.bos_id(), "<BOS>"))
        self._eos_id = self._register(self._model_piece(model.eos_id(), "<EOS>"))
        self._extra_id_tokens = [f"<extra_id_{i}>" for i in range(vocab_extra_ids)]
        for token in self._extra_id_tokens:
            self._register(token)
        self._inv_special_tokens = {token_id: token for token, token_id in self._special_tokens.items()}
        self._find_special = re.compile("|".join(map(re.escape, self._special_tokens)))

    def _model_piece(self, token_id: int, name_if_none: str) -> str:
        return name_if_none if token_id < 0 else self.tokenizer.id_to_piece(token_id)

    def _register(self, token: str) -> int:
        if token not in self._vocab:
            next_id = len(self._vocab)
            self._vocab[token], self._inv_vocab[next_id] = next_id, token
        self._special_tokens[token] = self._vocab[token]
        return self._vocab[token]

    @property
    def vocab_size(self) -> int:
        return len(self._vocab)

    @property
    def vocab(self) -> dict[str, int]:
        return self._vocab

    @property
    def inv_vocab(self) -> dict[int, str]:
        return self._inv_vocab

    @property
    def decoder(self) -> dict[int, str]:
        return self._inv_vocab

    @property
    def encoder(self) -> dict[str, int]:
        return self._vocab

    def tokenize(self, text: str) -> list[int]:
        ids: list[int] = []
        start = 0
        for match in self._find_special.finditer(text):
            ids += self.tokenizer.encode_as_ids(text[start : match.start()])
            ids.append(self._special_tokens[match.group()])
            start = match.end()
        return ids + self.tokenizer.encode_as_ids(text[start:] if start else text)

    def encode_document(self, text: str) -> numpy.ndarray:
        """Ids [t] of a text, as an array."""
        return numpy.array(self.tokenize(text), dtype=numpy.int32)

    def detokenize(self, ids: Sequence[int] | numpy.ndarray) -> str:
        text = ""
        plain: list[int] = []
        for token_id in map(int, ids):
            if token_id in self._inv_special_tokens:
                text += self.tokenizer.decode_ids(plain) + " " + self._inv_special_tokens[token_id] + " "
                plain = []
            else:
                plain.append(token_id)
        return text + self.tokenizer.decode_ids(plain)

    def offsets(self, ids: Sequence[int], text: str) -> list[int]:
        """Position in `text` at which the surface of each token starts."""
        starts: list[int] = []
        start = 0
        for match in self._find_special.finditer(text):
            starts += self._surface_starts(text[start : match.start()], start)
            starts.append(match.start())
            start = match.end()
        return (starts + self._surface_starts(text[start:], start))[: len(ids)]

    def _surface_starts(self, text: str, base: int) -> list[int]:
        """Where the pieces of `text` start in it, plus `base`; the engine counts in bytes."""
        widths = [len(character.encode("utf-8")) for character in text]
        character_of_byte = numpy.repeat(numpy.arange(len(text)), widths).tolist() + [len(text)]
        return [
            base + character_of_byte[piece.begin] for piece in self.tokenizer.encode_as_proto(text).pieces
        ]

    @property
    def cls(self) -> int:
        return self._cls_id

    @property
    def sep(self) -> int:
        return self._sep_id

    @property
    def pad(self) -> int:
        return self._pad_id

    @property
    def bos(self) -> int:
        return self._bos_id

    @property
    def eod(self) -> int:
        return self._eod_id

    @property
    def eos(self) -> int:
        return self._eos_id

    @property
    def mask(self) -> int:
        return self._mask_id

    @property
    def additional_special_tokens_ids(self) -> list[int] | None:
        return [self._vocab[token] for token in self._extra_id_tokens]


class _GPTSentencePieceTokenizer(_SentencePieceTokenizer):
    """`--tokenizer-type GPTSentencePieceTokenizer`: the model as it is; a document ends with the model's eos."""

    def __init__(self, model_file: str) -> None:
        super().__init__(model_file, vocab_extra_ids=0)

    def _initialize(self, vocab_extra_ids: int) -> None:
        model = self.tokenizer
        self._vocab = {model.id_to_piece(token_id): token_id for token_id in range(len(model))}
        self._inv_vocab = {token_id: model.id_to_piece(token_id) for token_id in range(len(model))}
        self._pad_id, self._bos_id, self._eos_id = model.pad_id(), model.bos_id(), model.eos_id()

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer)

    def tokenize(self, text: str) -> list[int]:
        return self.tokenizer.encode_as_ids(text)

    def detokenize(self, ids: Sequence[int] | numpy.ndarray) -> str:
        return self.tokenizer.decode_ids([int(token_id) for token_id in ids])

    def offsets(self, ids: Sequence[int], text: str) -> list[int]:
        """Position in `text` at which the surface of each token starts."""
        return self._surface_starts(text, 0)[: len(ids)]

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
        return self._eos_id

    @property
    def additional_special_tokens_ids(self) -> list[int] | None:
        return None


class _Llama2Tokenizer(_SentencePieceTokenizer):
    """`--tokenizer-type Llama2Tokenizer`: the model as it is, with its bos before every text.

    Data files rely on that bos: each tokenized text, and each sentence of a split document, starts with one.
    """

    def __init__(self, model_file: str) -> None:
        super().__init__(model_file, vocab_extra_ids=0)

    def _initialize(self, vocab_extra_ids: int) -> None:
        model = self.tokenizer
        self.n_words = model.vocab_size()
        self.bos_id, self.eos_id, self.pad_id = model.bos_id(), model.eos_id(), model.pad_id()
        self._vocab = {model.id_to_piece(token_id): token_id for token_id in range(len(model))}
        self._inv_vocab = {token_id: model.id_to_piece(token_id) for token_id in range(len(model))}

    @property
    def vocab_size(self) -> int:
        return self.n_words

    def tokenize(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        if not isinstance(text, str):
            raise ValueError(f"Llama2Tokenizer tokenizes one string at a time, not {type(text).__name__}")
        return [self.bos_id] * bos + self.tokenizer.encode(text) + [self.eos_id] * eos

    def detokenize(self, ids: Sequence[int] | numpy.ndarray) -> str:
        return self.tokenizer.decode_ids([int(token_id) for token_id in ids])

    def offsets(self, ids: Sequence[int], text: str) -> list[int]:
        """Position in `text` at which the surface of each token starts; bos stands at 0."""
        return ([0] + self._surface_starts(text, 0) + [len(text)])[: len(ids)]

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
    def pad(self) -> int:
        return self._use_attribute("pad")

    @property
    def bos(self) -> int:
        return self._use_attribute("bos")

    @property
    def eos(self) -> int:
        return self._use_attribute("eos")

    def _use_attribute(self, name: str) -> int:
        raise AttributeError(f"_Llama2Tokenizer has no property {name!r}; its id is the attribute {name}_id")

    @property
    def eod(self) -> int:
        return self.eos_id

    @property
    def additional_special_tokens_ids(self) -> list[int] | None:
        return None
