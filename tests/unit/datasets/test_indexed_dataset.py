"""Token files: recorded bytes, every access path, foreign writers, damage."""

from __future__ import annotations

import io
import itertools
import pickle
import shutil
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from megatron.core.datasets import indexed_dataset, utils_s3
from megatron.core.datasets.indexed_dataset import (
    DType,
    IndexedDataset,
    IndexedDatasetBuilder,
    get_bin_path,
    get_idx_path,
)
from megatron.core.datasets.utils_s3 import S3Config
from megatron.core.errors import DataError
from tests.unit.datasets.support import GOLDEN

PREFIXES = sorted(str(path.relative_to(GOLDEN))[: -len(".idx")] for path in (GOLDEN / "bin").glob("*.idx"))


def is_multimodal(prefix: str) -> bool:
    return prefix.endswith("multimodal")


def parse(prefix: str | Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """dtype, lengths, pointers, boundaries and tokens, read by the published layout."""
    raw = Path(f"{prefix}.idx").read_bytes()
    magic, version, code, sequences, boundaries = struct.unpack_from("<9sQBQQ", raw)
    assert (magic, version) == (b"MMIDIDX\0\0", 1)
    names = ["uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"]
    dtype = np.dtype(names[code - 1])
    lengths = np.frombuffer(raw, "<i4", sequences, 34)
    pointers = np.frombuffer(raw, "<i8", sequences, 34 + 4 * sequences)
    bounds = np.frombuffer(raw, "<i8", boundaries, 34 + 12 * sequences)
    return dtype, lengths, pointers, bounds, np.fromfile(f"{prefix}.bin", dtype)


def assert_same_files(prefix: Path, expected: str) -> None:
    for path in (get_bin_path, get_idx_path):
        assert Path(path(str(prefix))).read_bytes() == Path(path(expected)).read_bytes(), path(expected)


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_reads_recorded_files(prefix: str, mmap: bool) -> None:
    dtype, lengths, pointers, bounds, tokens = parse(prefix)
    dataset = IndexedDataset(prefix, multimodal=is_multimodal(prefix), mmap=mmap)
    dataset.verify()
    assert len(dataset) == lengths.size and dataset.sequence_lengths.dtype == np.int32
    np.testing.assert_array_equal(dataset.sequence_lengths, lengths)
    np.testing.assert_array_equal(dataset.document_indices, bounds)
    for i in range(len(dataset)):
        first = pointers[i] // dtype.itemsize
        expected = tokens[first : first + lengths[i]]
        item = dataset[i]
        sequence = item[0] if is_multimodal(prefix) else item
        assert sequence.dtype == dtype
        np.testing.assert_array_equal(sequence, expected)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_writes_recorded_bytes(prefix: str, tmp_path: Path) -> None:
    """Item by item, document by document, all at once, and as a merge of one."""
    multimodal = is_multimodal(prefix)
    dtype, lengths, _, bounds, tokens = parse(prefix)
    source = IndexedDataset(prefix, multimodal=multimodal)
    builders = [IndexedDatasetBuilder(f"{tmp_path}/{i}.bin", dtype, multimodal) for i in range(4)]
    position = 0
    for first, end in itertools.pairwise(bounds):
        count = int(lengths[first:end].sum())
        modes = source.sequence_modes[first:end].tolist() if multimodal else None
        document = torch.from_numpy(tokens[position : position + count].astype(np.int64))
        builders[1].add_document(document, lengths[first:end].tolist(), modes)
        position += count
        for i in range(first, end):
            builders[0].add_item(*source[i]) if multimodal else builders[0].add_item(source[i])
        builders[0].end_document()
    builders[2].add_index(prefix)
    if not multimodal:
        builders[3].add_documents(tokens, lengths, np.diff(bounds))
    for i, builder in enumerate(builders[: 3 if multimodal else 4]):
        builder.finalize(f"{tmp_path}/{i}.idx")
        assert_same_files(tmp_path / str(i), prefix)


def test_merge_concatenates(tmp_path: Path) -> None:
    parts = [f"bin/gpt_{name}_text_document" for name in "abc"]
    builder = IndexedDatasetBuilder(f"{tmp_path}/all.bin", np.uint16)
    for part in parts:
        builder.add_index(part)
    builder.finalize(f"{tmp_path}/all.idx")
    assert_same_files(tmp_path / "all", "bin/gpt_text_document")
    with pytest.raises(DataError, match=r"null32_text_document\.idx: holds int32 tokens .* uint16"):
        IndexedDatasetBuilder(f"{tmp_path}/x.bin", np.uint16).add_index("bin/null32_text_document")


def test_merge_leaves_out_bytes_that_belong_to_no_sequence(tmp_path: Path) -> None:
    """As after a writer that died between its tokens and its index."""
    for name in ("a", "b"):
        part = f"gpt_{name}_text_document"
        (tmp_path / f"{part}.idx").write_bytes(Path(f"bin/{part}.idx").read_bytes())
        (tmp_path / f"{part}.bin").write_bytes(Path(f"bin/{part}.bin").read_bytes() + b"trailing")
    builder = IndexedDatasetBuilder(f"{tmp_path}/all.bin", np.uint16)
    for part in (
        tmp_path / "gpt_a_text_document",
        tmp_path / "gpt_b_text_document",
        "bin/gpt_c_text_document",
    ):
        builder.add_index(str(part))
    builder.finalize(f"{tmp_path}/all.idx")
    assert_same_files(tmp_path / "all", "bin/gpt_text_document")


def test_access_paths() -> None:
    dataset = IndexedDataset("bin/gpt_text_document")
    first = dataset[0]
    np.testing.assert_array_equal(dataset[np.int64(0)], first)
    np.testing.assert_array_equal(dataset[-1], dataset[len(dataset) - 1])
    np.testing.assert_array_equal(dataset.get(0, offset=2, length=3), first[2:5])
    np.testing.assert_array_equal(dataset.get(0, offset=2), first[2:])
    assert dataset.get(0, offset=first.size).size == 0
    assert [s.size for s in dataset[3:6]] == dataset.sequence_lengths[3:6].tolist()
    for wrong in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError):
            dataset[wrong]
    with pytest.raises(IndexError, match="tokens 2 to"):
        dataset.get(0, offset=2, length=first.size)
    with pytest.raises(ValueError, match="must be contiguous"):
        dataset[0:4:2]
    with pytest.raises(TypeError):
        dataset["0"]
    copy = pickle.loads(pickle.dumps(dataset))
    np.testing.assert_array_equal(copy[5], dataset[5])
    modes = IndexedDataset("bin/multimodal", multimodal=True)
    assert modes[0:2][1].tolist() == [0, 1] and modes[1][1] == 1
    # An array outlives the dataset it was taken from.
    view = IndexedDataset("bin/gpt_text_document").sequence_lengths
    assert view.sum() == parse("bin/gpt_text_document")[1].sum()


def test_dtypes() -> None:
    for code, name in enumerate(
        ["uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"], 1
    ):
        dtype = np.dtype(name)
        assert DType.code_from_dtype(dtype) == code and np.dtype(DType.dtype_from_code(code)) == dtype
        assert DType.size(code) == DType.size(dtype) == dtype.itemsize
    with pytest.raises(KeyError):
        DType.code_from_dtype(np.uint32)
    with pytest.raises(ValueError, match="9 is not a valid DType"):
        DType.dtype_from_code(9)
    sizes = [(0, np.uint16), (65499, np.uint16), (65500, np.int32), (None, np.int32)]
    assert all(DType.optimal_dtype(cardinality) == dtype for cardinality, dtype in sizes)


def test_token_outside_the_dtype(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(f"{tmp_path}/x.bin", np.uint16)
    with pytest.raises(OverflowError, match="token ids 1 to 65536 do not fit uint16"):
        builder.add_document([1, 65536], [2])
    with pytest.raises(ValueError, match="3 tokens were given for lengths that sum to 2"):
        builder.add_document([1, 2, 3], [2])


def test_offsets_beyond_two_gib(tmp_path: Path) -> None:
    """A sparse file of 6 GiB: offsets are written and read in 64 bits."""
    lengths = np.full(3, 2**30, dtype=np.int32)
    with open(tmp_path / "a.bin", "wb") as stream:
        stream.truncate(3 * 2**31)
        stream.seek(2**32 + 2)
        stream.write(struct.pack("<H", 77))
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 3, 2)
    pointers = np.arange(3, dtype="<i8") * 2**31
    bounds = np.array([0, 3], dtype="<i8")
    raw = header + lengths.tobytes() + pointers.tobytes() + bounds.tobytes()
    (tmp_path / "a.idx").write_bytes(raw)
    for mmap in (True, False):
        assert IndexedDataset(f"{tmp_path}/a", mmap=mmap).get(2, offset=1, length=1).tolist() == [77]
    builder = IndexedDatasetBuilder(f"{tmp_path}/b.bin", np.uint16)
    builder._add_lengths(lengths, None)
    builder.end_document()
    builder.finalize(f"{tmp_path}/b.idx")
    assert (tmp_path / "b.idx").read_bytes() == raw


def test_many_documents_spill_to_disk_and_keep_their_order(tmp_path: Path) -> None:
    counts = np.arange(1_500_000, dtype=np.int32) % 3
    builder = IndexedDatasetBuilder(f"{tmp_path}/x.bin", np.uint8)
    for part in np.array_split(counts, 5):
        builder.add_documents(np.zeros(part.sum(), np.uint8), part, np.ones(part.size, np.int64))
    builder.finalize(f"{tmp_path}/x.idx")
    _, lengths, pointers, bounds, _ = parse(tmp_path / "x")
    np.testing.assert_array_equal(lengths, counts)
    np.testing.assert_array_equal(pointers, np.cumsum(counts) - counts)
    np.testing.assert_array_equal(bounds, np.arange(counts.size + 1))
    IndexedDataset(f"{tmp_path}/x").verify()


def test_empty_dataset(tmp_path: Path) -> None:
    IndexedDatasetBuilder(f"{tmp_path}/x.bin", np.uint16).finalize(f"{tmp_path}/x.idx")
    assert (tmp_path / "x.idx").stat().st_size == 42
    for mmap in (True, False):
        dataset = IndexedDataset(f"{tmp_path}/x", mmap=mmap)
        assert len(dataset) == 0 and dataset.document_indices.tolist() == [0] and dataset[0:0] == []


@pytest.mark.parametrize(("code", "dtype"), [(8, np.uint16), (4, np.int32)])
def test_files_of_other_writers(code: int, dtype: Any, tmp_path: Path) -> None:
    """One document per sequence with int32 or uint16 tokens, as datatrove and NeMo Curator lay it out."""
    documents = [[5, 6, 7], [8], [9, 10]]
    tokens = np.concatenate(documents).astype(dtype)
    lengths = np.array([len(d) for d in documents], dtype="<i4")
    starts = (np.cumsum(lengths) - lengths) * tokens.itemsize
    (tmp_path / "x.bin").write_bytes(tokens.tobytes())
    raw = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, 3, 4) + lengths.tobytes()
    (tmp_path / "x.idx").write_bytes(
        raw + starts.astype("<i8").tobytes() + np.arange(4, dtype="<i8").tobytes()
    )
    dataset = IndexedDataset(f"{tmp_path}/x")
    assert [s.tolist() for s in dataset[:]] == documents


# Object storage ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["memory", "file"])
@pytest.mark.parametrize("chunk_bytes", [64, 1000, 1 << 28])
def test_object_storage(scheme: str, chunk_bytes: int, tmp_path: Path) -> None:
    folder = f"memory://bucket{chunk_bytes}" if scheme == "memory" else f"file://{tmp_path}/remote"
    filesystem, inner = fsspec.core.url_to_fs(folder)
    filesystem.makedirs(inner, exist_ok=True)
    for path in (get_bin_path, get_idx_path):
        filesystem.pipe_file(f"{inner}/{path('corpus')}", Path(path("bin/gpt_a_text_document")).read_bytes())
    local = IndexedDataset("bin/gpt_a_text_document")
    config = S3Config(path_to_idx_cache=str(tmp_path / "cache"), bin_chunk_nbytes=chunk_bytes)
    remote = IndexedDataset(f"{folder}/corpus", s3_config=config)
    assert len(list((tmp_path / "cache").rglob("corpus.idx"))) == 1
    for order in (range(len(local)), reversed(range(len(local)))):
        for i in order:
            np.testing.assert_array_equal(remote[i], local[i])
    assert remote.fingerprint() == local.fingerprint()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(remote))[3], local[3])
    assert len(IndexedDataset(f"{folder}/corpus")) == len(local)  # without a cache the index stays in memory
    with pytest.raises(DataError, match="cannot be found"):
        IndexedDataset(f"{folder}/other", s3_config=config)


def test_changed_remote_index_is_downloaded_again(tmp_path: Path) -> None:
    filesystem, _ = fsspec.core.url_to_fs("memory://changing")
    config = S3Config(path_to_idx_cache=str(tmp_path))
    for prefix in ("bin/gpt_a_text_document", "bin/gpt_b_text_document"):
        for path in (get_bin_path, get_idx_path):
            filesystem.pipe_file(path("/changing/x"), Path(path(prefix)).read_bytes())
        assert len(IndexedDataset("memory://changing/x", s3_config=config)) == len(IndexedDataset(prefix))


class Bucket:
    """A boto3 client over a directory; `Range` includes its last byte and may reach beyond the object."""

    root = Path()

    def __init__(self, service: str) -> None:
        assert service == "s3"

    def path(self, bucket: str, key: str) -> Path:
        found = self.root / bucket / key
        if not found.exists():
            raise ClientError({"Error": {"Code": "404"}})
        return found

    def head_object(self, Bucket: str, Key: str) -> dict[str, Any]:
        return {"ContentLength": self.path(Bucket, Key).stat().st_size}

    def download_file(self, Bucket: str, Key: str, Filename: str) -> None:
        Path(Filename).write_bytes(self.path(Bucket, Key).read_bytes())

    def get_object(self, Bucket: str, Key: str, Range: str) -> dict[str, Any]:
        first, last = map(int, Range.removeprefix("bytes=").split("-"))
        return {"Body": io.BytesIO(self.path(Bucket, Key).read_bytes()[first : last + 1])}


class ClientError(Exception):
    def __init__(self, response: dict[str, Any]) -> None:
        self.response = response


@pytest.mark.parametrize("chunk_bytes", [64, 1 << 28])
def test_s3_is_read_with_boto3_as_v09_does(
    chunk_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provided = {"boto3": {"client": Bucket}, "botocore.exceptions": {"ClientError": ClientError}}
    for name, contents in provided.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(utils_s3, "find_spec", lambda name: None)  # without s3fs
    monkeypatch.setattr(Bucket, "root", tmp_path / "stored")
    local = IndexedDataset("bin/gpt_a_text_document")
    folder = tmp_path / "stored" / "bucket" / "folder"
    folder.mkdir(parents=True)
    for path in (get_bin_path, get_idx_path):
        shutil.copy(path("bin/gpt_a_text_document"), folder)
    for cache in (str(tmp_path / "cache"), None):
        config = S3Config(path_to_idx_cache=cache, bin_chunk_nbytes=chunk_bytes)
        remote = IndexedDataset("s3://bucket/folder/gpt_a_text_document", mmap=False, s3_config=config)
        assert isinstance(remote.bin_reader, indexed_dataset._S3BinReader)
        for i in range(len(local)):
            np.testing.assert_array_equal(remote[i], local[i])
    assert isinstance(local.bin_reader, indexed_dataset._MMapBinReader)
    with pytest.raises(DataError, match="cannot be found"):
        IndexedDataset("s3://bucket/folder/other", s3_config=config)


def test_url_without_driver() -> None:
    with pytest.raises(DataError, match="no fsspec driver serves this URL"):
        IndexedDataset("nothing://bucket/x")


# Damage -----------------------------------------------------------------------------------------------------------


def damaged(tmp_path: Path, change: Any, prefix: str = "bin/gpt_text_document") -> str:
    content = {path: bytearray(Path(path(prefix)).read_bytes()) for path in (get_bin_path, get_idx_path)}
    change(content[get_idx_path], content[get_bin_path])
    for path, raw in content.items():
        Path(path(str(tmp_path / "x"))).write_bytes(bytes(raw))
    return str(tmp_path / "x")


def overwrite(offset: int, value: bytes) -> Any:
    def change(idx: bytearray, bin_: bytearray) -> None:
        idx[offset : offset + len(value)] = value

    return change


def cut(raw: str, count: int) -> Any:
    def change(idx: bytearray, bin_: bytearray) -> None:
        del (idx if raw == "idx" else bin_)[-count:]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (overwrite(0, b"TNTIDX"), "x.idx: bad header, cannot read"),
        (overwrite(9, b"\x02"), "x.idx: bad version, cannot read: it is 2"),
        (overwrite(17, b"\x09"), "names token type 9"),
        (overwrite(18, b"\xff"), r"has 6266 bytes where \d+ sequences"),
        (overwrite(26, struct.pack("<Q", 0)), "has 6266 bytes where"),
        (cut("idx", 1), "has 6265 bytes where 310 sequences and 313 documents take 6266"),
        (cut("idx", 6240), "has 26 bytes, fewer than a header of 34"),
        (cut("bin", 2), "sequence 309 has .* contradicts .* bytes of the .bin"),
    ],
)
def test_damaged_headers_and_sizes(change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as error:
        IndexedDataset(damaged(tmp_path, change))
    assert "Fix: run tools/preprocess_data.py again" in str(error.value)


def test_first_sequence_not_at_the_start(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(f"{tmp_path}/x.bin", np.uint16)
    builder.add_document([1, 2, 3], [3])
    builder.finalize(f"{tmp_path}/x.idx")
    raw = bytearray((tmp_path / "x.idx").read_bytes())
    raw[34 + 4] = 2
    (tmp_path / "x.idx").write_bytes(raw)
    (tmp_path / "x.bin").write_bytes(b"12345678")
    with pytest.raises(DataError, match="begins at byte 2"):
        IndexedDataset(f"{tmp_path}/x").verify()


def test_missing_file_names_the_prefix(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"One or both of .* at the path prefix {tmp_path}/none"):
        IndexedDataset(f"{tmp_path}/none")


def damage_at_random(random: np.random.Generator, truncate: bool, flip_header: bool) -> Any:
    """Cut one of the two files, or flip one bit of it, or one in the header of the index."""

    def change(idx: bytearray, bin_: bytearray) -> None:
        raw = idx if flip_header or random.random() < 0.6 else bin_
        if truncate:
            del raw[int(random.random() * len(raw)) :]
        else:
            raw[int(random.random() * (34 if flip_header else len(raw)))] ^= 1 << int(random.integers(8))

    return change


def test_thousand_damaged_files(tmp_path: Path) -> None:
    """Refused, or found where they are read; what no check can see is a token's value or where a document ends."""
    random = np.random.default_rng(7)
    _, lengths, _, bounds, tokens = parse("bin/gpt_a_text_document")
    refused = 0
    for case in range(1000):
        change = damage_at_random(random, truncate=case % 3 == 0, flip_header=case % 3 == 1)
        prefix = damaged(tmp_path, change, "bin/gpt_a_text_document")
        try:
            dataset = IndexedDataset(prefix, mmap=bool(case % 5))
            dataset.verify()
            read = dataset[:]
        except DataError:
            refused += 1
            continue
        assert case % 3 == 2, f"case {case}: a cut file or a changed header was taken for good"
        np.testing.assert_array_equal([s.size for s in read], lengths)
        assert (np.concatenate(read) != tokens).sum() + (dataset.document_indices != bounds).sum() <= 1
    assert refused > 700
