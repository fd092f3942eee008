"""Show what a pair of token files holds: documents, tokens, a sample, how long the documents are.

    python tools/inspect_data.py data/my_text_document
    python tools/inspect_data.py data/my_text_document --verify --document 7 \
        --tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy

from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.errors import DataError, FlagError
from megatron.training.cli import run_main

BAR_WIDTH = 50
MAX_BINS = 24


def main() -> None:
    """Print the report, and draw the histogram where asked."""
    args = parse()
    dataset = IndexedDataset(args.prefix, multimodal=args.multimodal, mmap="://" not in args.prefix)
    if args.verify:
        dataset.verify()
    lengths = document_lengths(dataset)
    for line in [*summary(dataset, lengths), *histogram(lengths)]:
        print(line)
    if args.verify:
        print("index: every length, offset and document boundary is consistent")
    if len(lengths):
        print_document(dataset, args.document, args.tokens, build_tokenizer(args))
    if args.histogram_png:
        draw_histogram(lengths, args.histogram_png)


def document_lengths(dataset: IndexedDataset) -> numpy.ndarray:
    """Tokens per document, int64."""
    ends = numpy.concatenate([[0], numpy.cumsum(dataset.sequence_lengths, dtype=numpy.int64)])
    return numpy.diff(ends[dataset.document_indices])


def summary(dataset: IndexedDataset, lengths: numpy.ndarray) -> list[str]:
    """Counts and sizes, one per line."""
    lines = [
        f"prefix: {dataset.path_prefix}",
        f"token type: {dataset.index.dtype}",
        f"documents: {lengths.size:,} ({int((lengths == 0).sum()):,} empty)",
        f"sequences: {len(dataset):,}",
        f"tokens: {int(lengths.sum()):,} in {dataset.index.bin_bytes:,} bytes",
    ]
    if lengths.size:
        low, median, high = (int(value) for value in numpy.percentile(lengths, [5, 50, 95]))
        lines.append(
            f"tokens per document: mean {lengths.mean():.1f}, median {median:,}, 5% {low:,}, 95% {high:,}, "
            f"longest {int(lengths.max()):,}"
        )
    unused = dataset.index.bin_bytes - int(lengths.sum()) * dataset.index.dtype.itemsize
    if unused:
        lines.append(f"warning: the last {unused:,} bytes of the .bin belong to no sequence")
    return lines


def histogram_edges(lengths: numpy.ndarray) -> numpy.ndarray:
    """Powers of two up to the longest document, after 0 and 1."""
    powers = int(numpy.ceil(numpy.log2(max(int(lengths.max(initial=1)), 1) + 1)))
    return numpy.concatenate([[0], 2 ** numpy.arange(min(powers, MAX_BINS) + 1)])


def histogram(lengths: numpy.ndarray) -> list[str]:
    """Documents per power of two of their length, as bars of text."""
    if not lengths.size:
        return []
    edges = histogram_edges(lengths)
    counts, _ = numpy.histogram(numpy.minimum(lengths, edges[-1]), bins=edges)
    lines = ["documents by length in tokens:"]
    for low, high, count in zip(edges[:-1], edges[1:], counts):
        bar = "#" * round(BAR_WIDTH * count / counts.max())
        lines.append(f"{low:>10,} to {high - 1:>10,} {count:>12,} {bar}".rstrip())
    return lines


def draw_histogram(lengths: numpy.ndarray, path: str) -> None:
    """The same as a picture."""
    try:
        import matplotlib
    except ImportError as error:
        raise FlagError("--histogram-png", "needs matplotlib", "pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    axes.hist(lengths, bins=histogram_edges(lengths))
    axes.set_xscale("symlog", base=2)
    axes.set_xlabel("tokens per document")
    axes.set_ylabel("documents")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def build_tokenizer(args: argparse.Namespace) -> Any:
    """The tokenizer that decodes the sample, or None."""
    if args.tokenizer_type is None:
        return None
    from megatron.training.tokenizer import build_tokenizer as build

    return build(args)


def print_document(dataset: IndexedDataset, document: int, count: int, tokenizer: Any) -> None:
    """The first tokens of a document, and their text if there is a tokenizer."""
    bounds = dataset.document_indices
    if not 0 <= document < bounds.size - 1:
        raise DataError(
            "--document", f"{document} is not one of {bounds.size - 1} documents", "choose a smaller number"
        )
    sequences = dataset[int(bounds[document]) : int(bounds[document + 1])]
    if dataset.multimodal:
        sequences = sequences[0]
    tokens = numpy.concatenate([*sequences, numpy.empty(0, dataset.index.dtype)])
    more = " .." if tokens.size > count else ""
    print(f"document {document}: {len(sequences)} sequences, {tokens.size:,} tokens")
    print("ids:", " ".join(map(str, tokens[:count])) + more)
    if tokenizer is not None:
        print("text:", repr(tokenizer.detokenize(tokens[:count].tolist())) + more)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "prefix", help="Path of the files without .bin and .idx; may be a URL such as s3://bucket/name"
    )
    parser.add_argument("--multimodal", action="store_true", help="The files have a mode per sequence")
    parser.add_argument("--verify", action="store_true", help="Check the whole index")
    parser.add_argument("--document", type=int, default=0, help="The document to show")
    parser.add_argument("--tokens", type=int, default=64, help="How many of its tokens to show")
    parser.add_argument("--histogram-png", help="Write the histogram of document lengths to this file")
    group = parser.add_argument_group("tokenizer, to show text")
    group.add_argument("--tokenizer-type")
    group.add_argument("--tokenizer-model")
    group.add_argument("--vocab-file")
    group.add_argument("--merge-file")
    group.add_argument("--vocab-size", type=int)
    group.add_argument("--vocab-extra-ids", type=int, default=0)
    group.add_argument("--tiktoken-pattern")
    group.add_argument("--tiktoken-num-special-tokens", type=int, default=1000)
    group.add_argument("--tiktoken-special-tokens", nargs="+")
    # What building a tokenizer reads besides: no padding is needed to show text, and no rank.
    parser.set_defaults(
        rank=1, make_vocab_size_divisible_by=1, tensor_model_parallel_size=1, padded_vocab_size=None
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_main(main)
