"""WordPiece with BERT's basic tokenization (Devlin et al. 2019), cased and lower-cased."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

import numpy

from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer
from megatron.core.errors import DataError
from megatron.training.tokenizer.memo import WordMemo, packed
from megatron.training.tokenizer.word_table import AsciiWordTable

UNKNOWN = "[UNK]"
MAX_WORD_LENGTH = 200
TABLE_FROM_CHARACTERS = (
    2000  # below, setting up the table's arrays takes longer than looking words up one by one
)
ASCII_PUNCTUATION = r"!-/:-@\[-`{-~"  # as part of a character class
CJK_RANGES = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip
TIDY = tuple((" " + mark, mark) for mark in ".?!,") + (
    (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip

Spelled = list[tuple[str, int]]  # characters with the position in the source text that each comes from


def load_vocab(vocab_file: str) -> dict[str, int]:
    """Token -> line number of a vocabulary file; of a repeated token the later line counts."""
    with open(vocab_file, encoding="utf-8") as file:
        return {line.strip(): number for number, line in enumerate(file)}


def whitespace_tokenize(text: str) -> list[str]:
    """The words between runs of whitespace."""
    return text.split()


def _is_dropped(character: str) -> bool:
    if character in "\t\n\r":
        return False
    return character in "\0\ufffd" or unicodedata.category(character) in ("Cc", "Cf")


def _is_space(character: str) -> bool:
    return character in " \t\n\r" or unicodedata.category(character) == "Zs"


def _is_cjk(character: str) -> bool:
    code = ord(character)
    return code >= 0x3400 and any(first <= code <= last for first, last in CJK_RANGES)


def _is_punctuation(character: str) -> bool:
    code = ord(character)
    if 33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96 or 123 <= code <= 126:
        return True
    return unicodedata.category(character).startswith("P")


class _Table(dict[int, str | None]):
    """A table for str.translate that is filled by a function of the character."""

    def __init__(self, replace: Callable[[str], str | None]) -> None:
        super().__init__()
        self.replace = replace

    def __missing__(self, code: int) -> str | None:
        self[code] = replacement = self.replace(chr(code))
        return replacement


def _clean(character: str) -> str | None:
    if _is_dropped(character):
        return None
    if _is_space(character):
        return " "
    return f" {character} " if _is_cjk(character) else character


def _isolate(character: str) -> str:
    return f" {character} " if _is_punctuation(character) else character


_CLEAN = _Table(_clean)
_ISOLATE = _Table(_isolate)
_ISOLATE_AND_STRIP = _Table(lambda c: None if unicodedata.category(c) == "Mn" else _isolate(c))


class BasicTokenizer:
    """Text to words: clean, isolate ideographs and punctuation, lower-case and drop accents if asked."""

    def __init__(self, do_lower_case: bool = True) -> None:
        self.do_lower_case = do_lower_case

    def tokenize(self, text: str) -> list[str]:
        """The words of `text` in order."""
        text = " ".join(text.translate(_CLEAN).split())
        if self.do_lower_case:
            text = unicodedata.normalize("NFD", text.lower())
        return text.translate(_ISOLATE_AND_STRIP if self.do_lower_case else _ISOLATE).split()

    def spelled_words(self, text: str) -> list[Spelled]:
        """The words that `tokenize` gives, each character with its source position."""
        clean: Spelled = []
        for position, character in enumerate(text):
            if _is_dropped(character):
                continue
            if _is_space(character):
                clean.append((" ", position))
            elif _is_cjk(character):
                clean += ((" ", position), (character, position), (" ", position))
            else:
                clean.append((character, position))
        words: list[Spelled] = []
        for word in _split_at_whitespace(clean):
            spaced: Spelled = []
            for character, position in self._fold(word) if self.do_lower_case else word:
                if _is_punctuation(character):
                    spaced += ((" ", position), (character, position), (" ", position))
                else:
                    spaced.append((character, position))
            words += _split_at_whitespace(spaced)
        return words

    @staticmethod
    def _fold(word: Spelled) -> Spelled:
        """Lower-case a word, decompose it, drop the accents.

        Lower-casing looks at neighbours (final sigma), so it sees the whole word; when it changes the length,
        the characters are also lowered one by one to find where each comes from.
        """
        characters = [character for character, _ in word]
        positions = [position for _, position in word]
        lowered = "".join(characters).lower()
        if len(lowered) != len(word):
            positions = [p for character, p in word for _ in character.lower()]
        decomposed = [
            (part, position)
            for character, position in zip(lowered, positions)
            for part in unicodedata.normalize("NFD", character)
        ]
        ordered = unicodedata.normalize("NFD", lowered)  # reorders accents, which are then dropped
        return [
            (character, position)
            for (character, (_, position)) in zip(ordered, decomposed)
            if unicodedata.category(character) != "Mn"
        ]


def _split_at_whitespace(characters: Spelled) -> list[Spelled]:
    words: list[Spelled] = [[]]
    for character, position in characters:
        if character.isspace():
            words.append([])
        else:
            words[-1].append((character, position))
    return [word for word in words if word]


class WordpieceTokenizer:
    """A word to pieces: greedy longest match; a word that cannot be covered is one unknown token."""

    def __init__(
        self, vocab: dict[str, int], unk_token: str = UNKNOWN, max_input_chars_per_word: int = MAX_WORD_LENGTH
    ) -> None:
        self.vocab, self.unk_token, self.max_input_chars_per_word = vocab, unk_token, max_input_chars_per_word
        self._longest: dict[str, int] = {}
        self._longest_of_size = 0

    def _longest_pieces(self) -> dict[str, int]:
        """The first two characters of pieces, behind `##` for those inside words -> length of the longest such piece."""
        if self._longest_of_size != len(self.vocab):  # tokens are added after construction
            self._longest, self._longest_of_size = {}, len(self.vocab)
            for piece in self.vocab:
                for key, length in ((piece[:2], len(piece)), (piece[:4], len(piece) - 2)):
                    self._longest[key] = max(length, self._longest.get(key, 0))
        return self._longest

    def tokenize(self, text: str) -> list[str]:
        """Pieces of whitespace-separated words."""
        return [piece for word in text.split() for piece in self.pieces(word)]

    def pieces(self, word: str) -> list[str]:
        """Pieces of one word; all but the first carry the prefix `##`."""
        if len(word) > self.max_input_chars_per_word:
            return [self.unk_token]
        pieces: list[str] = []
        longest = self._longest_pieces()
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            bound = start + max(1, longest.get(prefix + word[start : start + 2], 0))
            for end in range(min(bound, len(word)), start, -1):
                piece = prefix + word[start:end]
                if piece in self.vocab:
                    break
            else:
                return [self.unk_token]
            pieces.append(piece)
            start = end
        return pieces


class FullTokenizer:
    """Basic tokenization, then WordPiece."""

    def __init__(self, vocab_file: str, do_lower_case: bool = True) -> None:
        self.vocab_file = vocab_file
        self.vocab = load_vocab(vocab_file)
        self.inv_vocab = {token_id: token for token, token_id in self.vocab.items()}
        self.basic_tokenizer = BasicTokenizer(do_lower_case)
        self.wordpiece_tokenizer = WordpieceTokenizer(self.vocab)
        self._lower_case = do_lower_case
        self._words = WordMemo(lambda word: packed(self._ids_of_word(word)))
        self._table = AsciiWordTable(self._ids_of_word)
        self._stretches = WordMemo(lambda stretch: self._words.joined(self._words_of(stretch)))
        # Dropped: their sides join.
        self._find_controls = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
        self._ascii_words = re.compile(rf"[0-9A-Za-z]+|[{ASCII_PUNCTUATION}]").findall

    def tokenize(self, text: str) -> list[str]:
        """Text to pieces."""
        words = self.basic_tokenizer.tokenize(text)
        return [piece for word in words for piece in self.wordpiece_tokenizer.pieces(word)]

    def encode(self, text: str) -> numpy.ndarray:
        """Ids [t] of `text`: those of convert_tokens_to_ids(tokenize(text))."""
        if self._find_controls.search(text):
            text = self._find_controls.sub("", text)
        if text.isascii():
            return self._encode_ascii(text)
        lines = groupby(text.split("\n"), key=str.isascii)
        # Basic tokenization works within what whitespace delimits: such stretches are remembered whole.
        return numpy.concatenate(
            [
                self._encode_ascii("\n".join(group))
                if is_ascii
                else self._stretches.ids(" ".join(group).split())
                for is_ascii, group in lines
            ]
        )

    def _encode_ascii(self, text: str) -> numpy.ndarray:
        if self._lower_case:
            text = text.lower()
        if len(text) < TABLE_FROM_CHARACTERS:
            return self._words.ids(self._ascii_words(text))
        return self._table.ids(text)

    def _ids_of_word(self, word: str) -> list[int]:
        return self.convert_tokens_to_ids(self.wordpiece_tokenizer.pieces(word))

    def _words_of(self, stretch: str) -> list[str]:
        """The words of a text without control characters."""
        if stretch.isascii():
            return self._ascii_words(stretch.lower() if self._lower_case else stretch)
        return self.basic_tokenizer.tokenize(stretch)

    def convert_tokens_to_ids(self, tokens: Iterable[str]) -> list[int]:
        """Pieces to ids. DataError when the vocabulary lacks one, which can only be `[UNK]`."""
        try:
            return [self.vocab[token] for token in tokens]
        except KeyError as error:
            raise DataError(
                self.vocab_file,
                f"the text needs {error.args[0]}, which the vocabulary does not have",
                f"add a line {error.args[0]} to the vocabulary",
            ) from error

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]:
        """Ids to pieces."""
        return [self.inv_vocab[token_id] for token_id in ids]

    @staticmethod
    def convert_tokens_to_string(tokens: Iterable[str], clean_up_tokenization_spaces: bool = True) -> str:
        """Pieces to readable text; the spaces that tokenization put before punctuation are taken out again."""
        text = " ".join(tokens).replace(" ##", "").strip()
        if clean_up_tokenization_spaces:
            for spaced, tidy in TIDY:
                text = text.replace(spaced, tidy)
        return text

    def vocab_size(self) -> int:
        return len(self.vocab)


class _BertWordPieceTokenizer(MegatronTokenizer):
    """`--tokenizer-type BertWordPieceLowerCase` and `BertWordPieceCase`.

    `[BOS]`, `[EOS]` and `<extra_id_i>` are added behind the file's tokens unless it has them.
    """

    def __init__(self, vocab_file: str, lower_case: bool = True, vocab_extra_ids: int = 0) -> None:
        super().__init__(vocab_file, lower_case=lower_case, vocab_extra_ids=vocab_extra_ids)
        self.tokenizer = FullTokenizer(vocab_file, do_lower_case=lower_case)
        missing = [token for token in ("[CLS]", "[SEP]", "[PAD]", "[MASK]") if token not in self.vocab]
        if missing:
            raise DataError(
                vocab_file,
                f"the vocabulary lacks {' '.join(missing)}",
                "give the vocab.txt of a BERT model, or train one with tools/train_tokenizer.py --model wordpiece",
            )
        self.cls_id, self.sep_id = self.vocab["[CLS]"], self.vocab["[SEP]"]
        self.pad_id, self.mask_id = self.vocab["[PAD]"], self.vocab["[MASK]"]
        self._additional_special_tokens: list[str] = []
        self.bos_token, self.eos_token = "[BOS]", "[EOS]"
        self.bos_id, self.eos_id = self._add_token(self.bos_token), self._add_token(self.eos_token)
        for i in range(vocab_extra_ids):
            self._add_token(f"<extra_id_{i}>")
            self._additional_special_tokens.append(f"<extra_id_{i}>")

    def _add_token(self, token: str) -> int:
        if token not in self.vocab:
            self.inv_vocab[self.vocab_size] = token
            self.vocab[token] = self.vocab_size
        return self.vocab[token]

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer.vocab)

    @property
    def vocab(self) -> dict[str, int]:
        return self.tokenizer.vocab

    @property
    def inv_vocab(self) -> dict[int, str]:
        return self.tokenizer.inv_vocab

    def tokenize(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).tolist()

    def encode_document(self, text: str) -> numpy.ndarray:
        """Ids [t] of a text, as an array."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int] | numpy.ndarray) -> str:
        """Ids to readable text."""
        return self.tokenizer.convert_tokens_to_string(self.tokenizer.convert_ids_to_tokens(map(int, ids)))

    detokenize = decode

    def decode_token_ids(self, token_ids: Sequence[int] | numpy.ndarray) -> str:
        """Ids to text without `[PAD]` and `[CLS]`; a space stands before each word."""
        tokens = self.tokenizer.convert_ids_to_tokens(map(int, token_ids))
        kept = (token for token in tokens if token not in ("[PAD]", "[CLS]"))
        return "".join(token[2:] if token.startswith("##") else " " + token for token in kept)

    def offsets(self, ids: Sequence[int], text: str) -> list[int]:
        """Position of the character at which each token of `text` starts."""
        starts: list[int] = []
        for word in self.tokenizer.basic_tokenizer.spelled_words(text):
            start = 0
            for piece in self.tokenizer.wordpiece_tokenizer.pieces("".join(c for c, _ in word)):
                starts.append(word[start][1])
                start += len(piece.removeprefix("##") if start else piece)
        return starts[: len(ids)]

    @property
    def cls(self) -> int:
        return self.cls_id

    @property
    def sep(self) -> int:
        return self.sep_id

    @property
    def pad(self) -> int:
        return self.pad_id

    @property
    def mask(self) -> int:
        return self.mask_id

    @property
    def bos(self) -> int:
        return self.bos_id

    @property
    def eos(self) -> int:
        return self.eos_id

    @property
    def additional_special_tokens(self) -> list[str]:
        return self._additional_special_tokens

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        return [self.vocab[token] for token in self._additional_special_tokens]
