"""How many words a generated text shares with the one that was wanted."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

_MARKS = str.maketrans(dict.fromkeys(string.punctuation, " "))
_ARTICLES = re.compile(r"\b(a|an|the)\b")

#: Precision, recall and their harmonic mean; nothing where there is no answer to compare with.
Scores = tuple[float, float, float] | tuple[None, None, None]


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_MARKS)).split())


class F1Metric:
    """F1 of bags of words."""

    @staticmethod
    def compute_each_pair(guess: str, answer: str) -> Scores:
        """Scores of one guess: 0 for an empty one, nothing for an empty answer."""
        if not answer:
            return None, None, None
        guessed, wanted = normalize_answer(guess).split(), normalize_answer(answer).split()
        common = sum((Counter(guessed) & Counter(wanted)).values())
        if not common:
            return 0, 0, 0
        precision, recall = common / len(guessed), common / len(wanted)
        return precision, recall, 2 * precision * recall / (precision + recall)

    @staticmethod
    def compute_all_pairs(guesses: Sequence[str], answers: Sequence[str]) -> tuple[float, float, float]:
        """Means over the answers that are not empty. ValueError where there is none, or not one guess for each."""
        if len(guesses) != len(answers):
            raise ValueError(f"{len(guesses)} guesses for {len(answers)} answers")
        scores = [F1Metric.compute_each_pair(guess, answer) for guess, answer in zip(guesses, answers)]
        counted = [score for score in scores if score[0] is not None]
        if not counted:
            raise ValueError("all answers are empty")
        precision, recall, f1 = np.mean(counted, axis=0).tolist()
        return precision, recall, f1
