"""Cut evaluation texts out of training data: `filter_ngrams.py --tasks TASK .. --dedup-dataset FILE KEY --output OUT`.

First pass: counts in how many documents each n-gram of the tasks occurs; those in --key-threshold documents or more are
ordinary phrases and are left alone. Second pass: cuts the others out, with --remove-char-each-side characters and the rest
of the sentence on both sides, and writes the pieces with a `split_id`. A document of more than --splits-count pieces is
dropped. Memory holds the tasks' n-grams. Tasks other than lambada are loaded with the `datasets` package.
"""

from __future__ import annotations

import argparse
import os
import pickle
import sys
from collections import Counter
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from loose_json import (
    CorpusError,
    Line,
    UsageError,
    chunks,
    dump,
    ordered_map,
    parse,
    read_lines,
    read_pickle,
    run,
    text_of,
    writing,
)
from ngram_tasks import TASKS, texts_of
from ngrams import Ngrams, Splitter, ngrams_of


class OccurrenceCounter:
    """A chunk of lines -> in how many of them each n-gram occurs."""

    def __init__(self, ngrams: Ngrams, key: str) -> None:
        self.ngrams, self.key = ngrams, key

    def __call__(self, lines: list[Line]) -> Counter[str]:
        counts: Counter[str] = Counter()
        for line in lines:
            counts.update(self.ngrams.occurring(text_of(parse(line), self.key, line)))
        return counts


class DocumentSplitter:
    """A chunk of lines -> each document, and the pieces that are left of its text."""

    def __init__(self, splitter: Splitter, key: str) -> None:
        self.splitter, self.key = splitter, key

    def __call__(self, lines: list[Line]) -> list[tuple[dict[str, Any], list[str]]]:
        documents = [(parse(line), line) for line in lines]
        return [(found, self.splitter.pieces(text_of(found, self.key, line))) for found, line in documents]


def dictionary_of_tasks(args: argparse.Namespace) -> dict[str, int]:
    """The n-grams of all tasks in the order of their texts, with count 0."""
    dictionary: dict[str, int] = {}
    for task in args.tasks:
        print(f" Task: {task}", flush=True)
        for text in texts_of(task, args.lambada_path):
            found = ngrams_of(text, args.min_ngram_size, args.max_ngram_size)
            dictionary.update(dict.fromkeys(found, 0))
    print(f" Entities in ngrams {len(dictionary)}", flush=True)
    return dictionary


def describe(ngrams: Ngrams) -> None:
    """How many n-grams there are of each size."""
    sizes = sorted(ngrams.sizes.items())
    print(f" Ngram frequencies: {sizes}")
    shortest, longest = (sizes[0][0], sizes[-1][0]) if sizes else (0, 0)
    print(
        f" Entities in ngrams {len(ngrams.ngrams)} min_ngram_size {shortest} max_ngram_size {longest}",
        flush=True,
    )


def rare_ngrams(args: argparse.Namespace) -> dict[str, int]:
    """The n-grams of the tasks that occur in fewer documents than --key-threshold, with their counts."""
    counts = dictionary_of_tasks(args)
    ngrams = Ngrams(counts, args.max_ngram_size)
    describe(ngrams)
    path, key = args.dedup_dataset
    for more in ordered_map(OccurrenceCounter, (ngrams, key), chunks(read_lines(path)), args.num_threads):
        for ngram, count in more.items():
            counts[ngram] += count
    rare = {ngram: count for ngram, count in counts.items() if count < args.key_threshold}
    for ngram, count in rare.items():
        print(f" [threshold] {ngram} {count}")
    print(f" Ngrams below threshold {len(rare)}", flush=True)
    return rare


def load_dictionary(path: str) -> list[str]:
    """The n-grams that an earlier run kept."""
    kept = read_pickle(path)
    if not isinstance(kept, (dict, set, frozenset, list, tuple)) or not all(isinstance(n, str) for n in kept):
        raise CorpusError(path, "it holds no n-grams", "give what --save-dictionary wrote")
    print(f" Loaded {len(kept)} ngrams from {path}", flush=True)
    return list(kept)


def clean(args: argparse.Namespace, ngrams: Ngrams) -> None:
    """Write what is left of each document."""
    path, key = args.dedup_dataset
    splitter = Splitter(ngrams, args.remove_char_each_side, args.filter_text_char_len)
    names = "-".join(args.tasks)
    total = split = ignored = dropped = trimmed = 0
    results = ordered_map(DocumentSplitter, (splitter, key), chunks(read_lines(path)), args.num_threads)
    with writing(args.output) as output:
        for documents in results:
            for document, pieces in documents:
                total += 1
                split += len(pieces) > 1
                ignored += not pieces
                trimmed += len(pieces) == 1 and len(pieces[0]) < len(document[key])
                if len(pieces) > args.splits_count:
                    dropped += 1
                    continue
                old = f"{document['split_id']}-" if "split_id" in document else ""
                for number, piece in enumerate(pieces):
                    split_id = f"{old}{names}-{total:010d}-{number:04d}"
                    output.write(dump({**document, key: piece, "split_id": split_id}))
    print(
        f" Total docs {total} splitted {split} ignored {ignored} splits > theshold {dropped} trimmed {trimmed}",
        flush=True,
    )


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="*", required=True, help=", ".join(TASKS))
    parser.add_argument("--lambada-path", help="LAMBADA as loose JSON")
    parser.add_argument("--dedup-dataset", nargs="*", help="loose JSON, and the key of its texts")
    parser.add_argument("--output", help="what is left of it")
    parser.add_argument(
        "--num-threads", type=int, default=40, help="processes; never more than there are cores"
    )
    parser.add_argument("--max-ngram-size", type=int, default=13, help="words of an n-gram")
    parser.add_argument(
        "--min-ngram-size", type=int, default=8, help="words of the shortest task text to look for"
    )
    parser.add_argument(
        "--filter-text-char-len", type=int, default=200, help="pieces up to this length are dropped"
    )
    parser.add_argument(
        "--key-threshold", type=int, default=10, help="documents that make an n-gram ordinary"
    )
    parser.add_argument("--save-dictionary", help="keep the n-grams that are looked for in this file")
    parser.add_argument("--load-dictionary", help="look for those of an earlier run, without counting")
    parser.add_argument("--splits-count", type=int, default=10, help="most pieces of a document")
    parser.add_argument(
        "--remove-char-each-side", type=int, default=200, help="characters to cut beside an n-gram"
    )
    args = parser.parse_args()
    unknown = [task for task in args.tasks if task not in TASKS]
    if unknown or not args.tasks:
        why = f"no such task: {' '.join(unknown)}" if unknown else "none is given"
        raise UsageError("--tasks", why, f"give some of {', '.join(TASKS)}")
    if "lambada" in args.tasks and args.lambada_path is None and args.load_dictionary is None:
        raise UsageError("--lambada-path", "the task lambada is read from a file", "name it")
    if len(args.dedup_dataset or ()) != 2:
        raise UsageError("--dedup-dataset", "a file and the key of its texts are wanted", "give FILE KEY")
    if not 1 <= args.min_ngram_size <= args.max_ngram_size:
        sizes = f"{args.min_ngram_size} and {args.max_ngram_size}"
        raise UsageError(
            "--min-ngram-size, --max-ngram-size",
            f"{sizes} are no bounds of a size",
            "give 1 or more, in order",
        )
    if args.output is None and args.save_dictionary is None:
        raise UsageError("--output", "nothing would be written", "add it, or --save-dictionary")
    return args


def main() -> None:
    """Count and cut as the command line says."""
    args = parse_args()
    rare = load_dictionary(args.load_dictionary) if args.load_dictionary else rare_ngrams(args)
    if args.save_dictionary:
        with writing(args.save_dictionary) as file:
            pickle.dump(rare, file, protocol=4)
    if args.output:
        ngrams = Ngrams(rare, args.max_ngram_size)
        describe(ngrams)
        clean(args, ngrams)


if __name__ == "__main__":
    run(main)
