"""Checkpoints in the zarr format, written by its specification (version 2), for tests of what reads them."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from megatron.core.dist_checkpointing.strategies.resharding import Box
from megatron.core.dist_checkpointing.strategies.torch import StoredTensors

_NAMES = {
    torch.float32: "<f4",
    torch.float16: "<f2",
    torch.bfloat16: "bfloat16",
    torch.int64: "<i8",
    torch.uint8: "|u1",
}


def write_array(folder: Path, tensor: Tensor, chunks: tuple[int, ...]) -> None:
    """One array, in whole chunks: what reaches over the array's end is filled up with ones."""
    folder.mkdir(parents=True)
    description = {
        "zarr_format": 2, "shape": list(tensor.shape), "chunks": list(chunks), "dtype": _NAMES[tensor.dtype],
        "order": "C", "compressor": None, "filters": None, "fill_value": None,
    }  # fmt: skip
    (folder / ".zarray").write_text(json.dumps(description))
    counts = [range(-(-size // chunk)) for size, chunk in zip(tensor.shape, chunks)]
    for place in itertools.product(*counts):
        whole = torch.ones(chunks, dtype=tensor.dtype)
        part = tensor[tuple(slice(i * chunk, (i + 1) * chunk) for i, chunk in zip(place, chunks))]
        whole[tuple(slice(0, size) for size in part.shape)] = part
        name = ".".join(map(str, place)) or "0"
        (folder / name).write_bytes(whole.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def zarr_copy(source: Path, target: Path) -> Path:
    """The torch_dist checkpoint `source` in the zarr format; axes are cut in two where they can be."""
    stored = StoredTensors(source)
    target.mkdir(parents=True)
    shutil.copy(source / "common.pt", target)
    for key in stored.keys():  # noqa: SIM118 not a mapping
        if stored.is_tensor(key):
            shape = stored.shape(key)
            whole = torch.empty(shape, dtype=stored.dtype(key))
            stored.read_box(key, Box((0,) * len(shape), shape), whole)
            write_array(target / key, whole, tuple(max(1, -(-size // 2)) for size in shape))
        else:
            path = target / f"{key}.pt"
            path.parent.mkdir(exist_ok=True)
            torch.save(stored.read_object(key), path)
    config = {"sharded_backend": "zarr", "sharded_backend_version": 1}
    (target / "metadata.json").write_text(json.dumps(config))
    return target
