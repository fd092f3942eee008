"""How a command ends when something is wrong: one line, no traceback, the right exit status."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from megatron.core.errors import ConfigError, FlagError, MegatronError


class MachineError(FlagError):
    """A flag asks for something this machine cannot do; other machines of the same run may differ."""


def _speaks(error: MegatronError) -> bool:
    """What follows from the command line is the same on every rank, so rank 0 says it for all of them."""
    rank = int(os.environ.get("RANK", "0"))
    if isinstance(error, MachineError):
        return int(os.environ.get("LOCAL_RANK", "0")) == 0
    return rank == 0 or not isinstance(error, ConfigError)


def stop(error: MegatronError) -> NoReturn:
    """Print `error` on one line, naming the rank where there are several, and end with its exit status."""
    if _speaks(error):
        shared = isinstance(error, ConfigError) and not isinstance(error, MachineError)
        rank = (
            ""
            if shared or os.environ.get("WORLD_SIZE", "1") == "1"
            else f"rank {os.environ.get('RANK', '0')}: "
        )
        print(f"error: {rank}{' '.join(str(error).split())}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)


def run_main(main: Callable[[], object]) -> None:
    """Run an entry point's `main`; errors meant for people end the process without a traceback.

    A process that ends well leaves the process group first: its threads must not outlive the interpreter. One that ends
    badly does not wait for peers that wait for it: the launcher takes them down.
    """
    try:
        main()
    except MegatronError as error:
        with contextlib.suppress(SystemExit):
            stop(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.exit_code)
    except SystemExit:
        _leave_world()
        raise
    _leave_world()


def _leave_world() -> None:
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
