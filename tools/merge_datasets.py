"""Merge all token files of a directory, in order of their names, into one pair of files.

python tools/merge_datasets.py --input parts/ --output-prefix merged/my_text_document
"""

from __future__ import annotations

import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megatron.core.datasets.indexed_dataset_builder import IndexedDatasetBuilder
from megatron.core.datasets.token_files import TokenIndex, get_bin_path, get_idx_path
from megatron.core.errors import DataError
from megatron.training.cli import run_main


def find_prefixes(directory: str, output_prefix: str) -> list[str]:
    """Prefixes of the token files in `directory`, sorted; each file must have its partner."""
    if not os.path.isdir(directory):
        raise DataError(
            "--input", f"{directory} is not a directory or does not exist", "give the directory of the parts"
        )
    splits = (os.path.splitext(entry.path) for entry in os.scandir(directory) if entry.is_file())
    stems = {stem for stem, ending in splits if ending in (".bin", ".idx")}
    if not stems:
        raise DataError(
            "--input", f"{directory} holds no token files", "give the directory of the .bin and .idx files"
        )
    for stem in sorted(stems):
        for path in (get_bin_path(stem), get_idx_path(stem)):
            if not os.path.isfile(path):
                raise DataError(
                    path, "is missing beside its partner", "copy it, or remove the partner from --input"
                )
        if os.path.realpath(stem) == os.path.realpath(output_prefix):
            raise DataError(
                "--output-prefix", f"{output_prefix} is one of the inputs", "write to another directory"
            )
    return sorted(stems)


def merge(prefixes: list[str], output_prefix: str, multimodal: bool) -> None:
    """Append the files in order. The first decides the token type. Files of that name stay until all are appended."""
    os.makedirs(os.path.dirname(output_prefix) or ".", exist_ok=True)
    dtype = TokenIndex.of_prefix(prefixes[0], multimodal).dtype
    partial = f"{output_prefix}.partial"
    builder = IndexedDatasetBuilder(get_bin_path(partial), dtype=dtype, multimodal=multimodal)
    try:
        for prefix in prefixes:
            builder.add_index(prefix)
        builder.finalize(get_idx_path(partial))
    except DataError:
        os.unlink(get_bin_path(partial))
        raise
    os.replace(get_bin_path(partial), get_bin_path(output_prefix))
    os.replace(get_idx_path(partial), get_idx_path(output_prefix))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    group = parser.add_argument_group(title="input data")
    group.add_argument("--input", required=True, help="Directory of the .bin and .idx files to merge")
    group = parser.add_argument_group(title="output data")
    group.add_argument(
        "--output-prefix", required=True, help="Path of the merged files without .bin and .idx"
    )
    group = parser.add_argument_group(title="miscellaneous")
    group.add_argument("--multimodal", action="store_true", help="The files have a mode per sequence")
    return parser.parse_args(arguments)


def main() -> None:
    """Merge as the command line says."""
    args = parse()
    merge(find_prefixes(args.input, args.output_prefix), args.output_prefix, args.multimodal)


if __name__ == "__main__":
    run_main(main)
