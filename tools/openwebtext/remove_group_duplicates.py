"""Keep one document of each group: `python tools/openwebtext/remove_group_duplicates.py GROUPS DATA OUT`.

GROUPS is what group_duplicate_url.py writes; the first member of a group stays. Lines of DATA that are no documents are
reported and left out. Memory holds the URLs to remove.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from loose_json import LineError, dump, parse, read_lines, run, text_of, writing

PROGRESS_DOCUMENTS = 10_000


def urls_to_remove(path: str) -> set[str]:
    """All members of all groups but the first ones."""
    urls: set[str] = set()
    for line in read_lines(path):
        for members in parse(line).values():
            if not isinstance(members, list) or not all(isinstance(url, str) for url in members):
                raise LineError(line.place, "not {group: [urls]}", "give what group_duplicate_url.py writes")
            urls.update(members[1:])
    return urls


def main() -> None:
    """Remove as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("groups", metavar="GROUPS", help="groups of near-duplicates")
    parser.add_argument("data", metavar="DATA", help="loose JSON")
    parser.add_argument("output", metavar="OUT", help="what is left of it")
    args = parser.parse_args()
    urls = urls_to_remove(args.groups)
    print(f"will be removing {len(urls)} urls", flush=True)
    start = time.time()
    written = removed = removed_chars = 0

    def report() -> None:
        print(
            f" [PROCESSED] time (s): {time.time() - start:.2f} | written: {written} | removed: {removed}"
            f" (char: {removed_chars})",
            flush=True,
        )

    with writing(args.output) as output:
        for line in read_lines(args.data):
            try:
                document = parse(line)
                url = text_of(document, "url", line)
                characters = len(text_of(document, "text", line)) if url in urls else 0
            except LineError as error:
                print(f"[SKIPPING] {error}", flush=True)
                continue
            if url in urls:
                print(f"removing {url}")
                removed += 1
                removed_chars += characters
                continue
            output.write(dump(document))
            written += 1
            if written % PROGRESS_DOCUMENTS == 0:
                report()
    report()


if __name__ == "__main__":
    run(main)
