"""Storage strategies that users write: shared out over ranks, and what goes wrong told as v0.9 tells it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException as TorchCheckpointException

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, is_main_replica
from megatron.core.dist_checkpointing.strategies.base import (
    LoadShardedStrategy,
    SaveShardedStrategy,
    StrategyAction,
    get_default_strategy,
)
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from tests.gang.harness import run_gang


def _main_keys(records: Any) -> set[str]:
    return {record.key for record in nested_values(records) if is_main_replica(record.replica_id)}


class _Save(SaveShardedStrategy):
    """Remembers what it was told to write."""

    def __init__(self) -> None:
        super().__init__("memory", 1)
        self.keys: set[str] = set()

    def save(self, sharded_state_dict: Any, checkpoint_dir: Path) -> None:
        self.keys = _main_keys(sharded_state_dict)


class _Load(LoadShardedStrategy):
    """Fills tensors with the rank that reads them; objects are their keys. Defines what v0.9 demands, no more."""

    def __init__(self) -> None:
        self.keys: set[str] = set()

    def load(self, sharded_state_dict: Any, checkpoint_dir: Path) -> Any:
        self.keys = _main_keys(sharded_state_dict)
        return dict_list_map_outplace(self._value, sharded_state_dict)

    def _value(self, record: Any) -> Any:
        if isinstance(record, ShardedObject):
            return record.key
        return torch.full(record.local_shape, float(dist.get_rank()))

    def load_tensors_metadata(self, checkpoint_dir: Path) -> Any:
        return {"known": None}

    def check_backend_compatibility(self, loaded_version: str) -> None: ...

    def check_version_compatibility(self, loaded_version: int) -> None: ...


def _records() -> dict[str, Any]:
    """One tensor cut over all ranks, three whole ones, and an object."""
    rank = dist.get_rank()
    whole = {"large": 100, "small a": 10, "small b": 10}
    return {
        "cut": ShardedTensor.from_rank_offsets("cut", torch.zeros(2), (0, rank, dist.get_world_size())),
        "whole": [
            ShardedTensor.from_rank_offsets(k, torch.zeros(n), replica_id=rank) for k, n in whole.items()
        ],
        "object": ShardedObject("object", None, (1,), (0,), replica_id=rank),
    }


def _share_out() -> tuple[set[str], list[int], set[str], Any, Any]:
    saved = _Save()
    wrapper = FullyParallelSaveStrategyWrapper(saved, do_cache_distribution=True)
    wrapper.save(_records(), Path("nowhere"))
    distribution = wrapper.cached_distribution
    assert distribution is not None, "it was asked to keep the shares"
    cut = [rank for shard, rank in distribution.main_rank_for_shard.items() if shard[0] == "cut"]
    loaded = _Load()
    state = FullyParallelLoadStrategyWrapper(loaded).load(_records(), Path("nowhere"))
    return saved.keys, cut, loaded.keys, state, loaded.load_sharded_metadata(Path("nowhere"))


def test_strategies_of_ones_own_are_shared_out() -> None:
    """Scarce pieces first, then large ones, then by key, each to the rank that has least; the others get it from there."""
    share = [{"cut", "large"}, {"cut", "small a"}, {"cut", "small b"}, {"cut"}]
    for rank, (saved, cut, loaded, state, metadata) in enumerate(run_gang(4, _share_out)):
        objects = {"object"} if rank == 0 else set()
        assert saved == loaded == share[rank] | objects
        assert cut == [0, 1, 2, 3]
        assert state["cut"].tolist() == [rank] * 2
        assert [tensor[0].item() for tensor in state["whole"]] == [0, 1, 2]
        assert state["object"] == "object"
        assert metadata == {"known": None}


def _mistakes(directory: str) -> list[str]:
    def message(kind: type[BaseException], records: dict[str, Any], place: str) -> str:
        with pytest.raises(kind) as caught:
            dist_checkpointing.load(records, place)
        return str(caught.value)

    rank = dist.get_rank()
    records = {"t": ShardedTensor.from_rank_offsets("stored", torch.zeros(2), replica_id=rank)}
    absent = {"t": ShardedTensor.from_rank_offsets("absent", torch.zeros(2), replica_id=rank)}
    nowhere = message(CheckpointingException, records, f"{directory}/nowhere")
    empty = message(CheckpointingException, records, directory)
    dist.barrier()
    dist_checkpointing.save(records, directory)
    return [
        nowhere,
        empty,
        message(TorchCheckpointException, absent, directory),
        message(CheckpointingException, absent, directory),
    ]


def test_mistakes_are_caught_as_in_v09(tmp_path: Path) -> None:
    """The error for a key that is not stored is torch's as well as ours, with one text."""
    for nowhere, empty, as_torch, as_ours in run_gang(2, _mistakes, str(tmp_path)):
        assert f"directory {tmp_path}/nowhere does not exist" in nowhere
        assert f"{tmp_path}" in empty and "is not a distributed checkpoint" in empty
        assert "does not contain absent" in as_torch and as_torch == as_ours


@pytest.mark.parametrize(
    ("data", "piece", "what"),
    [
        (torch.zeros(2, 3), slice(0, 6), "is 1-D, not 2-D"),
        (torch.zeros(6), None, "is missing"),
        (torch.zeros(5), slice(0, 6), "data has shape"),
    ],
)
def test_flat_pieces_are_checked(data: torch.Tensor, piece: slice | None, what: str) -> None:
    with pytest.raises(CheckpointingException, match=what):
        ShardedTensor.from_rank_offsets_flat("weight", data, (2, 3), flattened_range=piece)


@pytest.mark.parametrize(
    ("kind", "offsets"),
    [
        (AssertionError, [(0, 2, 2)]),
        (AssertionError, [(0, -1, 2)]),
        (AssertionError, [(2, 0, 2)]),
        (CheckpointingException, [(0, 0, 2), (0, 1, 2)]),
    ],
)
def test_places_outside_a_tensor(kind: type[Exception], offsets: list[tuple[int, int, int]]) -> None:
    with pytest.raises(kind, match="sharded tensor weight"):
        ShardedTensor.from_rank_offsets("weight", torch.zeros(2, 3), *offsets)


def test_formats_that_nothing_here_knows() -> None:
    """The message names the formats that are known, whatever was imported before."""
    with pytest.raises(
        CheckpointingException, match=r"load sharded .*\(known: torch_dist 1, zarr 1\).*with the program"
    ):
        get_default_strategy(StrategyAction.LOAD_SHARDED, "zarr", 2)
    with pytest.raises(
        CheckpointingException, match=r"save common .*\(known: torch 1\).* choose a known one"
    ):
        get_default_strategy(StrategyAction.SAVE_COMMON, "zarr", 1)
    with pytest.raises(
        CheckpointingException, match=r"save sharded .*\(known: torch_dist 1\).* choose a known one"
    ):
        get_default_strategy(StrategyAction.SAVE_SHARDED, "zarr", 1)
