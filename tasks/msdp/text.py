"""Files of dialogue turns, and their words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megatron.core.errors import DataError, MegatronError

TURN_SEPARATOR = " [SEP] "
#: What stands for knowledge where a response uses none.
NO_KNOWLEDGE = "no_passages_used"
END_OF_DOCUMENT = "<|endoftext|>"


class Sample(NamedTuple):
    """A response in a dialogue: the turns before it, and what it draws on. `place` is its file and line."""

    place: str
    topic: str
    turns: list[str]
    knowledge: str
    response: str


def read_lines(path: str) -> list[str]:
    """The lines of a text file, as line feeds end them."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(path, f"not UTF-8 at byte {error.start + 1}", "give a text file in UTF-8") from error
    return [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def read_samples(path: str, fields: int = 4) -> Iterator[Sample]:
    """Samples of a file of `topic TAB turns TAB knowledge TAB response`, of which the first `fields` must be there."""
    for number, line in enumerate(read_lines(path), 1):
        found = line.split("\t")
        if not fields <= len(found) <= 4:
            raise DataError(
                f"{path}:{number}",
                f"{len(found)} columns, not topic, turns, knowledge and response",
                "give a file that tasks/msdp/preprocessing.py wrote",
            )
        topic, turns, knowledge, response = (column.strip() for column in found + [""] * (4 - len(found)))
        yield Sample(f"{path}:{number}", topic, turns.split(TURN_SEPARATOR), knowledge, response)


def tokenize(text: str) -> list[str]:
    """Words and marks in the manner of the Penn Treebank (NLTK); the text is one sentence, so no model is needed."""
    try:
        from nltk.tokenize import word_tokenize
    except ImportError as error:
        raise MegatronError(
            "nltk", "words are told apart by it, and it is not installed", "pip install nltk"
        ) from error
    return word_tokenize(text, preserve_line=True)


def spaced(text: str) -> str:
    """The words and marks of a text with one space between them."""
    return " ".join(tokenize(text)).strip()


def response_prompt(sample: Sample) -> str:
    """What a response is asked for with; an example goes on with the response."""
    last_turn, knowledge = spaced(sample.turns[-1]), spaced(sample.knowledge)
    return f"Topic: {sample.topic}. User says: {last_turn} We know that: {knowledge} System replies:"
