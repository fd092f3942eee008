"""Whether a passage holds one of the answers to a question."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import regex

#: Runs of letters, digits and marks; every other character that is no space or control character on its own.
_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")


def tokens_of(text: str) -> list[str]:
    """The tokens of a text in lower case, letters and their accents apart (NFD)."""
    return [token.lower() for token in _TOKEN.findall(unicodedata.normalize("NFD", text))]


def has_answer(answers: Sequence[str], text: str, match_type: str) -> bool:
    """Whether one of the answers is in the text.

    "string": its tokens follow each other there. "regex": it is a regular expression that is found there; one that is none
    never is. Case does not count.
    """
    if match_type == "regex":
        normalized = unicodedata.normalize("NFD", text)
        return any(_is_found(unicodedata.normalize("NFD", answer), normalized) for answer in answers)
    if match_type != "string":
        raise ValueError(f"match_type {match_type!r} is neither 'string' nor 'regex'")
    tokens = tokens_of(text)
    return any(_is_inside(tokens_of(answer), tokens) for answer in answers)


def _is_inside(part: list[str], whole: list[str]) -> bool:
    return any(whole[at : at + len(part)] == part for at in range(len(whole) - len(part) + 1))


def _is_found(pattern: str, text: str) -> bool:
    try:
        return regex.search(pattern, text, regex.IGNORECASE | regex.MULTILINE) is not None
    except regex.error:
        return False
