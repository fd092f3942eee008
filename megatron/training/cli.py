"""How a command ends when something is wrong: one line, no traceback, the right exit status."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import NoReturn

import torch.distributed as dist

from megatron.core.errors import FlagError, MegatronError, TrainingError
from megatron.training import watch

#: What backends say when another rank is gone, and when it does not come.
_PEER_GONE = re.compile(
    r"[Cc]onnection (closed|reset|refused)|Broken pipe|remote process exited|Socket closed"
)
_PEER_LATE = re.compile(r"[Tt]imed out|timeout")


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


def file_error(error: OSError) -> MegatronError:
    """What the system refused, in terms of the flag whose file or directory it is about."""
    path = str(error.filename)
    reason = error.strerror or str(error)
    for flag, value in pairwise(sys.argv):
        inside = path == value or path.startswith(value.rstrip("/") + "/") or value.startswith(path + "/")
        if flag.startswith("--") and value and not value.startswith("--") and inside:
            where = "" if path == value else f" ({path})"
            return FlagError(
                f"{flag} {value}", f"it cannot be used: {reason}{where}", "check the path and its permissions"
            )
    return MegatronError(
        path, f"it cannot be used: {reason}", "check the path, its permissions and the free space"
    )


def lost_rank(error: RuntimeError) -> MegatronError | None:
    """The error for a rank that failed because another is gone or late; None if `error` is about something else."""
    if not dist.is_available():
        return None
    if not dist.is_initialized():
        unmet = isinstance(error, (dist.DistStoreError, dist.DistNetworkError))
        why = f"the ranks did not all meet: {str(error).splitlines()[0]}"
        return TrainingError("start", why, "see whether one of them failed first") if unmet else None
    if dist.get_world_size() == 1:
        return None
    text = str(error)
    if _PEER_LATE.search(text):
        reports = watch.announce_timeout(error)
        return TrainingError(
            "--distributed-timeout-minutes",
            f"this rank waited for another one longer than that, {watch.place_of(error)}. {' '.join(reports)}".rstrip(),
            "look at the ranks that were elsewhere; raise the limit if they were only slow",
        )
    if isinstance(error, dist.DistError) or _PEER_GONE.search(text):
        return TrainingError(
            "communication",
            f"another rank ended while this one was {watch.place_of(error)}",
            "its own message names the cause",
        )
    return None


def run_main(main: Callable[[], object]) -> None:
    """Run an entry point's `main`; errors meant for people end the process without a traceback."""
    try:
        main()
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()  # its threads must not outlive what they use
    except MegatronError as error:
        stop(error)
    except OSError as error:
        if error.filename is None:
            raise
        stop(file_error(error))
    except RuntimeError as error:
        known = lost_rank(error)
        if known is None:
            raise
        stop(known)
