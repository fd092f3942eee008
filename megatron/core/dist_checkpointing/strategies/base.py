"""What a storage strategy can do, and the registry of default strategies by backend and version."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections import defaultdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import CommonStateDict, ShardedStateDict, StateDict
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.strategies.reading import Stored


class StrategyAction(Enum):
    """What a default strategy is wanted for."""

    LOAD_COMMON = "load_common"
    LOAD_SHARDED = "load_sharded"
    SAVE_COMMON = "save_common"
    SAVE_SHARDED = "save_sharded"


default_strategies: dict[str, dict[tuple[str, int], Any]] = defaultdict(dict)

# Modules that register default strategies when imported.
_PROVIDERS = (
    "megatron.core.dist_checkpointing.strategies.common",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.dist_checkpointing.strategies.zarr",
)


def get_default_strategy(action: StrategyAction, backend: str, version: int) -> Any:
    """The registered strategy. CheckpointingException for a format that cannot be read or written here."""
    registered = default_strategies[action.value]
    if (backend, version) not in registered:
        for provider in _PROVIDERS:
            importlib.import_module(provider)
    try:
        return registered[(backend, version)]
    except KeyError:
        known = ", ".join(f"{name} {number}" for name, number in registered)
        verb, _, part = action.value.partition("_")
        fix = "convert the checkpoint to a known one with the program that wrote it"
        raise CheckpointingException(
            f"checkpoint format {backend} version {version}",
            f"nothing here can {verb} {part} data in it (known: {known})",
            fix if verb == "load" else "choose a known one",
        ) from None


def register_default_strategy(action: StrategyAction, backend: str, version: int, strategy: Any) -> None:
    """Make `strategy` the default for an action, backend and version."""
    default_strategies[action.value][(backend, version)] = strategy


class LoadStrategyBase(ABC):
    """Reads one format."""

    @abstractmethod
    def check_backend_compatibility(self, loaded_version: str) -> None:
        """Raise CheckpointingException if data of this backend cannot be read."""

    @abstractmethod
    def check_version_compatibility(self, loaded_version: int) -> None:
        """Raise CheckpointingException if data of this version cannot be read."""

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Whether sharded objects go through this strategy too."""
        return False


class SaveStrategyBase:
    """Writes one format, `backend` in `version`."""

    def __init__(self, backend: str, version: int) -> None:
        self.backend = backend
        self.version = version

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Whether sharded objects go through this strategy too."""
        return False


class LoadCommonStrategy(LoadStrategyBase):
    """Reads what is not sharded."""

    @abstractmethod
    def load_common(self, checkpoint_dir: Path) -> StateDict:
        """The common state dict."""


class LoadShardedStrategy(LoadStrategyBase):
    """Reads sharded tensors and objects."""

    @abstractmethod
    def load(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> StateDict:
        """The same tree with every record replaced by its data."""

    @abstractmethod
    def load_tensors_metadata(self, checkpoint_dir: Path) -> ShardedStateDict:
        """key -> ShardedTensor of the whole stored tensor, without data."""

    def open(self, checkpoint_dir: Path) -> Stored:
        """Random access to what is stored. CheckpointingException for a strategy that has none."""
        raise CheckpointingException(
            type(self).__name__, "it loads whole state dicts only", "load what is wanted with it"
        )

    def load_sharded_metadata(self, checkpoint_dir: Path) -> ShardedStateDict:
        """As load_tensors_metadata, with the sharded objects by their unique keys if the strategy stores them."""
        return self.load_tensors_metadata(checkpoint_dir)


class SaveCommonStrategy(SaveStrategyBase, ABC):
    """Writes what is not sharded."""

    @abstractmethod
    def save_common(self, common_state_dict: CommonStateDict, checkpoint_dir: Path) -> None:
        """Write the common state dict (rank 0 only)."""


class SaveShardedStrategy(SaveStrategyBase, ABC):
    """Writes sharded tensors and objects."""

    @abstractmethod
    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> None:
        """Write this rank's main replicas; every rank must call."""


class AsyncSaveShardedStrategy(SaveShardedStrategy):
    """Writes in the background: `async_save` copies the data and returns the rest of the work."""

    @abstractmethod
    def async_save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> AsyncRequest:
        """Copy the data and describe the rest of the work; every rank must call."""

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> None:
        """Save now."""
        self.async_save(sharded_state_dict, checkpoint_dir).execute_sync()
