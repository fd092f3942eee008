"""How a command ends when something is wrong: one line, no traceback, the right exit status."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn

import torch.distributed as dist

from megatron.core.errors import FlagError, MegatronError


class MachineError(FlagError):
    """A flag asks for something this machine cannot do; other machines of the same run may differ."""


def _is_first_to_say(error: MegatronError) -> bool:
    """Whether this rank prints `error`, given that other ranks may hold the same.

    Once the ranks know each other, whoever comes first prints. Before, what follows from the command line is said by rank
    0 for all of them, and what follows from a machine (its packages, its files) by the first rank there.
    """
    if dist.is_available() and dist.is_initialized():
        key = "megatron/error/" + hashlib.sha256(str(error).encode()).hexdigest()
        try:
            return dist.distributed_c10d._get_default_store().add(key, 1) == 1
        except RuntimeError:  # the store went down with the rank that kept it
            return True
    shared = isinstance(error, FlagError) and not isinstance(error, MachineError)
    return os.environ.get("RANK" if shared else "LOCAL_RANK", "0") == "0"


def stop(error: MegatronError) -> NoReturn:
    """Print `error` on one line, naming the rank where that may matter, and end with its exit status."""
    if _is_first_to_say(error):
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        shared = isinstance(error, FlagError) and not isinstance(error, MachineError)
        rank = "" if alone or shared else f"rank {os.environ.get('RANK', '0')}: "
        print(f"error: {rank}{' '.join(str(error).split())}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)


def run_main(main: Callable[[], object]) -> None:
    """Run an entry point's `main`; errors meant for people end the process without a traceback."""
    try:
        main()
    except MegatronError as error:
        stop(error)
