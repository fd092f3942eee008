"""Join pairs of near-duplicates into groups: `python tools/openwebtext/group_duplicate_url.py IN OUT [THRESHOLD]`.

IN is what find_duplicates.py writes. Documents that are at least THRESHOLD (0.7) similar are in one group, and groups that
share a document are one. Writes `{"index": [urls]}` for each group of two or more, first met first. Memory holds IN's URLs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from loose_json import Line, LineError, dump, parse, read_lines, run, writing


class Groups:
    """Disjoint sets of URLs, numbered in the order in which they were begun."""

    def __init__(self) -> None:
        self.group_of: dict[str, int] = {}  # as of the URL's first line; `root` says what became of it
        self.merged_into: list[int] = []

    def root(self, group: int) -> int:
        """The group that `group` is part of now."""
        while self.merged_into[group] != group:
            self.merged_into[group] = group = self.merged_into[self.merged_into[group]]
        return group

    def add(self, urls: list[str]) -> None:
        """Unite these URLs and every group that has one of them, in the group met first."""
        known = [self.root(self.group_of[url]) for url in urls if url in self.group_of]
        if not known:
            known = [len(self.merged_into)]
            self.merged_into.append(known[0])
        for group in known:
            self.merged_into[group] = known[0]
        for url in urls:
            self.group_of.setdefault(url, known[0])

    def members(self) -> dict[int, list[str]]:
        """URLs of each group of two or more, in the order in which they were met."""
        groups: dict[int, list[str]] = {}
        for url, group in self.group_of.items():
            groups.setdefault(self.root(group), []).append(url)
        return {group: groups[group] for group in sorted(groups) if len(groups[group]) > 1}


def similar_urls(line: Line, threshold: float) -> Iterator[list[str]]:
    """Per main document of a line: it and those that are at least so similar."""
    for main, others in parse(line).items():
        try:
            close = [url for other in others for url, similarity in other.items() if similarity >= threshold]
        except (AttributeError, TypeError) as error:
            raise LineError(
                line.place,
                "not {document: [{other: similarity}, ...]}",
                "give what find_duplicates.py writes",
            ) from error
        yield [main, *close]


def main() -> None:
    """Group as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", metavar="IN", help="pairs of near-duplicates")
    parser.add_argument("output", metavar="OUT", help="groups")
    parser.add_argument("threshold", metavar="THRESHOLD", nargs="?", type=float, default=0.7)
    args = parser.parse_args()
    groups = Groups()
    for line in read_lines(args.input):
        for urls in similar_urls(line, args.threshold):
            groups.add(urls)
    members = groups.members()
    with writing(args.output) as output:
        for index, urls in members.items():
            output.write(dump({str(index): urls}))
    total = sum(map(len, members.values()))
    print(
        f"out of {total} urls, only {len(members)} are unique and {total - len(members)} should be removed",
        flush=True,
    )


if __name__ == "__main__":
    run(main)
