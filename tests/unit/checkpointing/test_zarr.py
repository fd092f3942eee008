"""Reading the zarr format: files that the zarr package wrote (tests/golden/checkpoints/README.md), and damaged ones."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.errors import CheckpointError
from tests.unit.checkpointing.toy import one_process

GOLDEN = Path(__file__).parents[2] / "golden/checkpoints/zarr/checkpoint.tar.xz"
WEIGHT = torch.arange(30, dtype=torch.float32).view(5, 6) / 7
EMBEDDING = (torch.arange(24) * 0.5).to(torch.bfloat16).view(2, 3, 4)


@pytest.fixture(autouse=True)
def _world() -> Iterator[None]:
    with one_process():
        yield


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    with tarfile.open(GOLDEN) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "zarr_ckpt"


def wanted(key: str, shape: tuple[int, ...], dtype: torch.dtype, *cut: tuple[int, int, int]) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(key, torch.zeros(shape, dtype=dtype), *cut)


def test_pieces_of_every_kind(directory: Path) -> None:
    state = dist_checkpointing.load(
        {
            "whole": wanted("decoder.layers.mlp.weight", (5, 6), torch.float32),
            "columns": wanted("decoder.layers.mlp.weight", (5, 2), torch.float32, (1, 1, 3)),
            "stacked": wanted("embedding.weight", (2, 3, 2), torch.bfloat16, (2, 1, 2)),
            "steps": wanted("steps", (7,), torch.int64),
            "scale": wanted("scale", (), torch.float64),
            "flags": wanted("flags", (3,), torch.bool),
            "rng": ShardedObject("rng_state", None, (1, 2), (0, 1)),
            "old": ShardedObject("old_state", None, (1, 2), (0, 1)),
        },
        str(directory),
        validate_access_integrity=False,
    )
    assert torch.equal(state["whole"], WEIGHT)
    assert torch.equal(state["columns"], WEIGHT[:, 2:4])
    assert torch.equal(state["stacked"], EMBEDDING[..., 2:])
    assert state["steps"].tolist() == [11 * i for i in range(7)] and state["scale"].item() == 2.5
    assert state["flags"].tolist() == [True, False, True]
    assert state["rng"] == {"cell": 1} and state["old"] == {"old": 1}
    assert state["iteration"] == 7


def test_a_slice_of_a_flattened_cell(directory: Path) -> None:
    """As an optimizer asks for its part of a parameter's state: elements 3 to 8 of the second half of the columns."""
    record = ShardedTensor.from_rank_offsets_flat(
        "decoder.layers.mlp.weight", torch.zeros(5), (5, 3), (1, 1, 2), flattened_range=slice(3, 8)
    )
    state = dist_checkpointing.load({"part": record}, str(directory), validate_access_integrity=False)
    assert torch.equal(state["part"], WEIGHT[:, 3:].flatten()[3:8])


def test_what_is_stored_is_listed(directory: Path) -> None:
    tensors = dist_checkpointing.load_tensors_metadata(str(directory))
    assert {key: tuple(record.global_shape) for key, record in tensors.items()} == {
        "decoder.layers.mlp.weight": (5, 6), "embedding.weight": (2, 3, 4), "flags": (3,), "scale": (), "steps": (7,),
    }  # fmt: skip
    assert tensors["embedding.weight"].dtype is torch.bfloat16
    objects = serialization.load_sharded_metadata(str(directory)).keys() - tensors.keys()
    assert objects == {f"{name}/shard_0.{cell}_1.2" for name in ("rng_state", "old_state") for cell in (0, 1)}


def test_damage_is_named(directory: Path) -> None:
    record = wanted("decoder.layers.mlp.weight", (5, 6), torch.float32)
    folder = directory / "decoder.layers.mlp.weight"

    def refused(match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            dist_checkpointing.load({"w": record}, str(directory))

    chunk = folder / "1.1"
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-4])
    refused(r"1\.1.*20 bytes, not 24")
    chunk.unlink()
    refused("only 24 of the 30 elements")
    chunk.write_bytes(content)
    description = json.loads((folder / ".zarray").read_text())
    for change in ({"compressor": {"id": "blosc"}}, {"order": "F"}, {"dtype": ">f4"}, {"zarr_format": 3}):
        (folder / ".zarray").write_text(json.dumps(description | change))
        refused("only uncompressed arrays of zarr 2")
    (folder / ".zarray").write_text(json.dumps(description | {"chunks": [2]}))
    refused("do not make up")
    (folder / ".zarray").write_text("{")
    refused("does not describe an array")
    (folder / ".zarray").unlink()
    refused("does not contain decoder.layers.mlp.weight")
