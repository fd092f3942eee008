"""Distributed checkpoints over ranks: any layout to any layout, integrity, strictness, shared work, failures."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from tests.gang.harness import GangError, run_gang

LAYERS, ROWS, COLUMNS = 4, 16, 8
# (pipeline, tensor) sizes; the rest of the gang are replicas.
LAYOUTS = [(1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (1, 4)]


def _whole(name: str) -> torch.Tensor:
    """The global tensor of that name."""
    shape = {
        "rows": (LAYERS, ROWS, COLUMNS),
        "columns": (LAYERS, ROWS, COLUMNS),
        "gated": (ROWS, COLUMNS),
        "bias": (ROWS,),
    }[name]
    start = {"rows": 0, "columns": 1000, "gated": 2000, "bias": 3000}[name]
    return torch.arange(start, start + math.prod(shape), dtype=torch.float32).view(shape)


def _place(layout: tuple[int, int]) -> tuple[int, int, int, int]:
    """(pipeline rank, tensor rank, replica, replicas)."""
    pp, tp = layout
    rank, rest = dist.get_rank(), dist.get_world_size() // (pp * tp)
    return rank // (tp * rest), rank % tp, rank // tp % rest, rest


def _gated(key: str, data: torch.Tensor, tp: tuple[int, int], replica: Any) -> ShardedTensorFactory:
    rank, size = tp

    def build(key: str, tensor: torch.Tensor, replica_id: Any, flattened_range: slice | None) -> Any:
        halves = tensor.chunk(2, dim=0)
        return [
            ShardedTensor.from_rank_offsets(
                key, half.contiguous(), (0, rank + size * i, 2 * size), replica_id=replica_id
            )
            for i, half in enumerate(halves)
        ]

    return ShardedTensorFactory(key, data, build, lambda parts: torch.cat(parts), replica)


def _state(layout: tuple[int, int], fill: bool, flat: bool) -> dict[str, Any]:
    """This rank's part of a small model in the layout, from the global tensors or zero; optimizer state flat or not."""
    pp, tp = layout
    stage, tensor_rank, replica, replicas = _place(layout)
    state: dict[str, Any] = {"iteration": 7, "layers": []}
    tied_to_first = 0 if stage == 0 else 1
    for local in range(LAYERS // pp):
        layer = stage * (LAYERS // pp) + local
        pieces = {
            "rows": _whole("rows")[layer].chunk(tp, 0),
            "columns": _whole("columns")[layer].chunk(tp, 1),
        }
        entry: dict[str, Any] = {}
        for name, parts in pieces.items():
            data = parts[tensor_rank].clone()
            offsets = ((0, layer, LAYERS), (1 if name == "rows" else 2, tensor_rank, tp))
            record = ShardedTensor.from_rank_offsets(
                f"layers.{name}",
                data if fill else torch.zeros_like(data),
                *offsets,
                replica_id=(0, 0, replica),
                prepend_axis_num=1,
            )
            entry[name] = record
            moment = (data + 0.5).flatten()
            if flat:
                share = -(-moment.numel() // replicas)
                own = slice(replica * share, min((replica + 1) * share, moment.numel()))
                entry[f"moment.{name}"] = ShardedTensor.from_rank_offsets_flat(
                    f"moment.{name}",
                    moment[own] if fill else torch.zeros_like(moment[own]),
                    data.shape,
                    *offsets,
                    flattened_range=own,
                    prepend_axis_num=1,
                )
            else:
                entry[f"moment.{name}"] = ShardedTensor.from_rank_offsets(
                    f"moment.{name}",
                    data + 0.5 if fill else torch.zeros_like(data),
                    *offsets,
                    replica_id=(0, 0, replica),
                    prepend_axis_num=1,
                )
        state["layers"].append(entry)
    gate, up = (half.chunk(tp)[tensor_rank] for half in _whole("gated").chunk(2))
    gated = torch.cat([gate, up])
    state["gated"] = _gated(
        "gated", gated if fill else torch.zeros_like(gated), (tensor_rank, tp), (tied_to_first, 0, replica)
    )
    bias = _whole("bias")
    state["bias"] = ShardedTensor.from_rank_offsets(
        "bias", bias if fill else torch.zeros_like(bias), replica_id=(stage, tensor_rank, replica)
    )
    state["here"] = LocalNonpersistentObject(dist.get_rank())
    return state


def _plain(state: Any) -> Any:
    """The tensors a state dict should have after loading."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_plain(value) for value in state]
    if isinstance(state, LocalNonpersistentObject):
        return state.unwrap()
    return getattr(state, "data", state) if not isinstance(state, torch.Tensor) else state


def _save(directory: str, layout: tuple[int, int], flat: bool, parallel: bool = False) -> None:
    if dist.get_rank() == 0:
        Path(directory).mkdir()
    strategy: Any = TorchDistSaveShardedStrategy()
    if parallel:
        strategy = FullyParallelSaveStrategyWrapper(strategy)
    dist_checkpointing.save(_state(layout, True, flat), directory, strategy)


def _load_and_compare(
    directory: str, layout: tuple[int, int], flat: bool, parallel: bool = False
) -> list[str]:
    strategy: Any = TorchDistLoadShardedStrategy()
    if parallel:
        strategy = FullyParallelLoadStrategyWrapper(strategy)
    expected = _plain(_state(layout, True, flat))
    loaded = dist_checkpointing.load(_state(layout, False, flat), directory, strategy)
    wrong = dist_checkpointing.dict_utils.diff(expected, loaded)
    return [str(part) for part in wrong if part]


def _round_trips(root: str, flat_save: bool, flat_load: bool, parallel: bool) -> list[str]:
    problems = []
    world = dist.get_world_size()
    layouts = [layout for layout in LAYOUTS if world % math.prod(layout) == 0]
    for number, saved in enumerate(layouts):
        directory = f"{root}/{number}"
        _save(directory, saved, flat_save, parallel)
        for loaded in layouts:
            problems += [
                f"{saved}->{loaded}: {p}" for p in _load_and_compare(directory, loaded, flat_load, parallel)
            ]
    return problems


@pytest.mark.parametrize(
    ("world", "flat_save", "flat_load", "parallel"),
    [
        (1, True, True, False),
        (2, True, False, False),
        (4, False, True, False),
        (4, True, False, True),
        (4, True, True, True),
    ],
)
def test_any_layout_to_any_layout(
    tmp_path: Path, world: int, flat_save: bool, flat_load: bool, parallel: bool
) -> None:
    """Weights and moments, whole or cut into flat optimizer shards, come back bit for bit in every other layout."""
    for problems in run_gang(world, _round_trips, str(tmp_path), flat_save, flat_load, parallel):
        assert problems == []


def _save_one_way(directory: str) -> None:
    _save(directory, (2, 2), True, parallel=True)


def test_plain_pytorch_reads_the_weights(tmp_path: Path) -> None:
    """torch.distributed.checkpoint alone finds every tensor under its key, whole."""
    run_gang(4, _save_one_way, str(tmp_path / "ckpt"))
    loaded = _load_state_dict_from_keys(
        {"layers.rows", "layers.columns", "gated", "bias"}, checkpoint_id=str(tmp_path / "ckpt")
    )
    for name, key in {
        "rows": "layers.rows",
        "columns": "layers.columns",
        "gated": "gated",
        "bias": "bias",
    }.items():
        found = loaded["layers"][name] if key.startswith("layers.") and "layers" in loaded else loaded[key]
        assert torch.equal(found, _whole(name)), key
    metadata = dcp.FileSystemReader(str(tmp_path / "ckpt")).read_metadata()
    # One row per grid cell (layer, tensor-parallel part, 1), then the flattened cell.
    assert tuple(metadata.state_dict_metadata["moment.rows"].size) == (LAYERS, 2, 1, ROWS // 2 * COLUMNS)
    assert metadata.mcore_data["moment.rows"] == {
        "nd_reformulated_orig_global_shape": (LAYERS, ROWS, COLUMNS)
    }


def _save_pieces(directory: str, mistake: str) -> None:
    """Two ranks, half a tensor each, with a mistake."""
    rank = dist.get_rank()
    if rank == 0:
        Path(directory).mkdir(exist_ok=True)
    position = 0 if mistake == "twice" else rank
    replica = rank if mistake == "nobody" else 0
    dtype = torch.float64 if mistake == "dtype" and rank else torch.float32
    pieces = 3 if mistake == "fragments" and rank else 2
    record = ShardedTensor.from_rank_offsets(
        "weight", torch.zeros(4, dtype=dtype), (0, position, pieces), replica_id=replica
    )
    state: dict[str, Any] = {"w": record}
    if mistake == "object":
        state["o"] = ShardedObject("weight_object", rank, (3,), (rank,))
    if mistake == "full" and rank == 1:
        (Path(directory) / "__1_0.distcp").mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(state, directory) if mistake != "full" else _save_into(state, directory)


def _save_into(state: dict[str, Any], directory: str) -> None:
    """The strategy alone, so that the destination may be prepared."""
    TorchDistSaveShardedStrategy().save({"w": state["w"]}, Path(directory))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("twice", "weight: its pieces do not cover it exactly once"),
        ("nobody", "no rank writes the piece"),
        ("dtype", "the ranks disagree on its dtype"),
        ("fragments", "the ranks disagree on its global_shape"),
        ("object", "no rank writes the piece at"),
        ("full", "__1_0.distcp"),
    ],
)
def test_every_rank_learns_of_a_mistake(tmp_path: Path, mistake: str, message: str) -> None:
    """Contradictory pieces, and a rank that cannot write its file, stop all ranks with the cause."""
    with pytest.raises(GangError) as caught:
        run_gang(2, _save_pieces, str(tmp_path / "ckpt"), mistake)
    text = str(caught.value)
    assert "2 of 2 ranks failed" in text
    assert text.count(message) >= 2
    assert not (tmp_path / "ckpt" / "metadata.json").exists()


def _strictness(directory: str, mode: str) -> Any:
    half = ShardedTensor.from_rank_offsets("weight", torch.zeros(4), (0, dist.get_rank(), 2))
    if mode == "save":
        if dist.get_rank() == 0:
            Path(directory).mkdir()
        spare = {
            "s": ShardedTensor.from_rank_offsets("spare", torch.ones(2), replica_id=dist.get_rank()),
            "o": ShardedObject("spare object", 1, (2,), (dist.get_rank(),)),
        }
        return dist_checkpointing.save({"w": half, **spare, "common": [1, {"two": 2}]}, directory)
    extra = {
        "e": ShardedTensor.from_rank_offsets("absent", torch.zeros(2), replica_id=dist.get_rank()),
        "f": ShardedObject("absent object", 1, (2,), (dist.get_rank(),)),
    }
    loaded = dist_checkpointing.load({"w": half, **extra}, directory, strict=mode)
    return loaded if isinstance(loaded, tuple) else (loaded,)


def test_strictness(tmp_path: Path) -> None:
    """Unexpected keys fail, are dropped or are returned, as the mode says; missing ones are seen by the `all` modes."""
    directory = str(tmp_path / "ckpt")
    run_gang(2, _strictness, directory, "save")
    for mode, message in {
        "assume_ok_unexpected": "does not contain absent",
        "raise_unexpected": "Unexpected keys (requested but not stored): absent, absent object",
        "raise_all": "Missing keys (stored but not requested): spare, spare object",
        "sometimes": "Invalid strict flag sometimes",
    }.items():
        with pytest.raises(GangError, match=re.escape(message)):
            run_gang(2, _strictness, directory, mode)
    for mode in ("log_unexpected", "log_all", "ignore_all"):
        for (state,) in run_gang(2, _strictness, directory, mode):
            assert set(state) == {"w", "common"} and state["common"] == [1, {"two": 2}]
    for state, missing, unexpected in run_gang(2, _strictness, directory, "return_all"):
        assert (set(state), missing, unexpected) == (
            {"w", "common"},
            {"spare", "spare object"},
            {"absent", "absent object"},
        )
    for _, missing, unexpected in run_gang(2, _strictness, directory, "return_unexpected"):
        assert (missing, unexpected) == (set(), {"absent", "absent object"})
