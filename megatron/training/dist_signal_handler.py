"""SIGTERM asks for a checkpoint and an orderly exit: remember it, and learn of it on every rank."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from megatron.core import device


def get_world_size() -> int:
    """Ranks of the default group; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def get_device(local_rank: int | None = None) -> torch.device:
    """Where a tensor must live for the default group's backend to reduce it."""
    backend = dist.get_backend()
    if backend == "gloo":
        return torch.device("cpu")
    current = device.current()
    return current if local_rank is None else torch.device(current.type, local_rank)


def all_gather_item(
    item: Any, dtype: torch.dtype, group: Any = None, async_op: bool = False, local_rank: int | None = None
) -> list[Any]:
    """One number from every rank of the group; all ranks of the group must call."""
    if get_world_size() == 1 and group is None:
        return [item]
    where = get_device(local_rank)
    mine = torch.tensor([item], device=where, dtype=dtype)
    gathered = [torch.zeros_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, mine, group, async_op)
    return [tensor.item() for tensor in gathered]


class DistributedSignalHandler:
    """Context manager that notes a signal instead of dying of it."""

    def __init__(self, sig: signal.Signals = signal.SIGTERM) -> None:
        self.sig = sig

    def signals_received(self) -> list[bool]:
        """For every rank of the world, whether it got the signal; all ranks must call."""
        return [bool(flag) for flag in all_gather_item(self._received, dtype=torch.int32)]

    def __enter__(self) -> DistributedSignalHandler:
        self._received = False
        self.released = False
        self.original_handler = signal.getsignal(self.sig)

        def handler(signum: int, frame: FrameType | None) -> None:
            self._received = True

        signal.signal(self.sig, handler)
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def release(self) -> bool:
        """Put the previous handler back; False if that was done before."""
        if self.released:
            return False
        signal.signal(self.sig, self.original_handler)
        self.released = True
        return True
