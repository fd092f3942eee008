"""Find near-duplicates: `python tools/openwebtext/find_duplicates.py --inputs A.json url B.json id --output PAIRS`.

Each file comes with the key of its documents' ids; texts are under `text`. Documents whose MinHashes agree in a band share a
bucket; there random ones are compared with all others by the Jaccard similarity of their 5-character substrings. Those more
than half alike are written, a line `{main: [{other: similarity}, ...]}` for each main document.
Memory holds about 20 + 8 x --num-bands bytes per document; texts are read again where they are compared. --save-fingerprints
keeps fingerprints and where the texts are, not the texts: the files must stay.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import sys
import time
from collections.abc import Iterator

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import fingerprints
from fingerprints import Family, Fingerprints, Place, Reader
from loose_json import UsageError, chunks, cores, dump, ordered_map, run, writing
from minhash import buckets

SHINGLE_CHARACTERS = 5
SIMILAR = 0.5
BUCKETS_AT_A_TIME = 16
CACHED_TEXTS = 128

Pairs = list[tuple[str, list[dict[str, float]]]]


def shingles(text: str) -> set[str]:
    """The substrings of 5 characters; the last possible one does not count, as ever."""
    return {text[i : i + SHINGLE_CHARACTERS] for i in range(len(text) - SHINGLE_CHARACTERS)}


def jaccard(one: set[str], other: set[str], kind: str) -> float:
    """Common shingles over those of both (`union`), of the smaller (`min`) or the larger set (`max`); 0 if one is empty."""
    if not one or not other:
        return 0.0
    common = len(one & other)
    if kind == "union":
        return common / (len(one) + len(other) - common)
    return common / (min if kind == "min" else max)(len(one), len(other))


class Comparer:
    """Compares within buckets, (seed of the choice of main documents, places) each -> main ids with what is like them."""

    def __init__(self, kind: str, iterations: int) -> None:
        self.kind, self.iterations = kind, iterations
        reader = Reader()

        @functools.lru_cache(maxsize=CACHED_TEXTS)
        def read(place: Place) -> tuple[str, set[str]]:
            identity, text = reader.read(place)
            return identity, shingles(text)

        self.read = read

    def __call__(self, items: list[tuple[int, list[Place]]]) -> Pairs:
        return [pair for seed, bucket in items for pair in self.compare(bucket, random.Random(seed))]

    def compare(
        self, bucket: list[Place], choice: random.Random
    ) -> Iterator[tuple[str, list[dict[str, float]]]]:
        """Main documents in turn, each with what is like it, which is not compared again."""
        left = list(bucket)
        iterations = self.iterations
        while len(left) > 1 and iterations != 0:
            iterations -= 1
            main, own = self.read(left.pop(choice.randrange(len(left))))
            hits: list[dict[str, float]] = []
            others = []
            for place in left:
                other, theirs = self.read(place)
                similarity = jaccard(own, theirs, self.kind)
                if similarity > SIMILAR:
                    hits.append({other: similarity})
                else:
                    others.append(place)
            left = others
            if hits:
                yield main, hits


def buckets_of(prints: Fingerprints) -> Iterator[tuple[int, list[Place]]]:
    """The buckets of all bands, each with a seed of its own."""
    number = prints.family.seed
    for band in range(prints.family.num_bands):
        for members in buckets(prints.keys[:, band]):
            number += 1
            yield number, list(fingerprints.bucket_places(prints, members))


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the hash functions and the main documents")
    parser.add_argument("--inputs", nargs="*", help="files, each followed by the key of its ids")
    parser.add_argument("--load-fingerprints", nargs="*", help="files that --save-fingerprints wrote")
    parser.add_argument("--save-fingerprints", help="keep the fingerprints of all documents in this file")
    parser.add_argument("--output", help="file of the near-duplicates")
    parser.add_argument(
        "--jaccard", default="union", choices=["union", "min", "max"], help="kind of similarity"
    )
    parser.add_argument(
        "--heuristic-iter",
        type=int,
        default=1,
        help="main documents of a bucket; -1: compare until nothing is left",
    )
    parser.add_argument("--num-bands", type=int, default=10, help="bands of a fingerprint")
    parser.add_argument("--num-seeds", type=int, default=100, help="hashes of a fingerprint")
    parser.add_argument("--jaccard-parallel", action="store_true", help="compare buckets on all cores")
    args = parser.parse_args()
    if not args.inputs and not args.load_fingerprints:
        raise UsageError("--inputs", "there are no documents", "give files with the keys of their ids")
    if len(args.inputs or ()) % 2:
        raise UsageError("--inputs", "a file is without its key", "give FILE KEY FILE KEY ...")
    if min(args.num_bands, args.num_seeds) < 1 or args.num_seeds % args.num_bands:
        raise UsageError(
            "--num-seeds, --num-bands",
            f"{args.num_seeds} hashes do not divide into {args.num_bands} bands",
            "give a multiple",
        )
    if not args.output and not args.save_fingerprints:
        raise UsageError("--output", "nothing would be written", "add it, or --save-fingerprints")
    return args


def gather(args: argparse.Namespace) -> Fingerprints:
    """All fingerprints that the command line names, loaded and computed."""
    family = Family(args.num_seeds, args.num_bands, args.seed)
    parts = []
    for path in args.load_fingerprints or ():
        print(f"Loading fingerprints from pickle file {path}", flush=True)
        parts.append(fingerprints.load(path, family))
    if args.inputs:
        print("Computing fingerprints", flush=True)
        start = time.time()
        inputs = list(zip(args.inputs[::2], args.inputs[1::2]))
        parts.append(fingerprints.compute(inputs, family))
        print(f" {len(parts[-1].file)} fingerprints in {time.time() - start:.2f} seconds", flush=True)
    every = fingerprints.join(parts)
    distinct = every.distinct()
    if len(distinct.file) < len(every.file):
        print(
            f" {len(every.file) - len(distinct.file)} documents have the id of another one and are left out"
        )
    return distinct


def main() -> None:
    """Compute, keep and compare as the command line says."""
    args = parse_args()
    prints = gather(args)
    if args.save_fingerprints:
        with writing(args.save_fingerprints) as file:
            fingerprints.save(prints, file)
        print(f"Saved {len(prints.file)} fingerprints in {args.save_fingerprints}", flush=True)
    if not args.output:
        return
    start = time.time()
    found = ordered_map(
        Comparer,
        (args.jaccard, args.heuristic_iter),
        chunks(buckets_of(prints), BUCKETS_AT_A_TIME),
        cores() if args.jaccard_parallel else 1,
    )
    mains = others = 0
    with writing(args.output) as output:
        for pairs in found:
            for identity, hits in pairs:
                output.write(dump({identity: hits}))
                mains += 1
                others += len(hits)
    print(
        f"{others} near-duplicates of {mains} documents, by buckets, in {time.time() - start:.2f} seconds",
        flush=True,
    )


if __name__ == "__main__":
    run(main)
