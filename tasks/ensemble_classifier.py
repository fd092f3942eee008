#!/usr/bin/env python3
"""Average the predictions of several finetuned classifiers: `python tasks/ensemble_classifier.py --paths RUN RUN ...`.

Each RUN is a directory with predictions as an evaluation of `tasks/main.py` (`--epochs 0`) writes them, under the name
`--prediction-name`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from megatron.core.errors import DataError, FlagError
from megatron.training.cli import run_main


@dataclass
class Votes:
    """A data set's probabilities [n, classes], summed over runs, with labels and ids."""

    probabilities: np.ndarray
    labels: np.ndarray
    uids: list[int]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--paths", nargs="+", required=True, help="directories of the runs")
    parser.add_argument(
        "--eval", action="store_true", help="print accuracies; the predictions must hold the labels"
    )
    parser.add_argument("--outdir", help="where to write a table of ids and classes for each data set")
    parser.add_argument(
        "--prediction-name", default="test_predictions.pt", help="file to read in each directory"
    )
    parser.add_argument(
        "--calc-threshold", action="store_true", help="two classes: find the best threshold of each data set"
    )
    parser.add_argument(
        "--one-threshold", action="store_true", help="with --calc-threshold: one for all data sets"
    )
    parser.add_argument(
        "--threshold",
        nargs="+",
        type=float,
        help="two classes: smallest probability of the last one, by data set",
    )
    parser.add_argument("--labels", nargs="+", help="names of the classes; else their numbers")
    return parser.parse_args(argv)


def read(paths: list[str], name: str) -> dict[str, Votes]:
    """Sums over the runs that can be read; others are named. DataError if runs are about different samples."""
    votes: dict[str, Votes] = {}
    for path in paths:
        try:
            stored = torch.load(Path(path) / name, weights_only=True)
        except (OSError, RuntimeError, ValueError) as error:
            print(error)
            continue
        for dataset, (probabilities, labels, uids) in stored:
            own = Votes(np.array(probabilities, dtype=np.float64), np.array(labels), list(uids))
            known = votes.setdefault(dataset, own)
            if known is own:
                continue
            if known.uids != own.uids or known.probabilities.shape != own.probabilities.shape:
                raise DataError(
                    f"{path}/{name}",
                    f"its samples of {dataset} are not those of the runs before",
                    "name runs of one task",
                )
            known.probabilities += own.probabilities
    if not votes:
        raise DataError(
            "--paths",
            f"none of them holds a readable {name}",
            "evaluate with --epochs 0, or give --prediction-name",
        )
    for each in votes.values():
        each.probabilities /= len(paths)
    return votes


def classes(votes: Votes, threshold: float | None) -> np.ndarray:
    """The likeliest class of each sample, or with a threshold whether its last class is likely enough."""
    if threshold is None:
        return votes.probabilities.argmax(axis=-1)
    return (votes.probabilities[:, -1] >= threshold).astype(np.int64)


def accuracy(votes: list[Votes], thresholds: list[float | None]) -> float:
    """Share of right classes over some data sets."""
    right = [classes(each, threshold) == each.labels for each, threshold in zip(votes, thresholds)]
    return float(np.concatenate(right).mean())


def best_threshold(votes: list[Votes]) -> float:
    """Of 0.00, 0.01 .. 0.99 the first with the best accuracy."""
    candidates = [step / 100 for step in range(100)]
    return max(candidates, key=lambda threshold: accuracy(votes, [threshold] * len(votes)))


def thresholds_of(args: argparse.Namespace, votes: dict[str, Votes]) -> list[float | None]:
    """One threshold per data set: found, given, or none."""
    sets = list(votes.values())
    if args.one_threshold and not args.calc_threshold:
        raise FlagError("--one-threshold", "there is no threshold to find", "add --calc-threshold")
    if args.calc_threshold:
        if not args.eval:
            raise FlagError(
                "--calc-threshold", "the best threshold needs labels to compare with", "add --eval"
            )
        found = (
            [best_threshold(sets)] * len(sets) if args.one_threshold else [best_threshold([s]) for s in sets]
        )
        print("threshold", found)
        return list(found)
    if args.threshold is None:
        return [None] * len(sets)
    if len(args.threshold) != len(sets):
        why = f"{len(args.threshold)} for {len(sets)} data sets ({', '.join(votes)})"
        raise FlagError("--threshold", why, "give one for each")
    return list(args.threshold)


def write(directory: Path, name: str, votes: Votes, predicted: np.ndarray, labels: list[str]) -> None:
    """Ids and classes as `<directory>/<name>.tsv`."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = [f"{uid}\t{labels[index]}" for uid, index in zip(votes.uids, predicted)]
    partial = directory / f"{name}.tsv.partial"
    partial.write_text("\n".join(["id\tlabel", *rows]), encoding="utf-8")
    partial.replace(directory / f"{name}.tsv")


def main(argv: Sequence[str] | None = None) -> None:
    """Average, print, write."""
    args = arguments(argv)
    votes = read(args.paths, args.prediction_name)
    thresholds = thresholds_of(args, votes)
    if args.eval:
        for each, threshold in zip(votes.values(), thresholds):
            print(accuracy([each], [threshold]))
        print(accuracy(list(votes.values()), thresholds))
    if args.outdir is None:
        return
    for (name, each), threshold in zip(votes.items(), thresholds):
        count = each.probabilities.shape[1]
        labels = args.labels or [str(index) for index in range(count)]
        if len(labels) != count:
            raise FlagError("--labels", f"{len(labels)} names for {count} classes", "name each class")
        predicted = classes(each, threshold)
        write(Path(args.outdir) / name, Path(args.prediction_name).stem, each, predicted, labels)


if __name__ == "__main__":
    run_main(main)
