"""Word n-grams of evaluation texts, and where a document has one of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

WORD = re.compile(r"\w+")


@dataclass
class Words:
    """The words of a text in lower case, and where each begins in it."""

    words: list[str]
    starts: list[int]

    @classmethod
    def of(cls, text: str) -> Words:
        """Runs of word characters of the text in lower case."""
        lowered = text.lower()
        matches = [(match.group(), match.start()) for match in WORD.finditer(lowered)]
        words, starts = [word for word, _ in matches], [start for _, start in matches]
        if len(lowered) != len(
            text
        ):  # a few capitals become two characters: find the place of each in the text
            places = [place for place, character in enumerate(text) for _ in character.lower()]
            starts = [places[start] for start in starts]
        return cls(words, starts)

    def resume(self, first: int, at: int) -> int:
        """The first word from number `first` that is left of the text from character `at` on; a cut one is shortened."""
        while first < len(self.words) and self.starts[first] < at:
            cut = at - self.starts[first]
            if cut < len(self.words[first]):
                self.words[first], self.starts[first] = self.words[first][cut:], at
                break
            first += 1
        return first


def ngrams_of(text: str, shortest: int, longest: int) -> Iterator[str]:
    """The n-grams of an evaluation text: `longest` words each; all its words if they are fewer, but at least `shortest`."""
    words = Words.of(text).words
    if len(words) >= shortest:
        for first in range(max(len(words) - longest, 0) + 1):
            yield " ".join(words[first : first + longest])


class Ngrams:
    """n-grams of at most `longest` words, found in the order in which they count."""

    def __init__(self, ngrams: Iterable[str], longest: int) -> None:
        self.ngrams = frozenset(ngrams)
        self.longest = longest
        self.sizes = Counter(ngram.count(" ") + 1 for ngram in self.ngrams)
        lengths: dict[str, set[int]] = {}
        for ngram in self.ngrams:
            lengths.setdefault(ngram.partition(" ")[0], set()).add(ngram.count(" ") + 1)
        # By first word, which most words of a document are not: the longest n-gram first, then from the shortest up.
        self._lengths = {
            word: sorted(found, key=lambda length: (length != longest, length))
            for word, found in lengths.items()
        }

    def first_match(self, words: Words, first: int) -> tuple[int, str] | None:
        """(word number, n-gram) of the first match in the text from word `first` on.

        An n-gram counts where the longest would still fit; in texts of more words than that the shorter ones
        inside the last of the longest come after everything else, the shortest first.
        """
        last = len(words.words) - self.longest
        for place in range(first, last + 1):
            for length in self._lengths.get(words.words[place], ()):
                found = " ".join(words.words[place : place + length])
                if found in self.ngrams:
                    return place, found
        if last > first:
            for length in sorted(self.sizes):
                if length >= self.longest:
                    continue
                for place in range(last, len(words.words) - length + 1):
                    found = " ".join(words.words[place : place + length])
                    if found in self.ngrams:
                        return place, found
        return None

    def occurring(self, text: str) -> set[str]:
        """The n-grams matched in a text, each match after the end of the one before."""
        words, first = Words.of(text), 0
        matched: set[str] = set()
        while (match := self.first_match(words, first)) is not None:
            place, ngram = match
            matched.add(ngram)
            # One space stands between the words of an n-gram, so this may fall short of its end in the text.
            first = words.resume(place, words.starts[place] + len(ngram) + 1)
        return matched


@dataclass
class Splitter:
    """Cuts matches out of texts, with all characters up to sentence marks at least `margin` away on both sides."""

    ngrams: Ngrams
    margin: int
    min_characters: int

    def pieces(self, text: str) -> list[str]:
        """What is left of a text, in order: pieces longer than `min_characters`, or all of it where nothing matches."""
        words, first = Words.of(text), 0
        pieces: list[str] = []
        begin = 0  # of what is not yet looked through
        while (match := self.ngrams.first_match(words, first)) is not None:
            place, ngram = match
            left = words.starts[place] - self.margin
            end = max(text.rfind(mark, begin, max(left + 1, begin)) for mark in ".!?") + 1
            if end - begin > self.min_characters:
                pieces.append(text[begin:end])
            right = words.starts[place] + len(ngram) + self.margin
            marks = [at for mark in ".!?" if (at := text.find(mark, right)) >= 0]
            begin = min(marks) + 1 if marks else len(text)
            if len(text) - begin <= self.min_characters:
                return pieces
            first = words.resume(place, begin)
        pieces.append(text[begin:])
        return pieces
