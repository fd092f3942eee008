"""The encoders as tools/preprocess_data.py had them before: pure Python, one word after the other.

A yardstick of benchmarks/preprocess.py, timed in the same run as the tool. Each takes the folder of a vocabulary and
gives a function from a text to its ids.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

MAX_WORD_CHARACTERS = 200


def byte_level_bpe(folder: Path) -> Callable[[str], list[int]]:
    """GPT-2's: words by a regular expression, merged pair by pair, remembered by word."""
    import regex

    find_words = regex.compile(
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ).findall
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    ranks = {tuple(line.split()): rank for rank, line in enumerate(lines)}
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    stand_in = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    known: dict[str, list[str]] = {}

    def merge(word: str) -> list[str]:
        if word in known:
            return known[word]
        parts = list(word)
        while len(parts) > 1:
            best = min(pairwise(parts), key=lambda pair: ranks.get(pair, float("inf")))
            if best not in ranks:
                break
            merged, i = [], 0
            while i < len(parts):
                width = 2 if tuple(parts[i : i + 2]) == best else 1
                merged.append("".join(parts[i : i + width]))
                i += width
            parts = merged
        known[word] = parts
        return parts

    def encode(text: str) -> list[int]:
        ids: list[int] = []
        for word in find_words(text):
            ids.extend(
                vocab[piece] for piece in merge("".join(stand_in[byte] for byte in word.encode("utf-8")))
            )
        return ids

    return encode


def wordpiece(folder: Path) -> Callable[[str], list[int]]:
    """BERT's: text cleaned character by character, words split at punctuation, longest pieces first."""
    names = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    vocab = {name: i for i, name in enumerate(names)}

    def is_punctuation(character: str) -> bool:
        code = ord(character)
        if 33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96 or 123 <= code <= 126:
            return True
        return unicodedata.category(character).startswith("P")

    def clean(text: str) -> str:
        output = []
        for character in text:
            code = ord(character)
            if code in (0, 0xFFFD) or (
                character not in "\t\n\r" and unicodedata.category(character) in ("Cc", "Cf")
            ):
                continue
            if character in " \t\n\r" or unicodedata.category(character) == "Zs":
                output.append(" ")
            elif 0x4E00 <= code <= 0x9FFF or 0x3400 <= code <= 0x4DBF or 0xF900 <= code <= 0xFAFF:
                output.append(f" {character} ")
            else:
                output.append(character)
        return "".join(output)

    def words(text: str) -> list[str]:
        output: list[str] = []
        for token in clean(text).split():
            folded = unicodedata.normalize("NFD", token.lower())
            word = ""
            for character in folded:
                if unicodedata.category(character) == "Mn":
                    continue
                if is_punctuation(character):
                    output += [word, character] if word else [character]
                    word = ""
                else:
                    word += character
            output += [word] if word else []
        return output

    def encode(text: str) -> list[int]:
        ids: list[int] = []
        for word in words(text):
            pieces: list[str] = []
            start = 0
            while start < len(word):
                end = len(word)
                prefix = "##" if start else ""
                while start < end and prefix + word[start:end] not in vocab:
                    end -= 1
                if start == end or len(word) > MAX_WORD_CHARACTERS:
                    pieces = ["[UNK]"]
                    break
                pieces.append(prefix + word[start:end])
                start = end
            ids.extend(vocab[piece] for piece in pieces)
        return ids

    return encode
