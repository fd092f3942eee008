"""Second cleaning pass: `cleanup_fix_dataset.py --input-files A.json ... --tasks TASK ... --output-path DIR`.

Of the tasks asked for, the first of this list that acts on a document decides on it, and no later one sees it:
remove_512              shorter than 512 characters: filtered
remove_256_javascript   shorter than 256 and speaking of JavaScript: filtered
remove_512_non_english  shorter than 512 and not English: filtered
ftfy_fix_text           its encoding is repaired; acts on every document, so general_cleaning needs a run of its own
general_cleaning        runs of spaces, and of line ends after a word, become one space; acts on every document
Writes NAME_cleaned.EXT and NAME_filtered.EXT for each NAME.EXT. A line that cannot be processed is reported and filtered.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections import Counter

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from cleaning import fix_text, is_english
from loose_json import (
    Line,
    LineError,
    UsageError,
    chunks,
    dump,
    ordered_map,
    parse,
    read_lines,
    run,
    text_of,
    writing,
)

TASKS = ("remove_512", "remove_256_javascript", "remove_512_non_english", "ftfy_fix_text", "general_cleaning")
PROCESSES = 40
RUNS = re.compile(r" {2,}|\b\n+ ?")


def act(task: str, text: str) -> tuple[bool, str | None]:
    """(whether a task acts on a text, what the text becomes; None if the document is filtered)."""
    if task == "remove_512":
        return len(text) < 512, None
    if task == "remove_256_javascript":
        return len(text) < 256 and "javascript" in text.lower(), None
    if task == "remove_512_non_english":
        return len(text) < 512 and not is_english(text), None
    if task == "ftfy_fix_text":
        return True, fix_text(text)
    return True, RUNS.sub(" ", text)


class Fixer:
    """Fixes a chunk of lines: (whether it stays, the line to write) of each, counts by task, what to say of bad lines."""

    def __init__(self, tasks: list[str]) -> None:
        self.tasks = [task for task in TASKS if task in tasks]

    def __call__(self, lines: list[Line]) -> tuple[list[tuple[bool, bytes]], Counter[str], list[str]]:
        results: list[tuple[bool, bytes]] = []
        counts: Counter[str] = Counter()
        bad: list[str] = []
        for line in lines:
            try:
                document = parse(line)
                text = text_of(document, "text", line)
                task, fixed = self.decide(text)
            except LineError as error:
                bad.append(str(error))
                results.append((False, line.data + b"\n"))
                continue
            except ValueError as error:
                bad.append(f"{line.place}: {error}")
                results.append((False, dump(document)))
                continue
            counts[task] += task != ""
            results.append(
                (fixed is not None, dump(document if fixed is None else {**document, "text": fixed}))
            )
        return results, counts, bad

    def decide(self, text: str) -> tuple[str, str | None]:
        """(the task that acts, or "", and what the text becomes; None if the document is filtered)."""
        for task in self.tasks:
            acts, fixed = act(task, text)
            if acts:
                return task, fixed
        return "", text


def fix_file(path: str, args: argparse.Namespace) -> None:
    """Divide one file into its cleaned and its filtered documents."""
    stem, extension = os.path.splitext(os.path.basename(path))
    names = [os.path.join(args.output_path, f"{stem}_{kind}{extension}") for kind in ("cleaned", "filtered")]
    print(f" > working on {path}", flush=True)
    start, total = time.time(), 0
    counts: Counter[str] = Counter()
    results = ordered_map(Fixer, (args.tasks,), chunks(read_lines(path), 16), PROCESSES)

    def report(label: str) -> None:
        by_task = "".join(f" {task} {counts[task]}" for task in TASKS)
        print(f"  >> {label}: {total}{by_task}", flush=True)

    with writing(names[0]) as cleaned, writing(names[1]) as filtered:
        for documents, more, bad in results:
            for reason in bad:
                print(f"  filtering {reason}", flush=True)
            for stays, data in documents:
                (cleaned if stays else filtered).write(data)
            before = total // args.log_interval
            total += len(documents)
            counts.update(more)
            if total // args.log_interval > before:
                report(f"{time.time() - start:.2f} s, docs")
    report("total docs")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input-files", nargs="*", required=True, help="loose JSON")
    parser.add_argument("--tasks", nargs="*", required=True, help=", ".join(TASKS))
    parser.add_argument("--output-path", help="directory of the results")
    parser.add_argument("--log-interval", type=int, default=100, help="documents between two progress lines")
    args = parser.parse_args()
    unknown = [task for task in args.tasks if task not in TASKS]
    if unknown or not args.tasks:
        raise UsageError(
            "--tasks", f"no such task: {' '.join(unknown) or 'none given'}", f"give {', '.join(TASKS)}"
        )
    if not args.input_files:
        raise UsageError("--input-files", "there is nothing to clean", "name a file")
    if args.output_path is None:
        raise UsageError("--output-path", "it is not given", "add the directory of the results")
    names = [os.path.basename(path) for path in args.input_files]
    if len(set(names)) < len(names):
        raise UsageError(
            "--input-files", "two of them have one name, and so would their results", "rename one"
        )
    if args.log_interval < 1:
        raise UsageError("--log-interval", f"{args.log_interval} is no number of documents", "give 1 or more")
    return args


def main() -> None:
    """Clean every file as the command line says."""
    args = parse_args()
    for path in args.input_files:
        fix_file(path, args)


if __name__ == "__main__":
    run(main)
