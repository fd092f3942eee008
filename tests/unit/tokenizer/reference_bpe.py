"""GPT-2's byte-level BPE written down from its definition: slow, with no shortcut to share a mistake with ours."""

from __future__ import annotations

from itertools import pairwise

import regex

WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def stand_ins() -> dict[int, str]:
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in kept}
    for byte in range(256):
        if byte not in table:
            table[byte] = chr(256 + len(table) - len(kept))
    return table


def merge(word: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    while len(word) > 1:
        pair = min(pairwise(word), key=lambda pair: ranks.get(pair, len(ranks) + 1))
        if pair not in ranks:
            break
        merged, i = [], 0
        while i < len(word):
            if tuple(word[i : i + 2]) == pair:
                merged.append(word[i] + word[i + 1])
                i += 2
            else:
                merged.append(word[i])
                i += 1
        word = merged
    return word


def encode(text: str, vocab: dict[str, int], ranks: dict[tuple[str, str], int]) -> list[int]:
    table = stand_ins()
    words = ([table[byte] for byte in word.encode("utf-8")] for word in WORDS.findall(text))
    return [vocab.get(piece, 0) for word in words for piece in merge(word, ranks)]
