"""Say what a training command will do, without doing it: `python tools/explain.py <any command line>`; see --help."""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megatron.training.cli import run_main
from megatron.training.explain import explain
from megatron.training.explain.command import USAGE
from megatron.training.explain.describe import lines


def main() -> None:
    """Print the explanation."""
    words = sys.argv[1:]
    if not words or words in (["--help"], ["-h"]):
        print(USAGE)
        return
    print("\n".join(lines(explain(words))))


if __name__ == "__main__":
    run_main(main)
