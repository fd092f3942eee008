"""Repairing a text's encoding and telling English from other languages, each by the library made for it."""

from __future__ import annotations

from loose_json import need


def fix_text(text: str) -> str:
    """The text without mis-decoded characters (ftfy)."""
    return need("ftfy", "repairing texts").fix_text(text)


def is_english(text: str) -> bool:
    """Whether a text is English (langdetect). Errors: ValueError where it has no letters to tell by."""
    langdetect = need("langdetect", "telling languages apart")
    langdetect.DetectorFactory.seed = (
        0  # it draws parts of the text; the same text shall give the same answer
    )
    try:
        return langdetect.detect(text) == "en"
    except langdetect.LangDetectException as error:
        raise ValueError(f"its language is not to be told: {error}") from error
