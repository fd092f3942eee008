"""Save and load sharded state dicts: the order of operations, whatever the storage format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron.core.dist_checkpointing import durable
from megatron.core.dist_checkpointing.agreement import agree, rank, together
from megatron.core.dist_checkpointing.core import (
    COMMON_FNAME,
    CheckpointingConfig,
    CheckpointingException,
    save_config,
)
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import (
    CommonStateDict,
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    StateDict,
)
from megatron.core.dist_checkpointing.state_dict_transformation import (
    assemble_loaded,
    load_preprocess,
    save_preprocess,
)
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.base import (
    AsyncSaveShardedStrategy,
    LoadCommonStrategy,
    LoadShardedStrategy,
    SaveCommonStrategy,
    SaveShardedStrategy,
    StrategyAction,
    get_default_strategy,
)
from megatron.core.dist_checkpointing.validation import (
    StrictHandling,
    determine_global_metadata,
    directory_is_empty,
    parse_strict_flag,
    validate_integrity_and_strict_load,
    validate_sharding_integrity,
    verify_checkpoint_and_load_strategy,
)


def save(
    sharded_state_dict: ShardedStateDict,
    checkpoint_dir: str,
    sharded_strategy: SaveShardedStrategy | tuple[str, int] | None = None,
    common_strategy: SaveCommonStrategy | tuple[str, int] | None = None,
    validate_access_integrity: bool = True,
    async_sharded_save: bool = False,
) -> AsyncRequest | None:
    """Save into an existing empty directory; every rank must call.

    The tree may nest in any way: records go where their keys say, everything else is common and taken from rank 0.
    With `async_sharded_save` the data is copied and the remaining work returned; the caller runs it (an
    AsyncCallsQueue does). The checkpoint is complete once metadata.json exists. CheckpointingException, on every
    rank, if the directory is not empty, the pieces do not tile, or a file cannot be written.
    """
    directory = Path(checkpoint_dir)
    with together():
        if rank() == 0:
            if not directory.is_dir():
                raise CheckpointingException(
                    checkpoint_dir, "the destination directory does not exist", "create it"
                )
            if not directory_is_empty(checkpoint_dir):
                why = "the destination directory is not empty"
                raise CheckpointingException(checkpoint_dir, why, "remove it or choose another")
    writer: SaveShardedStrategy = _resolve(sharded_strategy, StrategyAction.SAVE_SHARDED, ("torch_dist", 1))
    common_writer: SaveCommonStrategy = _resolve(common_strategy, StrategyAction.SAVE_COMMON, ("torch", 1))
    sharded, common = save_preprocess(sharded_state_dict, validate_access_integrity)
    common_writer.save_common(common, directory)

    def complete() -> None:
        config = CheckpointingConfig(
            writer.backend,
            writer.version,
            common_writer.backend,
            common_writer.version,
        )
        with together():
            if rank() == 0:
                manifest = durable.read_manifest(directory)
                manifest[COMMON_FNAME] = durable.checksum_file(directory / COMMON_FNAME)
                durable.write_manifest(directory, manifest)
                save_config(config, directory)

    if not async_sharded_save:
        writer.save(sharded, directory)
        complete()
        return None
    if not isinstance(writer, AsyncSaveShardedStrategy):
        raise CheckpointingException(
            f"format {writer.backend}", "it cannot be saved in the background", "use torch_dist"
        )
    request = writer.async_save(sharded, directory)
    request.finalize_fns.append(complete)
    return request


def load(
    sharded_state_dict: ShardedStateDict,
    checkpoint_dir: str,
    sharded_strategy: LoadShardedStrategy | tuple[str, int] | None = None,
    common_strategy: LoadCommonStrategy | tuple[str, int] | None = None,
    validate_access_integrity: bool = True,
    strict: str | StrictHandling = StrictHandling.ASSUME_OK_UNEXPECTED,
    key_fallbacks: Callable[[str], list[str]] | None = None,
) -> Any:
    """Load what the tree requests, in this run's layout; every rank must call.

    Tensors are read into the records' own data (allocated on the CPU if there is none). Returns a plain state
    dict: the requested places, plus everything common. In the `return_*` modes of `strict` it is a tuple
    (state dict, missing keys, unexpected keys). `key_fallbacks` gives other keys to try for a tensor that is not
    stored under its own. CheckpointingException, on every rank, for anything missing, damaged or misshapen.
    """
    strict = parse_strict_flag(strict)
    with together():
        sharded_strategy, common_strategy = verify_checkpoint_and_load_strategy(
            checkpoint_dir, sharded_strategy, common_strategy
        )
        common = common_strategy.load_common(Path(checkpoint_dir))
    sharded, nonpersistent, factories = load_preprocess(sharded_state_dict)
    stored: dict[str, Any] | None = None
    if key_fallbacks is not None or StrictHandling.requires_explicit_ckpt_mismatch_check(strict):
        with together():
            stored = sharded_strategy.load_sharded_metadata(Path(checkpoint_dir))
    if validate_access_integrity:
        validate_sharding_integrity(determine_global_metadata(sharded)[1])
    if key_fallbacks is not None:
        assert stored is not None, "the stored keys were just read"
        # After the check of integrity: two records may read one stored tensor.
        sharded = _with_fallbacks(sharded, stored, key_fallbacks)
    sharded, missing, unexpected = validate_integrity_and_strict_load(
        sharded, strict, validate_access_integrity=False, ckpt_sharded_metadata=stored
    )
    error: CheckpointingException | None = None
    loaded: StateDict = {}
    try:
        loaded = sharded_strategy.load(sharded, Path(checkpoint_dir))
    except CheckpointingException as failed:
        error = failed
    agree(error)
    state = assemble_loaded(common, nonpersistent, loaded, factories, sharded_state_dict)
    if StrictHandling.requires_returning_mismatch_keys(strict):
        return state, missing, unexpected
    return state


def _with_fallbacks(
    sharded: ShardedStateDict, stored: dict[str, Any], key_fallbacks: Callable[[str], list[str]]
) -> ShardedStateDict:
    """The request with every tensor key that is not stored replaced by the first fallback that is."""

    def redirect(record: Any) -> Any:
        if isinstance(record, ShardedTensor) and record.key not in stored:
            for key in key_fallbacks(record.key):
                if key in stored:
                    return replace(record, key=key)
        return record

    result = dict_list_map_inplace(redirect, sharded)
    assert isinstance(result, dict), "the root of a state dict is a dict"
    return result


def load_common_state_dict(checkpoint_dir: str) -> CommonStateDict:
    """Everything in the checkpoint that is not sharded."""
    _, common_strategy = verify_checkpoint_and_load_strategy(checkpoint_dir)
    return common_strategy.load_common(Path(checkpoint_dir))


def load_tensors_metadata(
    checkpoint_dir: str, sharded_strategy: LoadShardedStrategy | None = None
) -> dict[str, ShardedTensor]:
    """key -> ShardedTensor without data, covering the whole stored tensor, flattened if its pieces are."""
    sharded_strategy, _ = verify_checkpoint_and_load_strategy(checkpoint_dir, sharded_strategy)
    return sharded_strategy.load_tensors_metadata(Path(checkpoint_dir))


def load_sharded_metadata(
    checkpoint_dir: str,
    sharded_strategy: LoadShardedStrategy | None = None,
    common_strategy: LoadCommonStrategy | None = None,
) -> dict[str, ShardedTensor | ShardedObject]:
    """As load_tensors_metadata, and the sharded objects by their unique keys."""
    sharded_strategy, _ = verify_checkpoint_and_load_strategy(
        checkpoint_dir, sharded_strategy, common_strategy
    )
    return sharded_strategy.load_sharded_metadata(Path(checkpoint_dir))


def load_plain_tensors(checkpoint_dir: str) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint, whole, on every rank; those of optimizers that are stored as flat pieces are flat."""
    return load(load_tensors_metadata(checkpoint_dir), checkpoint_dir, validate_access_integrity=False)


def get_default_save_sharded_strategy(backend: str = "torch_dist", version: int = 1) -> SaveShardedStrategy:
    """The strategy that writes sharded data in the format."""
    return get_default_strategy(StrategyAction.SAVE_SHARDED, backend, version)


def get_default_save_common_strategy(backend: str = "torch", version: int = 1) -> SaveCommonStrategy:
    """The strategy that writes common data in the format."""
    return get_default_strategy(StrategyAction.SAVE_COMMON, backend, version)


def get_default_load_sharded_strategy(checkpoint_dir: str) -> LoadShardedStrategy:
    """The strategy that reads the sharded data of the directory."""
    return verify_checkpoint_and_load_strategy(checkpoint_dir)[0]


def _resolve(strategy: Any, action: StrategyAction, default: tuple[str, int]) -> Any:
    if strategy is None or isinstance(strategy, tuple):
        return get_default_strategy(action, *(strategy or default))
    return strategy
