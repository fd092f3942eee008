"""Checksums that are put together from parts, and the memory that asynchronous saves copy into, against plain ones."""

from __future__ import annotations

import json
import os
import random
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

from megatron.core.dist_checkpointing import durable
from megatron.core.dist_checkpointing.durable import Checksum, ChecksumWriter
from megatron.core.dist_checkpointing.strategies.filesystem_async import CopyMemory


def _plain(content: bytes) -> Checksum:
    return Checksum(len(content), zlib.crc32(content))


def test_joined_parts_have_the_checksum_of_the_whole() -> None:
    chance = random.Random(4)
    for sizes in [
        (0, 0),
        (0, 9),
        (9, 0),
        *((chance.randrange(5000), chance.randrange(5000)) for _ in range(50)),
    ]:
        one, other = (os.urandom(size) for size in sizes)
        assert durable.joined(_plain(one), _plain(other)) == _plain(one + other)


@pytest.mark.parametrize("size", [0, 1, 1000, 1001, 3000, 3999])
def test_files_are_summed_in_shares(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "_SHARE_BYTES", 1000)
    monkeypatch.setattr(durable, "_BLOCK_BYTES", 300)
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    assert durable.checksum_file(tmp_path / "file") == _plain(content)


@pytest.mark.parametrize("with_sums", [True, False])
def test_archives_are_summed_while_they_are_written(tmp_path: Path, with_sums: bool) -> None:
    """Several archives in one file, tensors small and large, views, objects and plain bytes between them."""
    path = tmp_path / "file"
    torch.serialization.set_crc32_options(with_sums)
    try:
        writer = ChecksumWriter(path)
        for number in range(3):
            large = torch.randn(2**17 + number)
            writer.save({"large": large, "view": torch.randn(2**18)[5:9], "pair": [torch.ones(3), large * 2]})
            writer.write(b"between")
        writer.save(torch.randn(2**17))
        writer.close()
    finally:
        torch.serialization.set_crc32_options(True)
    assert writer.checksum() == _plain(path.read_bytes())


def test_the_archives_own_sums_are_those_used(tmp_path: Path) -> None:
    """What `_sums_of_archive` reports is what lies at that place."""
    writer = ChecksumWriter(tmp_path / "file")
    writer.write(b"before")
    writer.save({"weight": torch.randn(2**17)})
    writer.close()
    content = (tmp_path / "file").read_bytes()
    sums = durable._sums_of_archive(tmp_path / "file")
    assert len(sums) == len(zipfile.ZipFile(tmp_path / "file").namelist())
    for (start, size), crc32 in sums.items():
        assert zlib.crc32(content[start : start + size]) == crc32
    assert 2**19 in {size for _, size in sums}


def test_copies_are_independent_and_their_memory_is_used_again() -> None:
    memory = CopyMemory()
    tensors = [
        torch.randn(40, 30),
        torch.randn(40, 30).t(),
        torch.randn(8, 8).bfloat16()[2:5],
        torch.tensor(3.5),
        torch.arange(5) > 2,
    ]
    copies = [memory.copy(tensor) for tensor in tensors]
    expected = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.zero_()
    for copy, wanted in zip(copies, expected):
        assert copy.dtype == wanted.dtype and copy.is_contiguous() and torch.equal(copy, wanted)
        assert copy.untyped_storage().nbytes() == copy.numel() * copy.element_size()
    places = {copy.data_ptr() for copy in copies}
    memory.keep_only(copies)
    again = [memory.copy(wanted) for wanted in expected]
    assert {copy.data_ptr() for copy in again} == places
    assert all(torch.equal(copy, wanted) for copy, wanted in zip(again, expected))
    assert memory.copy(expected[0]).data_ptr() not in places


def test_manifests_without_a_writer_are_read(tmp_path: Path) -> None:
    """As they were written at first: the sum covers the files' entries alone, with sorted keys."""
    files = {"mp_rank_00/model_optim_rng.pt": [12, "0a0b0c0d"]}
    own = f"{zlib.crc32(json.dumps(files, sort_keys=True).encode()):08x}"
    (tmp_path / "checksums.json").write_text(json.dumps({"algorithm": "crc32", "files": files, "own": own}))
    assert durable.read_manifest(tmp_path) == {"mp_rank_00/model_optim_rng.pt": Checksum(12, 0x0A0B0C0D)}
    assert durable.read_writer(tmp_path) == {}
