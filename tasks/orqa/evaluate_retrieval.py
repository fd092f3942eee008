#!/usr/bin/env python3
"""How often an answer is among the first K passages: `python tasks/orqa/evaluate_retrieval.py --retrieved FILE`.

FILE holds what a retriever found in the form of DPR, `{"question": .., "answers": [..], "ctxs": [{"text": ..}, ..]}` with
the best passage first, as a JSON list or one object in each line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron.core.errors import DataError, FlagError
from megatron.training.cli import run_main
from tasks.orqa.answers import has_answer


def questions_in(path: str) -> Iterator[tuple[list[str], list[str]]]:
    """(answers, passages) of each question."""
    for place, question in _objects_in(path):
        try:
            answers, passages = question["answers"], [passage["text"] for passage in question["ctxs"]]
        except (KeyError, TypeError) as error:
            raise DataError(
                place, f"not a question with answers and ctxs ({error!r})", "see --help"
            ) from error
        if not isinstance(answers, list) or not all(isinstance(text, str) for text in answers + passages):
            raise DataError(place, "its answers or passages are no lists of texts", "see --help")
        yield answers, passages


def _objects_in(path: str) -> Iterator[tuple[str, Any]]:
    """(place, JSON value) of each question."""
    with open(path, "rb") as file:
        if file.read(1) == b"[":
            file.seek(0)
            for number, question in enumerate(_parse(file.read(), path)):
                yield f"{path}: question {number}", question
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", _parse(line, f"{path}:{number}")


def _parse(data: bytes, place: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:
        raise DataError(place, f"not JSON: {error}", "see --help") from error


def cumulative_hits(path: str, match_type: str) -> tuple[list[int], int]:
    """(questions answered by their first k passages for k = 1, 2, .., number of questions)."""
    first: list[int] = []
    longest = total = 0
    for answers, passages in questions_in(path):
        total += 1
        longest = max(longest, len(passages))
        found = (rank for rank, text in enumerate(passages) if has_answer(answers, text, match_type))
        rank = next(found, None)
        first += [] if rank is None else [rank]
    return [sum(rank <= k for rank in first) for k in range(longest)], total


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--retrieved", required=True, help="questions, answers and the passages found")
    parser.add_argument(
        "--faiss-match", choices=("regex", "string"), default="string", help="how answers are compared"
    )
    parser.add_argument(
        "--topk", type=int, nargs="+", default=[1, 5, 20, 100], help="numbers of passages to report on"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    """Print the hits within the first 1, 2, .. passages, their shares, and the shares that --topk asks for."""
    args = build_parser().parse_args(argv)
    if min(args.topk) < 1:
        raise FlagError("--topk", f"{min(args.topk)} passages answer nothing", "give 1 or more")
    hits, total = cumulative_hits(args.retrieved, args.faiss_match)
    if not hits:
        raise DataError(args.retrieved, "it holds no passages", "see --help")
    print(f"top k documents hits {hits}")
    print(f"top k documents hits accuracy {[hit / total for hit in hits]}")
    for k in args.topk:
        print(f"top-{k}: {100 * hits[min(k, len(hits)) - 1] / total:.2f}")


if __name__ == "__main__":
    run_main(main)
