"""Split a sharded state dict by the kind of its leaves; rename its keys."""

from __future__ import annotations

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, extract_matching_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
    StateDict,
)


def _extract(state_dict: ShardedStateDict, *kinds: type) -> tuple[ShardedStateDict, StateDict]:
    matching, rest = extract_matching_values(state_dict, lambda leaf: isinstance(leaf, kinds))
    assert isinstance(matching, dict) and isinstance(rest, dict), "the root of a state dict is a dict"
    return matching, rest


def extract_sharded_tensors(sharded_state_dict: ShardedStateDict) -> tuple[ShardedStateDict, StateDict]:
    """(sharded tensors, the rest)."""
    return _extract(sharded_state_dict, ShardedTensor)


def extract_sharded_tensors_and_factories(
    sharded_state_dict: ShardedStateDict,
) -> tuple[ShardedStateDict, StateDict]:
    """(sharded tensors and factories, the rest)."""
    return _extract(sharded_state_dict, ShardedTensor, ShardedTensorFactory)


def extract_sharded_tensors_or_nonpersistent(
    sharded_state_dict: ShardedStateDict,
) -> tuple[ShardedStateDict, StateDict]:
    """(sharded tensors, factories and non-persistent objects, the rest)."""
    return _extract(sharded_state_dict, ShardedTensor, ShardedTensorFactory, LocalNonpersistentObject)


def extract_sharded_base(sharded_state_dict: ShardedStateDict) -> tuple[ShardedStateDict, StateDict]:
    """(everything that is stored sharded, the rest)."""
    return _extract(sharded_state_dict, ShardedBase)


def extract_nonpersistent(sharded_state_dict: ShardedStateDict) -> tuple[ShardedStateDict, StateDict]:
    """(non-persistent objects, the rest)."""
    return _extract(sharded_state_dict, LocalNonpersistentObject)


_RENAMED = (ShardedTensor, ShardedTensorFactory, ShardedObject)


def add_prefix_for_sharding(sharded_state_dict: ShardedStateDict, prefix: str) -> None:
    """Prepend `prefix` to the key of every record, in place; the dict keys stay as they are."""
    replace_prefix_for_sharding(sharded_state_dict, "", prefix)


def replace_prefix_for_sharding(
    sharded_state_dict: ShardedStateDict, old_prefix: str, new_prefix: str
) -> None:
    """Replace the prefix of every record's key, in place. ValueError if a key lacks the old one."""

    def rename(leaf: object) -> object:
        if isinstance(leaf, _RENAMED):
            if not leaf.key.startswith(old_prefix):
                raise ValueError(f"key {leaf.key} does not start with {old_prefix}")
            leaf.key = new_prefix + leaf.key[len(old_prefix) :]
        return leaf

    dict_list_map_inplace(rename, sharded_state_dict)


def apply_prefix_mapping(sharded_state_dict: ShardedStateDict, prefix_map: dict[str, str]) -> None:
    """Replace the first matching prefix of each record's key by its value in `prefix_map`, in place."""

    def rename(leaf: object) -> object:
        if isinstance(leaf, _RENAMED):
            for old, new in prefix_map.items():
                if leaf.key.startswith(old):
                    leaf.key = new + leaf.key[len(old) :]
                    break
        return leaf

    dict_list_map_inplace(rename, sharded_state_dict)
