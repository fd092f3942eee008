"""Byte-level BPE as GPT-2 defines it: one exact Python engine, one fast compiled engine, equal ids."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import warnings
from heapq import heapify, heappop, heappush
from types import ModuleType
from typing import Protocol

import numpy

from megatron.core.errors import FlagError
from megatron.training.tokenizer.memo import WordMemo, packed

PRETOKEN_PATTERN = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # Radford et al. 2019
)
Ranks = dict[tuple[str, ...], int]  # pair of pieces -> priority, lowest first; other lengths never match
ENGINES = ("auto", "gigatoken", "python")


def bytes_to_unicode() -> dict[int, str]:
    """The printable stand-in of each byte: visible Latin-1 bytes stand for themselves, the rest follow at 256."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


class BPEEngine(Protocol):
    """Text to ids."""

    name: str

    def encode(self, text: str) -> numpy.ndarray:
        """Ids [t] of `text`, int32."""
        ...


def merge_word(word: str, ranks: Ranks) -> list[str]:
    """Split a mapped word [characters] into BPE pieces.

    The lowest-ranked adjacent pair is merged wherever it occurs, left to right, until no pair is ranked. Waiting
    positions are kept per rank, so the cost is O(n log n) and a word of millions of characters does not stall.
    """
    length = len(word)
    pieces: list[str] = list(word)
    following = list(range(1, length + 1))
    preceding = list(range(-1, length - 1))
    waiting: dict[int, list[int]] = {}
    for i in range(length - 1):
        rank = ranks.get((pieces[i], pieces[i + 1]))
        if rank is not None:
            waiting.setdefault(rank, []).append(i)
    order = list(waiting)
    heapify(order)
    while order:
        rank = heappop(order)
        found: list[tuple[int, int]] = []
        for i in sorted(waiting.pop(rank)):
            j = following[i]
            if j >= length or not pieces[i] or ranks.get((pieces[i], pieces[j])) != rank:
                continue  # an earlier merge has consumed one side
            pieces[i] += pieces[j]
            pieces[j] = ""
            following[i] = following[j]
            if following[j] < length:
                preceding[following[j]] = i
            found += ((preceding[i], i), (i, following[i]))
        for left, right in found:
            if left < 0 or right >= length or not pieces[left] or following[left] != right:
                continue
            new = ranks.get((pieces[left], pieces[right]))
            if new is not None:
                if new not in waiting:
                    waiting[new] = []
                    heappush(order, new)
                waiting[new].append(left)
    return [piece for piece in pieces if piece]


class PythonEngine:
    """The definition itself, with a word cache: any merge table, any Unicode version."""

    name = "python"

    def __init__(self, vocab: dict[str, int], ranks: Ranks) -> None:
        import regex

        self._split = regex.compile(PRETOKEN_PATTERN).findall
        self._vocab, self._ranks = vocab, ranks
        self._stand_in = bytes_to_unicode()
        self._memo = WordMemo(self._word_ids)

    def encode(self, text: str) -> numpy.ndarray:
        """Ids [t] of `text`; UnicodeEncodeError for a lone surrogate, which has no UTF-8 bytes."""
        return self._memo.ids(self._split(text))

    def _word_ids(self, word: str) -> bytes:
        mapped = "".join(map(self._stand_in.__getitem__, word.encode("utf-8")))
        return packed(self._vocab.get(piece, 0) for piece in merge_word(mapped, self._ranks))


class GigatokenEngine:
    """The compiled engine of the `gigatoken` package, kept exact and bounded.

    Exact: it follows the Unicode tables it was compiled with, so text with a character that this and the
    installed `regex` classify differently goes to the Python engine. Bounded: its word cache never shrinks, so
    it is built anew whenever the process has grown by `CACHE_BYTES`.
    """

    CACHE_BYTES = 256 << 20
    CHECK_CHARACTERS = 16 << 20

    def __init__(self, vocab: dict[str, int], ranks: Ranks) -> None:
        import gigatoken

        self.name = "gigatoken"
        self._gigatoken = gigatoken
        self._exact = PythonEngine(vocab, ranks)
        self._definition, self._table = _engine_definition(vocab, ranks)
        self._disputed: numpy.ndarray | None = None
        self._build()

    def encode(self, text: str) -> numpy.ndarray:
        """Ids [t] of `text`; UnicodeEncodeError for a lone surrogate, which has no UTF-8 bytes."""
        if not text.isascii():
            if self._disputed is None:  # takes 0.1 s, so not before the first text that needs it
                self._disputed = _disputed_characters(self._gigatoken)
            codes = numpy.frombuffer(text.encode("utf-32-le"), numpy.uint32)
            if self._disputed[codes].any():
                return self._exact.encode(text)
        ids = self._tokenizer.encode(text)
        self._characters += len(text)
        if self._characters >= self.CHECK_CHARACTERS:
            self._bound_memory()
        return ids.astype(numpy.int32) if self._table is None else self._table[ids]

    def _build(self) -> None:
        self._tokenizer = self._gigatoken.Tokenizer.from_json(self._definition)
        self._characters = 0
        self._baseline_bytes = _resident_bytes()

    def _bound_memory(self) -> None:
        now = _resident_bytes()
        # Where the resident size is unknown, the number of characters seen bounds the cache instead.
        if now is None or self._baseline_bytes is None or now - self._baseline_bytes > self.CACHE_BYTES:
            del self._tokenizer
            self._build()
        self._characters = 0


def _engine_definition(vocab: dict[str, int], ranks: Ranks) -> tuple[str, numpy.ndarray | None]:
    """The tokenizer.json handed to the engine, and the table from its ids to ours (None when they are equal).

    The engine wants all 256 byte characters and every merged piece in its vocabulary. Pieces that ours lacks get
    ids past the end, which the table maps to 0, the id of an unknown piece.
    """
    merges = sorted((pair for pair in ranks if len(pair) == 2 and all(pair)), key=ranks.__getitem__)
    names = dict.fromkeys(sorted(vocab, key=vocab.__getitem__))
    names.update(dict.fromkeys(bytes_to_unicode().values()))
    names.update(dict.fromkeys(left + right for left, right in merges))
    table = numpy.fromiter((vocab.get(name, 0) for name in names), dtype=numpy.int32, count=len(names))
    definition = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {name: i for i, name in enumerate(names)},
            "merges": [list(pair) for pair in merges],
        },
    }
    identity = len(vocab) == len(names) and bool((table == numpy.arange(len(names))).all())
    return json.dumps(definition), None if identity else table


def merges_are_ordered(ranks: Ranks) -> bool:
    """Whether every merge ranks after all merges that make its two sides.

    Training always gives such a table. Only then does merging the lowest pair everywhere at once (GPT-2) equal
    merging one pair at a time (every compiled engine).
    """
    latest: dict[str, int] = {}
    for pair, rank in ranks.items():
        if len(pair) == 2:
            piece = pair[0] + pair[1]
            latest[piece] = max(rank, latest.get(piece, -1))
    return all(latest.get(side, -1) < rank for pair, rank in ranks.items() for side in pair)


def _disputed_characters(gigatoken: ModuleType) -> numpy.ndarray:
    """Which code points the engine and `regex` put into different classes: bool [0x110000].

    Joined, the characters of one class form one word for an engine that agrees. Where it splits them, each piece
    is asked again behind an undisputed member of the class.
    """
    import regex

    def words(text: str) -> list[str]:
        return [bytes(word).decode("utf-8") for word in gigatoken.pretokenizer(text.encode("utf-8"))]

    codes = numpy.arange(0x80, sys.maxunicode + 1, dtype=numpy.uint32)
    everything = codes[(codes < 0xD800) | (codes > 0xDFFF)].tobytes().decode("utf-32-le")
    disputed = numpy.zeros(sys.maxunicode + 1, dtype=bool)
    for member, pattern in (("a", r"\p{L}+"), ("1", r"\p{N}+"), ("\t", r"\s+"), ("!", r"[^\s\p{L}\p{N}]+")):
        pieces = words("".join(regex.findall(pattern, everything)))
        if len(pieces) > 1:
            for piece in pieces:
                if len(words(member + piece)) > 1:
                    disputed[numpy.frombuffer(piece.encode("utf-32-le"), numpy.uint32)] = True
    return disputed


def _resident_bytes() -> int | None:
    """Memory this process holds now, in bytes; None where the kernel does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def load_merges(path: str) -> Ranks:
    """Pair -> rank of a `merges.txt`; the first line is a header, and text after the last newline is no merge."""
    with open(path, encoding="utf-8") as file:
        lines = file.read().split("\n")
    if lines[-1].strip():
        warnings.warn(
            f"{path} does not end with a newline, so its last merge {lines[-1]!r} is not used (as always with this "
            "tokenizer). Add a newline if it should be.",
            stacklevel=2,
        )
    return {tuple(line.split()): rank for rank, line in enumerate(lines[1:-1])}


def build_engine(name: str, vocab: dict[str, int], ranks: Ranks) -> tuple[BPEEngine, str]:
    """The engine to use and one line that says which and why.

    `name` is one of ENGINES; "auto" takes the compiled engine where it is installed and exact.
    Errors: FlagError when the engine asked for cannot be used.
    """
    if name not in ENGINES:
        raise FlagError("--bpe-engine", f"{name!r} is not one of {', '.join(ENGINES)}")
    if name == "python":
        return PythonEngine(vocab, ranks), "python"
    if importlib.util.find_spec("gigatoken") is None:
        reason, fix = "the package gigatoken is not installed", "pip install gigatoken"
    elif not merges_are_ordered(ranks):
        reason = "the merge table ranks a merge before one that makes its parts, which only the Python engine follows"
        fix = "drop --bpe-engine, or retrain the vocabulary with tools/train_tokenizer.py"
    else:
        engine = GigatokenEngine(vocab, ranks)
        return engine, engine.name
    if name == "gigatoken":
        raise FlagError("--bpe-engine gigatoken", reason, fix)
    return PythonEngine(vocab, ranks), f"python, several times slower ({reason}; to change that: {fix})"
