"""Spread the reading and writing of replicated pieces over the ranks that hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron.core.dist_checkpointing.agreement import agree
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_outplace,
    extract_matching_values,
    nested_values,
)
from megatron.core.dist_checkpointing.exchange_utils import (
    ShardDistribution,
    determine_main_replica_uniform_distribution,
    exchange_by_distribution,
    shard_id,
)
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, StateDict
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.base import AsyncSaveShardedStrategy, LoadShardedStrategy


class FullyParallelSaveStrategyWrapper(AsyncSaveShardedStrategy):
    """Every rank of the group writes an equal share of what the group would write.

    With `do_cache_distribution` the shares are decided at the first save only; the state must not change shape.
    """

    def __init__(
        self,
        strategy: Any,
        parallelization_group: dist.ProcessGroup | None = None,
        do_cache_distribution: bool = False,
    ) -> None:
        super().__init__(strategy.backend, strategy.version)
        self.base_strategy = strategy
        self.parallelization_group = parallelization_group or dist.group.WORLD
        self.do_cache_distribution = do_cache_distribution
        self.cached_distribution: ShardDistribution | None = None

    @property
    def can_handle_sharded_objects(self) -> bool:
        """As the wrapped strategy."""
        return self.base_strategy.can_handle_sharded_objects

    def async_save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> AsyncRequest:
        """Share out, then as the wrapped strategy."""
        self.apply_saving_parallelization(sharded_state_dict)
        return self.base_strategy.async_save(sharded_state_dict, checkpoint_dir)

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> None:
        """Share out, then as the wrapped strategy."""
        self.apply_saving_parallelization(sharded_state_dict)
        self.base_strategy.save(sharded_state_dict, checkpoint_dir)

    def apply_saving_parallelization(self, sharded_state_dict: ShardedStateDict) -> None:
        """Rewrite the replica ids so that each piece's main replica is on the rank chosen for it."""
        distribution = self.cached_distribution
        if distribution is None:
            distribution = determine_main_replica_uniform_distribution(
                sharded_state_dict, self.parallelization_group
            )
        if self.do_cache_distribution:
            self.cached_distribution = distribution
        distribute_main_replicas_with_precomputed_distribution(
            sharded_state_dict, self.parallelization_group, distribution
        )


def distribute_main_replicas_with_precomputed_distribution(
    sharded_state_dict: ShardedStateDict,
    parallelization_group: dist.ProcessGroup | None,
    precomputed_distribution: ShardDistribution | None,
) -> None:
    """Set every tensor's replica id to 0 on the rank chosen for it and to 1 elsewhere, in place."""
    if precomputed_distribution is None or parallelization_group is None:
        return
    own_rank = dist.get_rank(parallelization_group)
    seen = set()
    for record in nested_values(sharded_state_dict):
        if isinstance(record, ShardedTensor):
            identity = shard_id(record)
            chosen = precomputed_distribution.main_rank_for_shard.get(identity) == own_rank
            record.replica_id = 0 if chosen and identity not in seen else 1
            seen.add(identity)


class FullyParallelLoadStrategyWrapper(LoadShardedStrategy):
    """Every rank of the group reads an equal share of what its ranks request and sends it to the others."""

    def __init__(
        self,
        strategy: LoadShardedStrategy,
        parallelization_group: dist.ProcessGroup | None = None,
        do_cache_distribution: bool = False,
        exchange_algo: str = "broadcast",
    ) -> None:
        self.base_strategy = strategy
        self.parallelization_group = parallelization_group or dist.group.WORLD
        self.do_cache_distribution = do_cache_distribution
        self.exchange_algo = exchange_algo
        self.cached_distribution: ShardDistribution | None = None

    @property
    def can_handle_sharded_objects(self) -> bool:
        """As the wrapped strategy."""
        return self.base_strategy.can_handle_sharded_objects

    def load(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> StateDict:
        """The tree with every record replaced by its data. A collective of the group."""
        distribution = self.apply_loading_parallelization(sharded_state_dict)
        if distribution is None:
            return self.base_strategy.load(sharded_state_dict, checkpoint_dir)
        assert self.parallelization_group is not None, "without a group there is nothing to share out"
        own_rank = dist.get_rank(self.parallelization_group)
        records = {
            shard_id(leaf): leaf
            for leaf in nested_values(sharded_state_dict)
            if isinstance(leaf, ShardedTensor)
        }
        own = {i: r for i, r in records.items() if distribution.main_rank_for_shard[i] == own_rank}
        objects, _ = extract_matching_values(
            sharded_state_dict, lambda leaf: not isinstance(leaf, ShardedTensor), return_lists_as_dicts=True
        )
        error: CheckpointingException | None = None
        loaded: StateDict = {}
        try:
            loaded = self.base_strategy.load(
                {"tensors": dict(enumerate(own.values())), "objects": objects}, checkpoint_dir
            )
        except CheckpointingException as failed:
            error = failed
        agree(error)
        everything = exchange_by_distribution(
            dict(zip(own, loaded["tensors"].values())),
            {identity: record for identity, record in records.items() if identity not in own},
            distribution,
            self.parallelization_group,
            self.exchange_algo,
        )
        result = self.fill_in_deferred_sharded_tensors(sharded_state_dict, everything)
        _overlay(result, loaded["objects"])
        return result

    def apply_loading_parallelization(self, sharded_state_dict: ShardedStateDict) -> ShardDistribution | None:
        """Decide who reads what and rewrite the replica ids: 0 for what this rank reads. None for a group of one.

        A collective of the group.
        """
        distribution = self.cached_distribution
        if distribution is None:
            distribution = determine_main_replica_uniform_distribution(
                sharded_state_dict, self.parallelization_group, ignore_groups=True
            )
        if self.do_cache_distribution:
            self.cached_distribution = distribution
        distribute_main_replicas_with_precomputed_distribution(
            sharded_state_dict, self.parallelization_group, distribution
        )
        return distribution

    def fill_in_deferred_sharded_tensors(
        self, sharded_state_dict: ShardedStateDict, loaded_tensors: dict[Any, Any]
    ) -> StateDict:
        """The tree with every tensor record replaced by the loaded tensor of its identity."""
        return dict_list_map_outplace(
            lambda leaf: loaded_tensors[shard_id(leaf)] if isinstance(leaf, ShardedTensor) else leaf,
            sharded_state_dict,
        )

    def load_tensors_metadata(self, checkpoint_dir: Path) -> ShardedStateDict:
        """As the wrapped strategy."""
        return self.base_strategy.load_tensors_metadata(checkpoint_dir)

    def load_sharded_metadata(self, checkpoint_dir: Path) -> ShardedStateDict:
        """As the wrapped strategy."""
        return self.base_strategy.load_sharded_metadata(checkpoint_dir)

    def check_backend_compatibility(self, loaded_version: str) -> None:
        """As the wrapped strategy."""
        self.base_strategy.check_backend_compatibility(loaded_version)

    def check_version_compatibility(self, loaded_version: int) -> None:
        """As the wrapped strategy."""
        self.base_strategy.check_version_compatibility(loaded_version)


def _overlay(state: Any, part: Any) -> None:
    """Write the leaves of `part` (lists as dicts from position to value) over those of `state`, in place."""
    for name, value in part.items():
        if isinstance(value, dict) and isinstance(state[name], (dict, list)):
            _overlay(state[name], value)
        else:
            state[name] = value
