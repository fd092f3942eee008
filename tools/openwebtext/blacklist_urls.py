"""Drop URLs that lead to no text: `python tools/openwebtext/blacklist_urls.py DIRECTORY OUTPUT`.

Reads DIRECTORY/*.txt, a URL per line, and writes those that are left in the order of reading. The first rule that applies
rejects a URL: a blacklisted domain, a blacklisted extension, too short, malformed, seen before. Memory holds the URLs kept.
"""

from __future__ import annotations

import argparse
import functools
import glob
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from loose_json import CorpusError, need, run, writing

SHORTEST = 9
PROGRESS_LINES = 100_000
#: Tags of the rules as they are printed, in the order of the rules, with what the counters call them.
RULES = {
    "DOMAIN BLACKLIST": "domain blacklisted",
    "EXTENTION BLACKLIST": "extention blacklisted",
    "SHORT URL": f"short urls (<={SHORTEST - 1})",
    "MALFORMED URL": "malformed urls",
    "DUPLICATE URL": "duplicate urls",
}
WELL_FORMED = re.compile(
    r"""
    [Hh][Tt][Tt][Pp][Ss]?://
    (?: (?: [A-Za-z0-9] (?: [A-Za-z0-9-]{0,61} [A-Za-z0-9] )? \. )+  # labels of a name
        [A-Za-z0-9-]{2,} \.?                                         # its last label
      | [0-9]{1,3} (?: \. [0-9]{1,3} ){3} )                          # or an address
    (?: : [0-9]+ )?
    (?: /? | [/?] [^\s\udc80-\udcff]+ )                             # those stand for bytes that are not UTF-8
    """,
    re.VERBOSE,
)


@functools.cache
def blacklists() -> tuple[frozenset[str], tuple[str, ...]]:
    """(labels of registered domains, extensions) of url_blacklist.json."""
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "url_blacklist.json"), "rb") as file:
        lists = json.load(file)
    return frozenset(lists["domains"]), tuple(lists["extensions"])


@functools.cache
def domain_parser() -> Callable[[str], str]:
    """URL -> label of its registered domain, such as `amazon` of https://www.amazon.co.jp/x."""
    tldextract = need("tldextract", "finding the domain of a URL")
    # The list of public suffixes that comes with the package: nothing is fetched, nothing is cached.
    extract = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)
    return lambda url: extract(url).domain.lower()


def first_rule(url: str, kept: set[str]) -> str | None:
    """The tag of the first rule that rejects a URL, None if it may stay."""
    domains, extensions = blacklists()
    if domain_parser()(url) in domains:
        return "DOMAIN BLACKLIST"
    if url.partition("?")[0].lower().endswith(extensions):
        return "EXTENTION BLACKLIST"
    if len(url) < SHORTEST:
        return "SHORT URL"
    if not WELL_FORMED.fullmatch(url):
        return "MALFORMED URL"
    return "DUPLICATE URL" if url in kept else None


def read_urls(directory: str) -> Iterator[str]:
    """The lines of DIRECTORY/*.txt without spaces around them. A URL that is not UTF-8 is malformed."""
    paths = sorted(glob.glob(os.path.join(glob.escape(directory), "*.txt")))
    if not paths:
        raise CorpusError(directory, "it holds no .txt file", "give the directory of the lists of URLs")
    for path in paths:
        with open(path, "rb") as file:
            for line in file:
                yield line.decode("utf-8", "surrogateescape").strip()


def report(label: str, start: float, total: int, rejected: Counter[str]) -> None:
    """The counters in one line."""
    counts = "".join(f" | {name}: {rejected[tag]}" for tag, name in RULES.items())
    print(
        f"{label} | time elapsed (s): {time.time() - start:.2f} | number of urls: {total}{counts}", flush=True
    )


def main() -> None:
    """Filter as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", metavar="DIRECTORY", help="where the .txt files are")
    parser.add_argument("output", metavar="OUTPUT", help="file of the URLs that are left")
    args = parser.parse_args()
    start, total = time.time(), 0
    kept: set[str] = set()
    rejected: Counter[str] = Counter()
    with writing(args.output) as output:
        for total, url in enumerate(read_urls(args.directory), 1):
            tag = first_rule(url, kept)
            if tag is None:
                kept.add(url)
                output.write(url.encode("utf-8") + b"\n")
            else:
                rejected[tag] += 1
                print(f"[{tag}]: {url}")
            if total % PROGRESS_LINES == 0:
                report("PROGRESS", start, total, rejected)
    report("FINAL", start, total, rejected)


if __name__ == "__main__":
    run(main)
