"""The common part: one torch file with everything that is not sharded, as rank 0 has it."""

from __future__ import annotations

from pathlib import Path

from megatron.core.dist_checkpointing import durable
from megatron.core.dist_checkpointing.agreement import rank, together
from megatron.core.dist_checkpointing.core import COMMON_FNAME, CheckpointingException
from megatron.core.dist_checkpointing.mapping import CommonStateDict, StateDict
from megatron.core.dist_checkpointing.safe_load import load_file
from megatron.core.dist_checkpointing.strategies.base import (
    LoadCommonStrategy,
    SaveCommonStrategy,
    StrategyAction,
    register_default_strategy,
)


class TorchCommonSaveStrategy(SaveCommonStrategy):
    """Writes common.pt on rank 0."""

    def save_common(self, common_state_dict: CommonStateDict, checkpoint_dir: Path) -> None:
        """Write common.pt; every rank must call and learns of a failure."""
        with together():
            if rank() == 0:
                durable.save_file(common_state_dict, Path(checkpoint_dir) / COMMON_FNAME)


class TorchCommonLoadStrategy(LoadCommonStrategy):
    """Reads common.pt on every rank, refusing anything but plain data unless told otherwise."""

    def __init__(self, allow_unsafe_pickle: bool = False) -> None:
        self.allow_unsafe_pickle = allow_unsafe_pickle

    def load_common(self, checkpoint_dir: Path) -> StateDict:
        """The content of common.pt."""
        path = Path(checkpoint_dir) / COMMON_FNAME
        return load_file(path, allow_unsafe_pickle=self.allow_unsafe_pickle, mmap=False)

    def check_backend_compatibility(self, loaded_version: str) -> None:
        """Only the torch backend exists for the common part."""
        if loaded_version != "torch":
            raise CheckpointingException("common part of the checkpoint", f"unknown backend {loaded_version}")

    def check_version_compatibility(self, loaded_version: int) -> None:
        """Only version 1 exists."""
        if loaded_version > 1:
            raise CheckpointingException(
                "common part of the checkpoint",
                f"version {loaded_version} is newer than 1",
                "update this program",
            )


def register_default_common_strategies() -> None:
    """Register the torch backend, version 1."""
    register_default_strategy(StrategyAction.LOAD_COMMON, "torch", 1, TorchCommonLoadStrategy())
    register_default_strategy(StrategyAction.SAVE_COMMON, "torch", 1, TorchCommonSaveStrategy("torch", 1))


register_default_common_strategies()
