"""The words of long ASCII texts, found and looked up in numpy: several times faster than one string after the other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import numpy

SLOT_BITS = 19
LAST_SLOT = (1 << SLOT_BITS) - 1
PROBES = 4
KEY_BYTES = 16
COUNT_BITS = 16
MAX_COUNT = (1 << COUNT_BITS) - 1
MAX_WORDS = 1 << (SLOT_BITS - 1)
MAX_IDS = 1 << 21
BLOCK_CHARACTERS = 1 << 18  # per pass: temporaries stay in the cache

_SPACE, _ALPHANUMERIC, _PUNCTUATION = range(3)
_CLASS = numpy.array(
    [_ALPHANUMERIC if chr(c).isalnum() else _PUNCTUATION if 33 <= c < 127 else _SPACE for c in range(128)],
    dtype=numpy.uint8,
)
_FIRST_BYTES = numpy.array([(1 << 8 * n) - 1 for n in range(9)], dtype=numpy.uint64)
_SPREAD, _SPREAD_MORE = numpy.uint64(0x9E3779B97F4A7C15), numpy.uint64(0xC2B2AE3D27D4EB4F)
_NO_WORD = numpy.uint64(1)  # a control character
_END_OF_WORD = re.compile("[^0-9A-Za-z]|$")


class AsciiWordTable:
    """Ids of ASCII texts whose words are runs of letters and digits, and single punctuation marks.

    A word of up to 16 characters is a pair of 64-bit numbers. They are looked up in an open hash table, all words of
    a block at once, and compared in full, so that a hit is exact. Words not found there go through a dictionary and,
    when that lacks them too, through `encode`, which gives fewer than 65536 ids. A table that has grown too large
    forgets everything.
    """

    def __init__(self, encode: Callable[[str], Sequence[int]]) -> None:
        self._encode = encode
        self._forget()

    def _forget(self) -> None:
        slots = 1 << SLOT_BITS
        self._keys = numpy.zeros((2, slots), dtype=numpy.uint64)  # no word is zero: that slot is free
        self._places = numpy.zeros(slots, dtype=numpy.int64)
        self._place_of_word: dict[str, int] = {}  # position in _ids, and in the lowest bits how many
        self._ids = numpy.empty(1 << 16, dtype=numpy.int32)
        self._used = 0

    def ids(self, text: str) -> numpy.ndarray:
        """The ids [t] of all words of an ASCII text in order, int32."""
        blocks = [self._block(block) for block in _blocks(text)]
        return blocks[0] if len(blocks) == 1 else numpy.concatenate(blocks)

    def _block(self, text: str) -> numpy.ndarray:
        if len(self._place_of_word) > MAX_WORDS or self._used > MAX_IDS:
            self._forget()
        content = numpy.frombuffer(text.encode("ascii") + bytes(KEY_BYTES), dtype=numpy.uint8)
        starts, lengths = _words(content)
        keys = _keys(content, starts, lengths)
        slots = _home(keys)
        unknown = self._probe(keys, slots)
        places = self._places[slots]
        if unknown.size:
            begins = starts[unknown]
            words = [text[i:j] for i, j in zip(begins.tolist(), (begins + lengths[unknown]).tolist())]
            self._learn(dict(zip(words, unknown.tolist())), keys)
            places[unknown] = list(map(self._place_of_word.__getitem__, words))
        counts = places & MAX_COUNT
        ends = numpy.cumsum(counts)
        total = int(ends[-1]) if ends.size else 0
        places >>= COUNT_BITS
        return self._ids[numpy.repeat(places - ends + counts, counts) + numpy.arange(total)]

    def _probe(self, keys: numpy.ndarray, slots: numpy.ndarray) -> numpy.ndarray:
        """Move `slots` on to where the words are; which words are nowhere."""
        missing = self._differ(keys, slots)
        for _ in range(PROBES - 1):
            if not missing.size:
                break
            slots[missing] = (slots[missing] + 1) & LAST_SLOT
            missing = missing[self._differ(keys[:, missing], slots[missing])]
        return missing

    def _differ(self, keys: numpy.ndarray, slots: numpy.ndarray) -> numpy.ndarray:
        return numpy.flatnonzero((self._keys[0][slots] != keys[0]) | (self._keys[1][slots] != keys[1]))

    def _learn(self, occurrences: dict[str, int], keys: numpy.ndarray) -> None:
        """Encode the new ones among words, given with where each has its key; short ones get a slot if one is free."""
        new = [word for word in occurrences if word not in self._place_of_word]
        ids: list[int] = []
        for word in new:
            word_ids = self._encode(word)
            self._place_of_word[word] = (self._used + len(ids)) << COUNT_BITS | len(word_ids)
            ids += word_ids
        while self._used + len(ids) > self._ids.size:
            self._ids = numpy.concatenate([self._ids, numpy.empty_like(self._ids)])
        self._ids[self._used : self._used + len(ids)] = ids
        self._used += len(ids)
        short = [word for word in new if len(word) <= KEY_BYTES]
        keys = keys[:, [occurrences[word] for word in short]]
        places = numpy.array([self._place_of_word[word] for word in short], dtype=numpy.int64)
        slots = _home(keys)
        for _ in range(PROBES):
            free = numpy.flatnonzero(self._keys[0][slots] == 0)
            self._keys[:, slots[free]] = keys[:, free]  # of several that want one slot, one gets it
            self._places[slots[free]] = places[free]
            left = self._differ(keys, slots)
            keys, places, slots = keys[:, left], places[left], (slots[left] + 1) & LAST_SLOT


def _blocks(text: str) -> Iterator[str]:
    """`text` in pieces that end between words."""
    start = 0
    while len(text) - start > BLOCK_CHARACTERS:
        match = _END_OF_WORD.search(text, start + BLOCK_CHARACTERS)
        assert match is not None, "the pattern also matches the end of the text"
        yield text[start : match.start()]
        start = match.start()
    yield text[start:]


def _words(content: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """First byte and length of every word; `content` ends with a space."""
    kinds = _CLASS[content]
    inside = kinds == _ALPHANUMERIC
    before = numpy.empty_like(inside)
    before[0], before[1:] = False, inside[:-1]
    starts = numpy.flatnonzero((inside > before) | (kinds == _PUNCTUATION))
    lengths = numpy.ones_like(starts)
    runs = inside[starts]
    lengths[runs] = numpy.flatnonzero(before > inside) - starts[runs]
    return starts, lengths


def _home(keys: numpy.ndarray) -> numpy.ndarray:
    """The first slot to look into for each key."""
    mixed = (keys[0] ^ keys[1] * _SPREAD_MORE) * _SPREAD
    return (mixed >> numpy.uint64(64 - SLOT_BITS)).astype(numpy.int64)


def _keys(content: numpy.ndarray, starts: numpy.ndarray, lengths: numpy.ndarray) -> numpy.ndarray:
    """Words of up to 16 characters as two numbers, with zeros behind shorter ones: uint64 [2, words].

    All longer words get a key that no such word has.
    """
    eight = numpy.lib.stride_tricks.as_strided(content[:8].view("<u8"), (content.size - 7,), (1,))
    keys = numpy.zeros((2, starts.size), dtype=numpy.uint64)
    keys[0] = eight[starts] & _FIRST_BYTES[numpy.minimum(lengths, 8)]
    longer = numpy.flatnonzero(lengths > 8)
    keys[1, longer] = eight[starts[longer] + 8] & _FIRST_BYTES[numpy.minimum(lengths[longer] - 8, 8)]
    keys[0, longer[lengths[longer] > KEY_BYTES]] = _NO_WORD
    return keys
