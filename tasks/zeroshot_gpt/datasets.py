"""Windows over a long text, and texts whose last word is to be guessed (spec: tasks, sections 8 and 9)."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from megatron.core.errors import DataError
from megatron.training.utils import print_rank_0
from tasks.zeroshot_gpt.detokenizer import get_detokenizer


def build_dataset(task: str, args: Namespace, tokenizer: Any) -> LMDataset | LambadaDataset:
    """The samples of WIKITEXT103 or LAMBADA from the one file of `--valid-data`."""
    [path] = args.valid_data
    if task == "LAMBADA":
        return LambadaDataset(path, tokenizer.eod, tokenizer, args.seq_length, args.strict_lambada)
    with open(path, encoding="utf-8") as file:
        text = file.read()
    original = len(text.strip().split(" "))
    tokens = tokenizer.tokenize(get_detokenizer(path)(text))
    if len(tokens) < 2 or original < 2:
        raise DataError(path, "it holds less than two words", "give the file of a test set")
    print_rank_0(f" > number of original tokens: {original}, number of detokenized tokens: {len(tokens)}")
    return LMDataset(tokens, args.seq_length, tokenizer.eod, original, len(tokens), args.overlapping_eval)


class LMDataset(Dataset):
    """Windows of `seq_len` tokens and their successors; the mask counts each prediction in one window.

    `overlapping_eval` is how far the window moves: predictions beyond it have at least seq_len minus that many tokens to
    look back on.
    """

    def __init__(
        self,
        tokens: list[int],
        seq_len: int,
        pad_idx: int,
        num_original_tokens: int,
        num_tokenized_tokens: int,
        overlapping_eval: int | None = None,
    ) -> None:
        self.tokens = tokens
        self.seq_len = seq_len
        self.pad_idx = pad_idx
        self.overlapping_eval = max(1, seq_len if overlapping_eval is None else overlapping_eval)
        self.num_original_tokens = num_original_tokens
        self.num_tokenized_tokens = num_tokenized_tokens
        beyond_first = max(len(tokens) - 1 - self.overlapping_eval, 0)
        self.total_sequences = max(math.ceil(beyond_first / self.overlapping_eval) + 1, 1)

    def __len__(self) -> int:
        return self.total_sequences

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start = index * self.overlapping_eval
        tokens = self.tokens[start : start + self.seq_len + 1]
        mask = np.zeros(self.seq_len, dtype=np.int64)
        mask[: len(tokens) - 1] = 1
        if index > 0 and self.overlapping_eval != self.seq_len:
            mask[: -self.overlapping_eval] = 0
        tokens = tokens + [self.pad_idx] * (self.seq_len + 1 - len(tokens))
        return {"text": np.array(tokens, dtype=np.int64), "pad_mask": mask}


class LambadaDataset(Dataset):
    """Texts of which the last token, or with `strict` the last word, is to be guessed (Paperno et al. 2016)."""

    def __init__(self, path: str, pad_idx: int, tokenizer: Any, seq_len: int, strict: bool = False) -> None:
        print_rank_0(f"> building lambada dataset from {path} ...")
        self.pad_idx = pad_idx
        self.seq_len = seq_len
        self.tokenizer = tokenizer
        self.strict = strict
        self.tokens: list[list[int]] = []
        self.labels: list[list[int]] = []
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                place = f"{path}, line {number}"
                try:
                    text = json.loads(line)["text"]
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(
                        place, "it is no JSON with a text", "give one such object per line"
                    ) from error
                context, label = self.get_tokens(text)
                if not context or not label:
                    raise DataError(place, "nothing is left before its last word", "leave the line out")
                if len(context) + len(label) > seq_len + 1:
                    why = (
                        f"its {len(context) + len(label)} tokens are more than --seq-length {seq_len} allows"
                    )
                    raise DataError(place, why, "raise --seq-length")
                self.tokens.append(context)
                self.labels.append(label)
        print_rank_0(f" >> found {len(self.tokens)} samples.")

    def get_tokens(self, text: str) -> tuple[list[int], list[int]]:
        """What is given of a text and what is to be guessed."""
        if not self.strict:
            tokens = self.tokenizer.tokenize(text)
            return tokens[:-1], tokens[-1:]
        last_word = text.split()[-1] if text.strip() else ""
        given = text[: text.rfind(last_word)].strip()
        return self.tokenizer.tokenize(given), self.tokenizer.tokenize(" " + last_word)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        context, label = self.tokens[index], self.labels[index]
        tokens = context + label
        mask = np.zeros(self.seq_len, dtype=np.int64)
        mask[len(context) - 1 : len(tokens) - 1] = 1  # of the predictions: one before the tokens themselves
        tokens = tokens + [self.pad_idx] * (self.seq_len + 1 - len(tokens))
        return {"text": np.array(tokens, dtype=np.int64), "pad_mask": mask}
