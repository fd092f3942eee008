"""Before saving: do the pieces of all ranks tile every tensor exactly once? Before loading: which keys disagree?"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from enum import Enum
from itertools import product
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.agreement import gather
from megatron.core.dist_checkpointing.core import CheckpointingException, maybe_load_config
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, map_reduce, nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    is_main_replica,
)
from megatron.core.dist_checkpointing.strategies.base import (
    LoadCommonStrategy,
    LoadShardedStrategy,
    StrategyAction,
    get_default_strategy,
)

logger = logging.getLogger(__name__)

LocalMetadata = list[ShardedBase]
GlobalMetadata = list[LocalMetadata]


class StrictHandling(Enum):
    """What to do about keys that are requested but not stored (unexpected) or stored but requested by no rank (missing)."""

    ASSUME_OK_UNEXPECTED = "assume_ok_unexpected"
    LOG_UNEXPECTED = "log_unexpected"
    LOG_ALL = "log_all"
    RAISE_UNEXPECTED = "raise_unexpected"
    RAISE_ALL = "raise_all"
    RETURN_UNEXPECTED = "return_unexpected"
    RETURN_ALL = "return_all"
    IGNORE_ALL = "ignore_all"

    @staticmethod
    def requires_explicit_ckpt_mismatch_check(val: StrictHandling) -> bool:
        """Whether the stored keys must be compared at all."""
        return val is not StrictHandling.ASSUME_OK_UNEXPECTED

    @staticmethod
    def requires_global_app_metadata(val: StrictHandling) -> bool:
        """Whether the requests of all ranks are needed (to know what nobody requests)."""
        return val in (
            StrictHandling.IGNORE_ALL,
            StrictHandling.RAISE_ALL,
            StrictHandling.RETURN_ALL,
            StrictHandling.LOG_ALL,
        )

    @staticmethod
    def requires_returning_mismatch_keys(val: StrictHandling) -> bool:
        """Whether the caller gets the key sets."""
        return val in (StrictHandling.RETURN_UNEXPECTED, StrictHandling.RETURN_ALL)


def parse_strict_flag(strict: str | StrictHandling) -> StrictHandling:
    """The mode of that name. ValueError lists the modes otherwise."""
    if isinstance(strict, StrictHandling):
        return strict
    try:
        return StrictHandling(strict)
    except ValueError:
        modes = ", ".join(mode.value for mode in StrictHandling)
        raise ValueError(f"Invalid strict flag {strict}: use one of {modes}") from None


def verify_checkpoint_and_load_strategy(
    checkpoint_dir: str, sharded_strategy: Any = None, common_strategy: Any = None
) -> tuple[LoadShardedStrategy, LoadCommonStrategy]:
    """The strategies that read the directory. CheckpointingException if it is no complete distributed checkpoint."""
    if not os.path.isdir(checkpoint_dir):
        raise CheckpointingException(
            "checkpoint", f"the directory {checkpoint_dir} does not exist", "check the path"
        )
    config = maybe_load_config(checkpoint_dir)
    if config is None:
        why = "it is not a distributed checkpoint, or not a complete one: it has no valid metadata.json"
        raise CheckpointingException(str(checkpoint_dir), why, "use an earlier checkpoint")
    if sharded_strategy is None:
        sharded_strategy = get_default_strategy(
            StrategyAction.LOAD_SHARDED, config.sharded_backend, config.sharded_backend_version
        )
    elif isinstance(sharded_strategy, tuple):
        sharded_strategy = get_default_strategy(StrategyAction.LOAD_SHARDED, *sharded_strategy)
    if common_strategy is None:
        common_strategy = get_default_strategy(
            StrategyAction.LOAD_COMMON, config.common_backend, config.common_backend_version
        )
    elif isinstance(common_strategy, tuple):
        common_strategy = get_default_strategy(StrategyAction.LOAD_COMMON, *common_strategy)
    sharded_strategy.check_backend_compatibility(config.sharded_backend)
    sharded_strategy.check_version_compatibility(config.sharded_backend_version)
    common_strategy.check_backend_compatibility(config.common_backend)
    common_strategy.check_version_compatibility(config.common_backend_version)
    return sharded_strategy, common_strategy


def stored_key(record: ShardedBase) -> str:
    """The name of a record in a checkpoint."""
    return record.unique_key if isinstance(record, ShardedObject) else record.key


def adjust_non_strict_load(
    sharded_state_dict: ShardedStateDict, sharded_keys_to_remove: Iterable[str]
) -> ShardedStateDict:
    """The tree without the records of those keys. An object's key removes all its pieces, a piece's name that one."""
    remove = set(sharded_keys_to_remove)
    _, kept = extract_matching_values(
        sharded_state_dict,
        lambda leaf: isinstance(leaf, ShardedBase) and not remove.isdisjoint((leaf.key, stored_key(leaf))),
    )
    assert isinstance(kept, dict), "the root of a state dict is a dict"
    return kept


def validate_integrity_and_strict_load(
    sharded_state_dict: ShardedStateDict,
    strict: StrictHandling,
    validate_access_integrity: bool,
    local_metadata: LocalMetadata | None = None,
    global_metadata: GlobalMetadata | None = None,
    ckpt_sharded_metadata: dict[str, Any] | None = None,
) -> tuple[ShardedStateDict, set[str], set[str]]:
    """Check the request; returns (the request without what is not stored, missing keys, unexpected keys).

    Pieces of objects are compared one by one and reported under the object's key. Nothing is dropped in the mode that
    assumes the keys to be right. Every rank must call.
    """
    missing: set[str] = set()
    unexpected: set[str] = set()
    if StrictHandling.requires_explicit_ckpt_mismatch_check(strict):
        if ckpt_sharded_metadata is None:
            raise ValueError("the stored keys are needed to compare with")
        requested = {stored_key(r): r.key for r in local_metadata or nested_values(sharded_state_dict)}
        everyone = {name: key for one in gather(requested) for name, key in one.items()}
        absent = {name: key for name, key in everyone.items() if name not in ckpt_sharded_metadata}
        unexpected = set(absent.values())
        if StrictHandling.requires_global_app_metadata(strict):
            missing = {record.key for record in ckpt_sharded_metadata.values()} - set(everyone.values())
        sharded_state_dict = adjust_non_strict_load(sharded_state_dict, absent)
        if strict in (StrictHandling.LOG_UNEXPECTED, StrictHandling.LOG_ALL):
            maybe_report_missing_and_unexpected_keys(missing, unexpected, raise_error=False)
        elif strict in (StrictHandling.RAISE_UNEXPECTED, StrictHandling.RAISE_ALL):
            maybe_report_missing_and_unexpected_keys(missing, unexpected, raise_error=True)
    if validate_access_integrity:
        validate_sharding_integrity(global_metadata or determine_global_metadata(sharded_state_dict)[1])
    return sharded_state_dict, missing, unexpected


def maybe_report_missing_and_unexpected_keys(
    missing_keys: set[str], unexpected_keys: set[str], raise_error: bool = True
) -> None:
    """Raise CheckpointingException, or log a warning, if any of the sets is not empty."""
    parts = [
        f"{name} keys ({meaning}): {', '.join(sorted(keys))}"
        for name, meaning, keys in (
            ("Unexpected", "requested but not stored", unexpected_keys),
            ("Missing", "stored but not requested", missing_keys),
        )
        if keys
    ]
    if not parts:
        return
    why = "; ".join(parts)
    if raise_error:
        fix = "give the run the checkpoint's architecture, or choose another --dist-ckpt-strictness"
        raise CheckpointingException("checkpoint", why, fix)
    logger.warning("checkpoint: %s", why)


def determine_global_metadata(sharded_state_dict: ShardedStateDict) -> tuple[LocalMetadata, GlobalMetadata]:
    """(descriptions of this rank's records, those of every rank), without data. Every rank must call."""
    local = [record.without_data() for record in nested_values(sharded_state_dict)]
    return local, gather(local)


def validate_sharding_integrity(global_metadata: GlobalMetadata) -> None:
    """Check that the main replicas of all ranks cover every tensor and object exactly once.

    CheckpointingException names the key and what is missing, doubled or contradictory. Every rank holds the same
    description, so every rank comes to the same result.
    """
    by_key = map_reduce((record for local in global_metadata for record in local), lambda record: record.key)
    for key, records in sorted(by_key.items()):
        if all(isinstance(record, ShardedObject) for record in records):
            _validate_objects(key, records)
        elif all(isinstance(record, ShardedTensor) for record in records):
            _validate_tensor(key, records)
        else:
            raise CheckpointingException(key, "it is a tensor on some ranks and an object on others")


def _validate_objects(key: str, records: list[ShardedObject]) -> None:
    shapes = {tuple(record.global_shape) for record in records}
    if len(shapes) > 1:
        raise CheckpointingException(key, f"the ranks disagree on the number of objects: {sorted(shapes)}")
    written = [tuple(record.global_offset) for record in records if is_main_replica(record.replica_id)]
    _demand_each_once(key, written, product(*(range(size) for size in shapes.pop())))


def _validate_tensor(key: str, records: list[ShardedTensor]) -> None:
    first = records[0]
    for record in records:
        for name in (
            "dtype",
            "global_shape",
            "axis_fragmentations",
            "prepend_axis_num",
            "allow_shape_mismatch",
        ):
            if getattr(record, name) != getattr(first, name):
                why = f"the ranks disagree on its {name}: {getattr(first, name)} and {getattr(record, name)}"
                raise CheckpointingException(key, why)
    if first.axis_fragmentations is None:
        return
    main = [record for record in records if is_main_replica(record.replica_id)]
    cells = map_reduce(main, lambda record: record.local_chunk_offset_in_global())
    flattened = any(record.flattened_range is not None for record in main)
    written = list(cells) if flattened else [cell for cell, held in cells.items() for _ in held]
    _demand_each_once(key, written, product(*(range(size) for size in first.max_allowed_chunks())))
    if flattened:
        for cell, held in cells.items():
            _validate_flattened(key, cell, held)


def _demand_each_once(key: str, written: list[tuple[int, ...]], wanted: Iterable[tuple[int, ...]]) -> None:
    counts = dict.fromkeys(wanted, 0)
    for cell in written:
        counts[cell] = counts.get(cell, -1) + 1
    wrong = {cell: count for cell, count in counts.items() if count != 1}
    if wrong:
        cell, count = min(wrong.items())
        problem = (
            "no rank writes" if count == 0 else f"{count} ranks write" if cell in counts else "is outside:"
        )
        why = f"its pieces do not cover it exactly once: {problem} the piece at {cell} ({len(wrong)} wrong in all)"
        raise CheckpointingException(key, why)


def _validate_flattened(key: str, cell: tuple[int, ...], records: list[ShardedTensor]) -> None:
    """Ranges of one cell must follow each other without gap or overlap."""
    if any(record.flattened_range is None for record in records):
        raise CheckpointingException(key, f"the piece at {cell} is flattened on some ranks only")
    ranges = sorted((r.flattened_range.start, r.flattened_range.stop) for r in records if r.flattened_range)
    position = 0
    for start, stop in ranges:
        if start != position:
            problem = "overlap" if start < position else "leave a gap"
            raise CheckpointingException(
                key, f"the flattened ranges of the piece at {cell} {problem} at {position}"
            )
        position = stop
    size = 1
    for extent in records[0].local_shape:
        size *= extent
    if position != size:
        raise CheckpointingException(
            key, f"the flattened ranges of the piece at {cell} end at {position}, not {size}"
        )


def validate_sharded_objects_handling(sharded_strategy: Any, common_strategy: Any) -> None:
    """Check that one of the strategies stores sharded objects."""
    if not (sharded_strategy.can_handle_sharded_objects or common_strategy.can_handle_sharded_objects):
        raise CheckpointingException("checkpoint format", "it cannot store sharded objects", "use torch_dist")


def directory_is_empty(checkpoint_dir: str) -> bool:
    """Whether the directory has no entries."""
    return next(Path(checkpoint_dir).iterdir(), None) is None
