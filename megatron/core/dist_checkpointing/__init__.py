"""Distributed checkpoints: describe pieces (mapping), then save and load them in any layout (serialization).

The names of serialization load on first use, so that layers which only describe pieces do not import storage.
"""

from typing import Any

from megatron.core.dist_checkpointing.core import check_is_distributed_checkpoint
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensor

# A misspelling that programs import.
LocalNonpersitentObject = LocalNonpersistentObject

_FROM_SERIALIZATION = {
    "load",
    "load_common_state_dict",
    "load_plain_tensors",
    "load_tensors_metadata",
    "save",
}

__all__ = [
    "LocalNonpersistentObject",
    "LocalNonpersitentObject",
    "ShardedTensor",
    "check_is_distributed_checkpoint",
    *sorted(_FROM_SERIALIZATION),
]


def __getattr__(name: str) -> Any:
    if name in _FROM_SERIALIZATION:
        from megatron.core.dist_checkpointing import serialization

        return getattr(serialization, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
