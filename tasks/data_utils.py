"""From texts to samples of BERT: cleaning, and packing one or two texts into a sequence (spec: tasks, section 2)."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

#: ids, types and padding mask of one sequence.
Packed = tuple[list[int], list[int], list[int]]


def clean_text(text: str) -> str:
    """Runs of white space become one space, and a full stop that stands alone moves to the word before it."""
    text = re.sub(r"\s+", " ", text)
    for _ in range(3):
        text = text.replace(" . ", ". ")
    return text


def build_sample(
    ids: Any, types: Any, paddings: Any, label: int, unique_id: int
) -> dict[str, np.ndarray | int]:
    """One sample as the loaders collate it."""
    return {
        "text": np.array(ids, dtype=np.int64),
        "types": np.array(types, dtype=np.int64),
        "padding_mask": np.array(paddings, dtype=np.int64),
        "label": int(label),
        "uid": int(unique_id),
    }


def build_tokens_types_paddings_from_text(
    text_a: str, text_b: str | None, tokenizer: Any, max_seq_length: int
) -> Packed:
    """Tokenize one or two texts and pack them."""
    ids_b = None if text_b is None else tokenizer.tokenize(text_b)
    return build_tokens_types_paddings_from_ids(
        tokenizer.tokenize(text_a), ids_b, max_seq_length, tokenizer.cls, tokenizer.sep, tokenizer.pad
    )


def build_tokens_types_paddings_from_ids(
    text_a_ids: list[int],
    text_b_ids: list[int] | None,
    max_seq_length: int,
    cls_id: int,
    sep_id: int,
    pad_id: int,
) -> Packed:
    """`cls A sep [B sep]`, cut to `max_seq_length` with a sep at its end, or filled up with padding.

    Types are 0 up to the first sep, 1 after it, and the padding id where there is padding, as v0.9 has them; the padding
    mask is 1 for tokens.
    """
    ids = [cls_id, *text_a_ids, sep_id]
    types = [0] * len(ids)
    if text_b_ids is not None:
        ids += text_b_ids
        types += [1] * len(text_b_ids)
    # The place of the last sep is kept free, even where nothing is left out.
    too_long = len(ids) >= max_seq_length
    if too_long:
        del ids[max_seq_length - 1 :], types[max_seq_length - 1 :]
    if too_long or text_b_ids is not None:
        ids.append(sep_id)
        types.append(0 if text_b_ids is None else 1)
    missing = max_seq_length - len(ids)
    return ids + [pad_id] * missing, types + [pad_id] * missing, [1] * len(ids) + [0] * missing
