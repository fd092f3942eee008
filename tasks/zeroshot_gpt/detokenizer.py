"""Text as it was before a benchmark took it apart: tokens of PTB and WikiText joined again (spec: tasks, section 8)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from megatron.core.errors import DataError

_PTB = [
    (" '", "'"), (" \n", "\n"), ("\n ", "\n"), (" n't", "n't"), (" N ", "1 "), ("$ 1", "$1"), ("# 1", "#1"),
]  # fmt: skip
_WIKI_BEFORE = [
    ("s '", "s'"),
    (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."),
    (" : ", ": "), (" ; ", "; "), (" . ", ". "), (" ! ", "! "), (" ? ", "? "), (" , ", ", "),
]  # fmt: skip
_WIKI_AFTER = [
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="),
    (" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s"),
]  # fmt: skip
#: What encloses text without white space at its inner ends.
_ENCLOSING = [r"\(", r"\)"], [r"\[", r"\]"], [r"{", r"}"], ['"', '"'], ["'", "'"]


def ptb_detokenizer(string: str) -> str:
    """Penn Treebank."""
    return _replaced(string, _PTB)


def wikitext_detokenizer(string: str) -> str:
    """WikiText-2 and WikiText-103."""
    string = _replaced(string, _WIKI_BEFORE)
    for left, right in _ENCLOSING:
        pattern = rf"({left})\s*([^{right}]*?)\s*({right})"
        string = re.sub(pattern, r"\1\2\3", string)
    return _replaced(string, _WIKI_AFTER)


def lambada_detokenizer(string: str) -> str:
    """LAMBADA is text as it is."""
    return string


def _replaced(string: str, pairs: list[tuple[str, str]]) -> str:
    for old, new in pairs:
        string = string.replace(old, new)
    return string


_DETOKENIZERS: dict[str, Callable[[str], str]] = {
    "ptb": ptb_detokenizer,
    "wiki": wikitext_detokenizer,
    "lambada": lambada_detokenizer,
}


def get_detokenizer(path: str) -> Callable[[str], str]:
    """The detokenizer whose name (ptb, wiki, lambada) is in `path`; the file's own name is asked before its directories.

    DataError if there is none: the perplexity of words would depend on it.
    """
    for text in (Path(path).name, path):
        for name, detokenizer in _DETOKENIZERS.items():
            if name in text:
                return detokenizer
    raise DataError(
        path, f"its name does not say how its words were taken apart ({', '.join(_DETOKENIZERS)})",
        "rename the file, for instance to wiki.test.tokens",
    )  # fmt: skip
