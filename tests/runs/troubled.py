"""Pretrain a GPT with a rank that gets into trouble: `torchrun troubled.py KIND <flags of pretrain_gpt.py>`.

KIND is `hang`, `stall` or `die`: from its third forward pass on, rank 1 sleeps for ever, or raises an error of its own. With
`stall` the ranks' threads ask before the time limit, as they do where the program waits for a device.
"""

from __future__ import annotations

import datetime
import os
import sys
import time
from typing import Any

import pretrain_gpt
from megatron.core import parallel_state
from megatron.training import watch
from megatron.training.cli import run_main

_SECONDS = 15


def shortly(minutes: float) -> datetime.timedelta:
    """A timeout that a test can wait for in place of `--distributed-timeout-minutes`."""
    return datetime.timedelta(seconds=_SECONDS * minutes)


def main() -> None:
    """Make trouble, then do what pretrain_gpt.py does."""
    kind = sys.argv.pop(1)
    passes = 0
    forward = pretrain_gpt.forward_step

    def troubled_forward_step(*args: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == 3 and os.environ["RANK"] == "1":
            if kind == "die":
                raise RuntimeError("the disk of rank 1 is on fire")
            wait_for_a_file_system()
        return forward(*args)

    pretrain_gpt.forward_step = troubled_forward_step
    parallel_state.timedelta = shortly  # type: ignore[attr-defined, assignment]
    if kind == "stall":
        watch.patience_s = lambda backend, minutes: 4.0
    run_main(pretrain_gpt.run)


def wait_for_a_file_system() -> None:
    """Never returns."""
    while True:
        time.sleep(1)


if __name__ == "__main__":
    main()
