"""First cleaning pass: `python tools/openwebtext/cleanup_dataset.py IN OUT`.

Repairs the encoding of each text, drops texts that are not English, and texts shorter than 1024 characters that have fewer
than 128 GPT-2 tokens, end of document included. Lines that cannot be processed are reported and left out.
Tokens are counted exactly with --vocab-file and --merge-file. Without them the words and marks are counted into which GPT-2
cuts a text before it looks into its vocabulary: never more than there are tokens.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from cleaning import fix_text, is_english
from loose_json import (
    Line,
    LineError,
    UsageError,
    chunks,
    dump,
    need,
    ordered_map,
    parse,
    read_lines,
    run,
    text_of,
    writing,
)

MIN_CHARACTERS = 1024
MIN_TOKENS = 128
PROGRESS_DOCUMENTS = 100
#: How GPT-2 cuts a text before byte-pair encoding (Radford et al. 2019), in terms of Python's character classes.
PIECES = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


def token_counter(vocab_file: str | None, merge_file: str | None) -> Callable[[str], int]:
    """Text -> number of GPT-2 tokens without end of document; of pieces, where there is no vocabulary."""
    if vocab_file is None or merge_file is None:
        return lambda text: sum(1 for _ in PIECES.finditer(text))
    tokenizers = need("tokenizers", "counting tokens")
    for path in (vocab_file, merge_file):
        with open(path, "rb"):  # the library does not say which of them is missing
            pass
    encoder = tokenizers.ByteLevelBPETokenizer(vocab_file, merge_file)
    return lambda text: len(encoder.encode(text).ids)


class Cleaner:
    """Cleans a chunk of lines: the lines to write, counts by name, and what to say of those that were skipped."""

    def __init__(self, vocab_file: str | None, merge_file: str | None) -> None:
        self.count_tokens = token_counter(vocab_file, merge_file)

    def __call__(self, lines: list[Line]) -> tuple[list[bytes], Counter[str], list[str]]:
        kept: list[bytes] = []
        counts: Counter[str] = Counter()
        skipped: list[str] = []
        for line in lines:
            counts["documents"] += 1
            try:
                document = parse(line)
                text = text_of(document, "text", line)
                fixed = fix_text(text)
                counts["fixed text"] += fixed != text
                verdict = self.verdict(fixed)
            except LineError as error:
                skipped.append(str(error))
                continue
            except ValueError as error:
                skipped.append(f"{line.place}: {error}")
                continue
            if verdict is None:
                kept.append(dump({**document, "text": fixed}))
            else:
                counts[verdict] += 1
                counts[f"{verdict} chars"] += len(fixed)
        return kept, counts, skipped

    def verdict(self, text: str) -> str | None:
        """Why a text is dropped, None if it stays. Errors: ValueError where its language is not to be told."""
        if not is_english(text):
            return "non-english"
        if len(text) < MIN_CHARACTERS and self.count_tokens(text) + 1 < MIN_TOKENS:
            return "small docs"
        return None


def report(label: str, start: float, counts: Counter[str]) -> None:
    """The counters in one line."""
    names = ("documents", "fixed text", "non-english", "non-english chars", "small docs", "small docs chars")
    values = "".join(f" | {name}: {counts[name]}" for name in names)
    print(f"[{label}] | elapsed time: {time.time() - start:.2f}{values}", flush=True)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", metavar="IN", help="loose JSON")
    parser.add_argument("output", metavar="OUT", help="what is left of it")
    parser.add_argument("--vocab-file", help="GPT-2's vocabulary (JSON), to count its tokens exactly")
    parser.add_argument("--merge-file", help="its merges")
    parser.add_argument("--workers", type=int, default=1, help="processes that clean")
    args = parser.parse_args()
    if (args.vocab_file is None) != (args.merge_file is None):
        raise UsageError(
            "--vocab-file, --merge-file", "one is useless without the other", "give both or none"
        )
    return args


def main() -> None:
    """Clean as the command line says."""
    args = parse_args()
    start = time.time()
    counts: Counter[str] = Counter()
    cleaned = ordered_map(
        Cleaner, (args.vocab_file, args.merge_file), chunks(read_lines(args.input), 16), args.workers
    )
    with writing(args.output) as output:
        for kept, more, skipped in cleaned:
            for reason in skipped:
                print(f"    skipping {reason}", flush=True)
            output.writelines(kept)
            before = counts["documents"] // PROGRESS_DOCUMENTS
            counts.update(more)
            if counts["documents"] // PROGRESS_DOCUMENTS > before:
                report("PROGRESS", start, counts)
    report("FINAL", start, counts)


if __name__ == "__main__":
    run(main)
