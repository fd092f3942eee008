"""GPT datasets and blends against recordings: descriptions, cache names, indices, samples."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.datasets.packing import (
    document_attention_mask,
    document_cu_seqlens,
    document_ids,
    document_position_ids,
)
from megatron.core.datasets.utils import Split
from megatron.core.errors import ConfigError, DataError
from tests.unit.datasets.support import (
    GOLDEN,
    SPLITS,
    RecordedTokenizer,
    assert_same,
    cache_files,
    config_arguments,
    load_case,
    recorded_samples,
)

CASES = sorted(path.name for path in (GOLDEN / "gpt").iterdir() if path.name != "pad_id_in_data")
INDICES = ("document_index", "sample_index", "shuffle_index", "dataset_index", "dataset_sample_index")


def build_case(case: str, cache: Path | None) -> list[Any]:
    """The three datasets of a recorded case."""
    meta = load_case("gpt", case)
    config = GPTDatasetConfig(**config_arguments(meta), path_to_cache=str(cache) if cache else None)
    cls = MockGPTDataset if case == "mock" else GPTDataset
    return BlendedMegatronDatasetBuilder(cls, meta["sizes"], lambda: True, config).build()


@pytest.mark.parametrize("case", CASES)
def test_recorded_case(case: str, tmp_path: Path) -> None:
    meta = load_case("gpt", case)
    datasets = build_case(case, tmp_path)
    assert cache_files(tmp_path) == sorted(meta["cache_files"])
    for split, dataset in zip(SPLITS, datasets):
        recorded = meta["splits"].get(split)
        assert (dataset is None) == (recorded is None)
        if recorded is None:
            continue
        assert len(dataset) == recorded["len"]
        assert dataset.unique_description == recorded["description"]
        assert dataset.unique_description_hash == recorded["hash"]
        for name in INDICES:
            path = GOLDEN / "gpt" / case / f"{split}_{name}.npy"
            if path.exists():
                assert_same(getattr(dataset, name), np.load(path), f"{split} {name}")
            elif name in recorded:
                digest = hashlib.sha256(np.ascontiguousarray(getattr(dataset, name)).tobytes()).hexdigest()
                assert digest == recorded[name]["sha256"], f"{split} {name}"
        samples = recorded_samples("gpt", case, split)
        for row, number in enumerate(recorded["sample_indices"]):
            sample = dataset[number]
            assert set(sample) == set(samples)
            for field, values in samples.items():
                assert_same(sample[field], values[row], f"{split} sample {number} {field}")


def test_without_cache_and_from_cache_is_the_same(tmp_path: Path) -> None:
    built, cached = build_case("blend_weights", tmp_path)[0], build_case("blend_weights", tmp_path)[0]
    assert built.built_anew_on_cache_miss and not cached.built_anew_on_cache_miss
    in_memory = build_case("mock", None)[1]
    stored = build_case("mock", tmp_path)[1]
    for name in INDICES[:3]:
        assert_same(getattr(in_memory, name), np.asarray(getattr(stored, name)), name)
    for number in (0, len(built) - 1):
        assert torch.equal(built[number]["tokens"], cached[number]["tokens"])


def test_loss_mask_hides_the_padding_of_its_own_sample_only(tmp_path: Path) -> None:
    """v0.9 wrote every sample's padding into one shared mask; its recorded counts are those of the union so far."""
    meta = load_case("gpt", "pad_id_in_data")
    meta["config"]["split"] = "100,0,0"
    config = GPTDatasetConfig(**config_arguments(meta), path_to_cache=str(tmp_path))
    dataset = BlendedMegatronDatasetBuilder(GPTDataset, meta["sizes"], lambda: True, config).build()[0]
    assert len(dataset) == meta["len"]
    union = np.zeros(64, dtype=bool)
    zeros = []
    for number in range(len(dataset)):
        sample = dataset[number]
        assert torch.equal(sample["loss_mask"] == 0, sample["labels"] == meta["pad_token_id"])
        union |= sample["loss_mask"].numpy() == 0
        zeros.append(union.sum())
    np.testing.assert_array_equal(zeros, np.load(GOLDEN / "gpt" / "pad_id_in_data" / "zeros_per_sample.npy"))


def test_none_pads_a_batch_with_a_sample_that_has_no_loss(tmp_path: Path) -> None:
    dataset = build_case("one_epoch", tmp_path)[0]
    assert torch.equal(dataset[None]["tokens"], dataset[0]["tokens"])
    assert dataset[None]["loss_mask"].sum() == 0 and dataset[0]["loss_mask"].sum() > 0


def test_packing_against_recorded_masks() -> None:
    recorded = np.load(GOLDEN / "ltor_batched.npz")
    tokens, eod = torch.from_numpy(recorded["data"]), int(recorded["eod"])
    positions = recorded["pos1_att0_eod0_position_ids"]
    assert_same(document_position_ids(tokens, eod), positions, "position ids")
    mask = document_attention_mask(tokens, eod).unsqueeze(1)
    assert_same(mask, recorded["pos0_att1_eod0_attention_mask"], "attention mask")
    starts = document_cu_seqlens(tokens, eod)
    assert starts.dtype == torch.int32
    assert_same(starts[:-1].long(), np.flatnonzero(positions.reshape(-1) == 0), "document starts")
    assert starts[-1] == tokens.numel()
    ids = document_ids(tokens, eod)
    assert torch.equal(ids[:, 1:] - ids[:, :-1], (tokens[:, :-1] == eod).long())


# Bad input and caches ---------------------------------------------------------------------------------------------


def write_documents(prefix: Path, documents: list[list[int]]) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(document, [len(document)] if document else [])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def gpt_config(prefix: str, cache: Path | None = None, **changes: Any) -> GPTDatasetConfig:
    arguments = {
        "random_seed": 1,
        "sequence_length": 8,
        "blend": ([prefix], None),
        "split": "1,1,1",
        "path_to_cache": None if cache is None else str(cache),
        "tokenizer": RecordedTokenizer("gpt2"),
        "reset_position_ids": False,
        "reset_attention_mask": False,
        "eod_mask_loss": False,
    }
    return GPTDatasetConfig(**{**arguments, **changes})


def build(config: GPTDatasetConfig, sizes: tuple[int | None, ...] = (4, 1, 1)) -> list[Any]:
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()


def test_changed_data_refuses_the_old_cache_by_name(tmp_path: Path) -> None:
    prefix = write_documents(tmp_path / "data", [[1, 2, 3, 4, 5]] * 9)
    build(gpt_config(prefix, tmp_path / "cache"))
    write_documents(tmp_path / "data", [[1, 2, 3, 4, 5, 6]] * 9)
    with pytest.raises(
        DataError, match=r"cache/[0-9a-f]{32}-GPTDataset-train-\*: .*bin_bytes was 90 and is 108"
    ):
        build(gpt_config(prefix, tmp_path / "cache"))


def test_changed_extra_token_refuses_the_old_cache(tmp_path: Path) -> None:
    prefix = write_documents(tmp_path / "data", [[1, 2, 3, 4, 5]] * 9)
    build(gpt_config(prefix, tmp_path / "cache"))
    with pytest.raises(DataError, match="add_extra_token_to_sequence was True and is False"):
        build(gpt_config(prefix, tmp_path / "cache", add_extra_token_to_sequence=False))


def test_cache_without_fingerprint_is_checked_against_the_data(tmp_path: Path) -> None:
    """What v0.9 wrote has none; it is taken if its shapes fit the data, and refused otherwise."""
    prefix = write_documents(tmp_path / "data", [[1, 2, 3, 4, 5]] * 9)
    expected = build(gpt_config(prefix, tmp_path / "cache"))[0]
    for path in (tmp_path / "cache").glob("*-fingerprint.json"):
        path.unlink()
    again = build(gpt_config(prefix, tmp_path / "cache"))[0]
    assert not again.built_anew_on_cache_miss
    np.testing.assert_array_equal(again.sample_index, expected.sample_index)
    write_documents(tmp_path / "data", [[1, 2, 3, 4, 5]] * 12)
    with pytest.raises(DataError, match="documents, sample rows and samples should be"):
        build(gpt_config(prefix, tmp_path / "cache"))


def test_damaged_cache_file_is_named(tmp_path: Path) -> None:
    prefix = write_documents(tmp_path / "data", [[1, 2, 3, 4, 5]] * 9)
    build(gpt_config(prefix, tmp_path / "cache"))
    damaged = next((tmp_path / "cache").glob("*-train-shuffle_index.npy"))
    damaged.write_bytes(damaged.read_bytes()[:-3])
    with pytest.raises(DataError, match=rf"{damaged.name}: is damaged .* Fix: delete it"):
        build(gpt_config(prefix, tmp_path / "cache"))


def test_unwritable_cache_directory_builds_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = write_documents(tmp_path / "data", [[1, 2, 3, 4, 5]] * 9)
    expected = build(gpt_config(prefix, tmp_path / "cache"))[0]

    def read_only(path: str, exist_ok: bool) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr(os, "makedirs", read_only)
    datasets = build(gpt_config(prefix, tmp_path / "elsewhere"))
    assert "is not writable" in caplog.text
    np.testing.assert_array_equal(datasets[0].sample_index, expected.sample_index)
    np.testing.assert_array_equal(datasets[0].shuffle_index, expected.shuffle_index)


def test_token_outside_the_vocabulary_is_named(tmp_path: Path) -> None:
    prefix = write_documents(tmp_path / "data", [[1, 2, 1200, 4, 5]] * 9)
    dataset = build(gpt_config(prefix))[0]
    with pytest.raises(DataError, match=r"data: holds token ids 1 to 1200, the tokenizer has 1200 ids"):
        dataset[0]


def test_empty_validation_split_is_none_and_empty_training_split_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prefix = write_documents(tmp_path / "data", [[1, 2, 3, 4, 5]] * 20)
    train, valid, test = build(gpt_config(prefix, split="969,30,1"))
    assert len(train) >= 4 and valid is not None and test is None
    assert "The test split of" in caplog.text and "rounds to none" in caplog.text
    with pytest.raises(DataError, match="the train split is empty"):
        build(gpt_config(prefix, split="1,969,30"))


def test_data_smaller_than_one_sample(tmp_path: Path) -> None:
    prefix = write_documents(tmp_path / "data", [[1, 2, 3]])
    assert len(build(gpt_config(prefix, split="1"), (2, 0, 0))[0]) == 2  # read several times over
    with pytest.raises(DataError, match="smaller than one sample of 8 tokens"):
        build(gpt_config(prefix, split="1"), (None, None, None))


def test_no_documents_and_no_tokens(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.idx: holds no documents"):
        build(gpt_config(write_documents(tmp_path / "data", []), split="1"))
    with pytest.raises(DataError, match="cannot be found at the path prefix"):
        build(gpt_config(str(tmp_path / "elsewhere"), split="1"))
    with pytest.raises(DataError, match="the train split holds 1 tokens in 1 sequences"):
        build(gpt_config(write_documents(tmp_path / "one", [[7]]), split="1"))


def test_blend_leaves_out_what_has_no_sample(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    large = write_documents(tmp_path / "large", [[1, 2, 3, 4, 5]] * 30)
    small = write_documents(tmp_path / "small", [[6, 7, 8, 9, 10]] * 2)
    config = gpt_config(small, blend=([large, small], [0.5, 0.5]), split="90,10,0")
    train, valid, test = build(config, (20, 4, 0))
    assert {int(train[i]["dataset_id"]) for i in range(len(train))} == {0, 1}
    assert {int(valid[i]["dataset_id"]) for i in range(len(valid))} == {0}
    assert test is None
    assert "1 of 2 datasets have no sample in the valid split" in caplog.text


def test_splits_with_blends_of_their_own_need_sizes_of_their_own_only(tmp_path: Path) -> None:
    a, b = (write_documents(tmp_path / name, [[1, 2, 3, 4, 5]] * 30) for name in "ab")
    config = gpt_config("", blend=None, split=None, blend_per_split=[([a, b], [3.0, 1.0]), None, None])
    train, valid, test = build(config, (20, None, None))
    assert len(train) >= 20 and valid is None and test is None
    assert sum(int(train[i]["dataset_id"]) == 0 for i in range(20)) == 15
    with pytest.raises(AssertionError, match="weighted blend needs the size"):
        build(config, (None, None, None))


def test_oversampling_blend_is_refused(tmp_path: Path) -> None:
    from megatron.core.datasets.blended_dataset import BlendedDataset

    prefix = write_documents(tmp_path / "data", [[1, 2, 3, 4, 5]] * 30)
    dataset = build(gpt_config(prefix))[0]
    with pytest.raises(
        DataError, match=r"blend oversamples \(N = 50\) .* Set renormalize_blend_weights to True"
    ):
        BlendedDataset([dataset, dataset], [0.5, 0.5], 100, dataset.config)
    with pytest.raises(IndexError, match="oversamples"):  # which is what v0.9's callers catch
        BlendedDataset([dataset, dataset], [0.5, 0.5], 100, dataset.config)
    with pytest.raises(ConfigError, match="not all positive"):
        BlendedDataset([dataset, dataset], [0.5, 0.0], 10, dataset.config)


def test_many_prefixes_build_alike_on_any_number_of_threads(tmp_path: Path) -> None:
    prefixes = [write_documents(tmp_path / f"{i}", [[i, 2, 3, 4, 5]] * (i + 9)) for i in range(12)]
    one, four = (
        build(gpt_config("", blend=(prefixes, None), split="1", num_dataset_builder_threads=n), (None, 0, 0))[
            0
        ]
        for n in (1, 4)
    )
    np.testing.assert_array_equal(one.dataset_index, four.dataset_index)
    assert [d.dataset_path for d in four.datasets] == prefixes
    assert len(one) == sum((5 * (i + 9) - 1) // 8 for i in range(12))


def test_config_errors_name_the_option(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="split and blend_per_split are incompatible"):
        gpt_config("", blend=None, blend_per_split=[(["a"], None), None, None])
    with pytest.raises(ConfigError, match="reset_position_ids: is required"):
        gpt_config("a", reset_position_ids=None)
    with pytest.raises(ConfigError, match="weighted blend needs the size"):
        build(gpt_config("", blend=(["a", "b"], [0.5, 0.5])), (1, None, 1))


def test_samples_from_object_storage_are_those_of_the_files(tmp_path: Path) -> None:
    local = write_documents(tmp_path / "data", np.arange(1, 121).reshape(12, 10).tolist())
    filesystem = fsspec.filesystem("memory")
    for ending in (".bin", ".idx"):
        filesystem.pipe_file(f"/bucket/data{ending}", Path(local + ending).read_bytes())
    from_files = build(gpt_config(local, split="1"))[0]
    changes = {"split": "1", "s3_cache_path": str(tmp_path / "idx")}
    from_store = build(gpt_config("memory://bucket/data", tmp_path / "cache", **changes))[0]
    assert (tmp_path / "idx" / "bucket" / "data.idx").read_bytes() == Path(f"{local}.idx").read_bytes()
    assert len(from_store) == len(from_files)
    for number in range(len(from_files)):
        assert torch.equal(from_store[number]["tokens"], from_files[number]["tokens"])


def test_drawing_directly_from_indices(tmp_path: Path) -> None:
    """The class works without builder and cache, as library users call it."""
    prefix = write_documents(tmp_path / "data", [[1, 2, 3, 4, 5], [6, 7, 8, 9], [10, 11, 12]])
    config = gpt_config(prefix, sequence_length=4)
    dataset = GPTDataset(
        IndexedDataset(prefix), None, np.arange(3, dtype=np.int32), None, Split.train, config
    )
    stream = [t for d in dataset.document_index for t in IndexedDataset(prefix)[int(d)].tolist()]
    windows = {tuple(stream[i : i + 4]) for i in (0, 4)}
    assert {tuple(dataset[i]["tokens"].tolist()) for i in range(len(dataset))} == windows
