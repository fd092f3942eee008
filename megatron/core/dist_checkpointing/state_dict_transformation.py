"""From the tree a program builds to what is stored, and back."""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, extract_matching_values
from megatron.core.dist_checkpointing.mapping import (
    CommonStateDict,
    LocalNonpersistentObject,
    ShardedBase,
    ShardedStateDict,
    ShardedTensorFactory,
    StateDict,
    apply_factories,
    apply_factory_merges,
)
from megatron.core.dist_checkpointing.utils import extract_nonpersistent
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity


def save_preprocess(
    sharded_state_dict: ShardedStateDict, validate_access_integrity: bool = True
) -> tuple[ShardedStateDict, CommonStateDict]:
    """Split into (records to write, common values); factories are applied in place. Every rank must call.

    Lists that are split become dicts from position to value. CheckpointingException if the pieces of all ranks do not
    cover every tensor exactly once.
    """
    apply_factories(sharded_state_dict)
    _, persistent = extract_nonpersistent(sharded_state_dict)
    sharded, common = extract_matching_values(
        persistent, lambda leaf: isinstance(leaf, ShardedBase), return_lists_as_dicts=True
    )
    assert isinstance(sharded, dict) and isinstance(common, dict), "the root of a state dict is a dict"
    if validate_access_integrity:
        validate_sharding_integrity(determine_global_metadata(sharded)[1])
    return sharded, _whole_lists(persistent, common)


def _whole_lists(original: Any, part: Any) -> Any:
    """Lists of the original of which `part` has something of every position are lists again."""
    if not isinstance(part, dict):
        return part
    if isinstance(original, list):
        values = {position: _whole_lists(original[position], value) for position, value in part.items()}
        return list(values.values()) if len(values) == len(original) else values
    return {name: _whole_lists(original[name], value) for name, value in part.items()}


def load_preprocess(
    sharded_state_dict: ShardedStateDict,
) -> tuple[ShardedStateDict, StateDict, ShardedStateDict]:
    """Split into (records to read, values of the running program, factories to join afterwards).

    Common values in the request are dropped: the checkpoint has its own.
    """
    factories, _ = extract_matching_values(
        sharded_state_dict, lambda leaf: isinstance(leaf, ShardedTensorFactory), return_lists_as_dicts=True
    )
    apply_factories(sharded_state_dict)
    nonpersistent, _ = extract_matching_values(
        sharded_state_dict,
        lambda leaf: isinstance(leaf, LocalNonpersistentObject),
        return_lists_as_dicts=True,
    )
    dict_list_map_inplace(lambda leaf: leaf.unwrap(), nonpersistent)
    sharded, _ = extract_matching_values(
        sharded_state_dict, lambda leaf: isinstance(leaf, ShardedBase), return_lists_as_dicts=True
    )
    assert isinstance(sharded, dict) and isinstance(nonpersistent, dict) and isinstance(factories, dict), (
        "the root of a state dict is a dict"
    )
    return sharded, nonpersistent, factories


def assemble_loaded(
    common: StateDict,
    nonpersistent: StateDict,
    loaded: StateDict,
    factories: ShardedStateDict,
    request: ShardedStateDict,
) -> StateDict:
    """Merge what was read with the running program's values and join what factories had cut.

    Where the request has a list, the result has one.
    """
    for part in (nonpersistent, loaded):
        _overlay(common, part)
    state = _with_lists(request, common)
    _forget_dropped(factories, state)
    return apply_factory_merges(state, factories)


def _overlay(state: Any, part: Any) -> None:
    """Write the leaves of `part` into `state`, which may have lists where `part` has positions."""
    for name, value in part.items():
        if _has(state, name) and isinstance(value, dict) and isinstance(state[name], (dict, list)):
            _overlay(state[name], value)
        else:
            state[name] = value


def _has(container: Any, name: Any) -> bool:
    return name in container if isinstance(container, dict) else name < len(container)


def _forget_dropped(factories: Any, state: Any) -> None:
    """Remove factories whose pieces the checkpoint does not have (non-strict loads drop them)."""
    for name in list(factories):
        if not _has(state, name):
            del factories[name]
        elif isinstance(factories[name], dict):
            _forget_dropped(factories[name], state[name])


def _with_lists(request: Any, state: Any) -> Any:
    if isinstance(request, list) and isinstance(state, dict):
        return [_with_lists(request[position], state[position]) for position in sorted(state)]
    if isinstance(request, dict) and isinstance(state, dict):
        for name in request.keys() & state.keys():
            state[name] = _with_lists(request[name], state[name])
    return state
