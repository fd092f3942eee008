"""Number documents: `python tools/openwebtext/add_id.py --input-file IN --output-file OUT --id-prefix cc`.

Adds `adlr_id`, the prefix and the document's number from 1, to each object of loose JSON.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from loose_json import UsageError, dump, parse, read_lines, run, writing


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input-file", help="loose JSON")
    parser.add_argument("--output-file", help="the same with ids")
    parser.add_argument("--id-prefix", help="what the ids begin with")
    parser.add_argument("--log-interval", type=int, default=100, help="documents between two progress lines")
    args = parser.parse_args()
    for name in ("input_file", "output_file", "id_prefix"):
        if getattr(args, name) is None:
            raise UsageError(f"--{name.replace('_', '-')}", "it is not given", "add it")
    if args.log_interval < 1:
        raise UsageError("--log-interval", f"{args.log_interval} is no number of documents", "give 1 or more")
    return args


def main() -> None:
    """Number as the command line says."""
    args = parse_args()
    start, count = time.time(), 0
    with writing(args.output_file) as output:
        for count, line in enumerate(read_lines(args.input_file), 1):
            output.write(dump({**parse(line), "adlr_id": f"{args.id_prefix}-{count:010d}"}))
            if count % args.log_interval == 0:
                print(
                    f"    processed {count:9d} documents in {time.time() - start:.2f} seconds ...", flush=True
                )
    print(f"done: {count} documents have an id", flush=True)


if __name__ == "__main__":
    run(main)
