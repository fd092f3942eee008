"""Join files of loose JSON: `python tools/openwebtext/merge_jsons.py --json_path DIRECTORY --output_file OUT`.

Writes the lines of DIRECTORY/*.json one file after the other, in the order of the names, each checked to be an object.
"""

from __future__ import annotations

import argparse
import glob
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from loose_json import CorpusError, parse, read_lines, run, writing


def main() -> None:
    """Merge as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json_path", default=".", help="directory of the .json files")
    parser.add_argument("--output_file", default="merged_output.json", help="the merged file")
    args = parser.parse_args()
    found = sorted(glob.glob(os.path.join(glob.escape(args.json_path), "*.json")))
    # The result of an earlier run may lie among them.
    paths = [path for path in found if os.path.realpath(path) != os.path.realpath(args.output_file)]
    if not paths:
        raise CorpusError(
            args.json_path, "it holds no .json file to merge", "give the directory of the files"
        )
    total = 0
    with writing(args.output_file) as output:
        for path in paths:
            before = total
            for line in read_lines(path):
                parse(line)
                bom = b"\xef\xbb\xbf" if line.number == 1 else b""
                output.write(line.data.removeprefix(bom) + b"\n")
                total += 1
            print(f"{path}: {total - before} documents", flush=True)
    print(f"{args.output_file}: {total} documents of {len(paths)} files", flush=True)


if __name__ == "__main__":
    run(main)
