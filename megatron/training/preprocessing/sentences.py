"""Splitting documents into sentences."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable

from megatron.core.errors import FlagError

PIECE_CHARACTERS = (
    1_000_000  # long texts are cut here before they are split, which bounds the splitter's memory
)
SPLITTERS = ("punkt", "simple")
SentenceSplitter = Callable[[str], list[str]]


def build_splitter(name: str, language: str, keep_newlines: bool) -> SentenceSplitter:
    """Text -> sentences. `name` is one of SPLITTERS.

    With `keep_newlines` the whitespace after a sentence stays with it. Errors: FlagError when NLTK or its model for
    the language is not installed.
    """
    split = _simple(keep_newlines) if name == "simple" else _punkt(language, keep_newlines)

    def sentences(text: str) -> list[str]:
        pieces = (text[i : i + PIECE_CHARACTERS] for i in range(0, len(text), PIECE_CHARACTERS))
        return [sentence for piece in pieces for sentence in split(piece)]

    return sentences


def _punkt(language: str, keep_newlines: bool) -> SentenceSplitter:
    """NLTK's trained Punkt model (Kiss & Strunk 2006)."""
    flag = f"--split-sentences --lang {language}"
    try:
        import nltk.data
        from nltk.tokenize import punkt
    except ImportError as error:
        raise FlagError(
            flag,
            "nltk library required for sentence splitting is not available",
            "pip install nltk, or use --sentence-splitter simple",
        ) from error
    try:
        if hasattr(punkt, "PunktTokenizer"):  # NLTK 3.9 and later keep the models as tables
            model = punkt.PunktTokenizer(language)
        else:
            model = nltk.data.load(_pickle_url(language))
    except (LookupError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise FlagError(
            flag,
            f"NLTK finds no sentence model for this language in {' '.join(nltk.data.path)}",
            f"run `python -m nltk.downloader {_resource_name(punkt)}` where there is a network and set NLTK_DATA to the "
            "directory that then holds tokenizers/, or use --sentence-splitter simple (a plain rule; other sentences)",
        ) from error
    if not keep_newlines:
        return model.tokenize

    class KeepNewlines(punkt.PunktLanguageVars):
        """Sentence ends take the whitespace after them along."""

        _period_context_fmt = (
            r"\S*%(SentEndChars)s\s*(?=(?P<after_tok>%(NonWord)s|(?P<next_tok>\S+)))"  # read in verbose mode
        )

    return punkt.PunktSentenceTokenizer(train_text=model._params, lang_vars=KeepNewlines()).tokenize


def _resource_name(punkt: object) -> str:
    return "punkt_tab" if hasattr(punkt, "PunktTokenizer") else "punkt"


def _pickle_url(language: str) -> str:
    folder = os.environ.get("NLTK_DATA")
    name = f"tokenizers/punkt/{language}.pickle"
    return f"nltk:{name}" if folder is None else f"file:{os.path.join(folder, name)}"


def _simple(keep_newlines: bool) -> SentenceSplitter:
    """A sentence ends at . ! ? (or their wide forms) and closing marks before whitespace and no lower-case letter.

    It knows no abbreviations. It needs no model, so it runs anywhere.
    """
    end = re.compile(r"""(?<=[.!?])["')\]]*\s+(?=[^\sa-z])|(?<=[。！？])\s*(?=\S)""")

    def split(text: str) -> list[str]:
        sentences = []
        start = 0
        for match in end.finditer(text):
            sentences.append(text[start : match.end()])
            start = match.end()
        sentences.append(text[start:])
        if keep_newlines:
            return [sentence for sentence in sentences if sentence.strip()]
        return [sentence.strip() for sentence in sentences if sentence.strip()]

    return split
