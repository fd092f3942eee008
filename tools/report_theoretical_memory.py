"""Memory by formula for the flags of a training command: weights and optimizer state, and activations where it holds.

    python tools/report_theoretical_memory.py --world-size 1024 --num-layers 96 --hidden-size 12288 ...

No GPU and no process group. The tokenizer's files need not be here; the size assumed for the vocabulary is then said on
stderr. `tools/explain.py` counts the same for every stage, from the model's real parameters and the pipeline's plan.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megatron.core.errors import FlagError
from megatron.training.cli import run_main
from megatron.training.explain import read
from megatron.training.explain.command import understand
from megatron.training.flops import is_hybrid
from megatron.training.theoretical_memory_usage import report_theoretical_memory


def main() -> None:
    """Print the report, with all its terms."""
    reading = read(understand(sys.argv[1:]))
    if reading.command.script == "pretrain_mamba" or is_hybrid(reading.args):
        raise FlagError(
            "pretrain_mamba.py",
            "the formula is a transformer's and knows no Mamba layers",
            "ask tools/explain.py, which counts a hybrid model's own",
        )
    if reading.vocabulary.note is not None:
        print(reading.vocabulary.note, file=sys.stderr)
    report_theoretical_memory(reading.args, verbose=True)


if __name__ == "__main__":
    run_main(main)
