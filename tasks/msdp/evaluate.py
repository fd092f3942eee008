"""F1 of generated knowledge or responses against references."""

from __future__ import annotations

from megatron.core.errors import DataError
from tasks.msdp.metrics import F1Metric
from tasks.msdp.text import END_OF_DOCUMENT, NO_KNOWLEDGE, read_lines


def evaluate_f1(guess_file: str, answer_file: str) -> tuple[float, float, float]:
    """Precision, recall and F1 of a line of `guess_file` for each line of `answer_file`; printed too."""
    guesses = [line.strip().replace(END_OF_DOCUMENT, "") for line in read_lines(guess_file)]
    answers = [line.strip() for line in read_lines(answer_file)]
    answers = ["" if answer == NO_KNOWLEDGE else answer for answer in answers]
    try:
        precision, recall, f1 = F1Metric.compute_all_pairs(guesses, answers)
    except ValueError as error:
        raise DataError(
            f"{guess_file}, {answer_file}",
            str(error),
            "give the generated lines and the references of one file",
        ) from error
    print(f"Precision: {precision:.4f}; recall: {recall:.4f}; f1: {f1:.4f}")
    print("done :-)", flush=True)
    return precision, recall, f1
