"""Share the work of a group: who of the ranks that hold a piece writes or reads it, and how it reaches the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron.core import device
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, is_main_replica

ShardId = tuple[str, tuple[int, ...], "tuple[int, int] | None"]


class ShardDistribution(NamedTuple):
    """Who handles each piece that ranks of a group hold.

    `main_rank_for_shard`: rank in the group; `shards_in_this_group`: pieces for which this group is responsible;
    `shard_to_metadata`: description of each piece; `all_ranks_for_shard`: every rank that holds it.
    """

    main_rank_for_shard: dict[ShardId, int]
    shards_in_this_group: set[ShardId]
    shard_to_metadata: dict[ShardId, ShardedTensor]
    all_ranks_for_shard: dict[ShardId, list[int]]


def shard_id(sharded_tensor: ShardedTensor) -> ShardId:
    """What makes a piece the same piece on two ranks."""
    held = sharded_tensor.flattened_range
    return (
        sharded_tensor.key,
        tuple(sharded_tensor.global_offset),
        None if held is None else (held.start, held.stop),
    )


def distribute_shards_to_ranks(
    shard_to_ranks: dict[Hashable, list[int]], shard_to_size: dict[Hashable, int], num_ranks: int
) -> dict[Hashable, int]:
    """Piece -> rank, evenly by bytes: scarce pieces first, then large ones, then in order of the pieces themselves.

    Each goes to the least loaded of the ranks that hold it.
    """
    order = sorted(shard_to_ranks, key=lambda s: (len(shard_to_ranks[s]), -shard_to_size[s], s))
    load = [0] * num_ranks
    chosen = {}
    for shard in order:
        target = min(shard_to_ranks[shard], key=lambda candidate: load[candidate])
        chosen[shard] = target
        load[target] += shard_to_size[shard]
    return chosen


def determine_main_replica_uniform_distribution(
    sharded_state_dict: ShardedStateDict,
    parallelization_group: dist.ProcessGroup | None,
    ignore_groups: bool = False,
) -> ShardDistribution | None:
    """Spread the pieces that ranks of the group hold over those ranks; None for a group of one. A collective.

    Only pieces whose main replica is in the group are its business, unless `ignore_groups` (when reading).
    """
    if parallelization_group is None or parallelization_group.size() <= 1:
        return None
    local = [
        leaf.without_data() for leaf in nested_values(sharded_state_dict) if isinstance(leaf, ShardedTensor)
    ]
    everyone: list[list[ShardedTensor]] = [[]] * parallelization_group.size()
    dist.all_gather_object(everyone, local, group=parallelization_group)
    holders: dict[ShardId, list[int]] = defaultdict(list)
    metadata: dict[ShardId, ShardedTensor] = {}
    ours: set[ShardId] = set()
    for holder, pieces in enumerate(everyone):
        for piece in pieces:
            identity = shard_id(piece)
            if holder not in holders[identity]:
                holders[identity].append(holder)
            metadata.setdefault(identity, piece)
            if ignore_groups or is_main_replica(piece.replica_id):
                ours.add(identity)
    main = distribute_shards_to_ranks(
        {identity: holders[identity] for identity in ours},
        {identity: _nbytes(metadata[identity]) for identity in ours},
        parallelization_group.size(),
    )
    return ShardDistribution(main, ours, metadata, dict(holders))  # type: ignore[arg-type]


def _nbytes(piece: ShardedTensor) -> int:
    if piece.flattened_range is not None:
        numel = piece.flattened_range.stop - piece.flattened_range.start
    else:
        numel = int(torch.Size(piece.local_shape).numel())
    return numel * piece.dtype.itemsize


def exchange_by_distribution(
    loaded_tensors: dict[ShardId, torch.Tensor],
    unloaded_shards: dict[ShardId, ShardedTensor],
    shard_distribution: ShardDistribution,
    parallelization_group: dist.ProcessGroup,
    exchange_algo: str = "broadcast",
) -> dict[ShardId, torch.Tensor]:
    """Send each piece from the rank that read it to the others that hold it; returns all pieces of this rank.

    Unread pieces are received into their records' data. `broadcast` is the one algorithm; the argument exists for
    callers of older versions. A collective of the group.
    """
    if exchange_algo not in ("broadcast", "gather_rounds", "gather_object"):
        raise ValueError(f"unknown exchange algorithm {exchange_algo}")
    tensors = dict(loaded_tensors)
    carrier = device.current() if dist.get_backend(parallelization_group) == "nccl" else torch.device("cpu")
    for identity, source in sorted(
        shard_distribution.main_rank_for_shard.items(), key=lambda item: repr(item[0])
    ):
        if len(shard_distribution.all_ranks_for_shard[identity]) == 1:
            continue
        description = shard_distribution.shard_to_metadata[identity]
        record = unloaded_shards.get(identity)
        if identity in loaded_tensors:
            payload = loaded_tensors[identity].detach().to(carrier).contiguous()
        else:
            shape = description.local_shape
            if description.flattened_range is not None:
                shape = (description.flattened_range.stop - description.flattened_range.start,)
            payload = torch.empty(shape, dtype=description.dtype, device=carrier)
        dist.broadcast(
            payload, dist.get_global_rank(parallelization_group, source), group=parallelization_group
        )
        if record is not None:
            record.init_data("cpu")
            assert record.data is not None, "data was allocated"
            record.data.detach().copy_(payload)
            tensors[identity] = record.data
    return tensors
