"""Which rank reads which samples, against recordings, and across a change of the data-parallel size."""

from __future__ import annotations

import json
from argparse import Namespace
from typing import Any

import numpy
import pytest
import torch

from megatron.core.errors import DataError, FlagError
from megatron.training import report
from megatron.training.data_samplers import (
    MegatronPretrainingRandomSampler,
    MegatronPretrainingSampler,
    RandomSeedDataset,
    build_data_loader,
    build_pretraining_data_loader,
)
from megatron.training.datasets import source_fields
from tests.unit.datasets.support import GOLDEN

RECORDED = json.loads((GOLDEN / "samplers.json").read_text())


@pytest.mark.parametrize("case", [case for case in RECORDED if case["kind"] == "single"])
def test_single_as_recorded(case: dict[str, Any]) -> None:
    for rank, expected in enumerate(case["per_rank"]):
        sampler = MegatronPretrainingSampler(
            case["total"], case["consumed"], case["micro_batch_size"], rank, case["dp"], case["drop_last"]
        )
        assert list(sampler) == expected
        assert len(sampler) == case["total"]


@pytest.mark.parametrize("case", [case for case in RECORDED if case["kind"] == "cyclic"])
def test_cyclic_as_recorded(case: dict[str, Any]) -> None:
    for rank, expected in enumerate(case["per_rank_two_passes"]):
        sampler = MegatronPretrainingRandomSampler(
            None,
            case["total"],
            case["consumed"],
            case["micro_batch_size"],
            rank,
            case["dp"],
            case["data_sharding"],
        )
        for one_pass, consumed in zip(expected, case["consumed_after_each_pass"][rank]):
            assert list(sampler) == one_pass
            assert sampler.consumed_samples == consumed


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (2, 3), (3, 2)])
def test_changed_data_parallel_size_continues_after_the_consumed_samples(before: int, after: int) -> None:
    def read(size: int, consumed: int, batches: int) -> list[int]:
        ranks = [
            list(MegatronPretrainingSampler(480, consumed, 2, rank, size))[:batches] for rank in range(size)
        ]
        return [sample for window in zip(*ranks) for rank in window for sample in rank]

    first = read(before, 0, 12 // before)
    second = read(after, len(first), 12 // after)
    assert first + second == list(range(48))


def test_exhausted_and_empty_and_misaligned_name_the_reason() -> None:
    with pytest.raises(DataError, match="no sample to consume: 0"):
        MegatronPretrainingSampler(0, 0, 1, 0, 1)
    with pytest.raises(DataError, match="no samples left to consume: 10, 10"):
        MegatronPretrainingSampler(10, 10, 1, 0, 1)
    with pytest.raises(DataError, match="3 samples fill no batch of 4"):
        MegatronPretrainingRandomSampler(None, 3, 0, 2, 0, 2, True)
    with pytest.raises(DataError, match="6 consumed samples end inside a batch of 4"):
        list(MegatronPretrainingRandomSampler(None, 100, 6, 2, 0, 2, True))
    with pytest.raises(ValueError, match="micro batch size 0"):
        MegatronPretrainingSampler(10, 0, 0, 0, 1)


class Numbers(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, idx: int) -> torch.Tensor:
        return torch.tensor(idx)


def loader(dataset: Any, dataloader_type: str = "single", consumed: int = 0, workers: int = 0) -> Any:
    return build_data_loader(
        dataset,
        consumed,
        dataloader_type=dataloader_type,
        micro_batch_size=2,
        num_workers=workers,
        data_sharding=True,
        data_parallel_rank=1,
        data_parallel_size=2,
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_yields_the_sampler_s_batches_in_order(workers: int) -> None:
    batches = [batch.tolist() for batch in loader(Numbers(), consumed=4, workers=workers)]
    assert batches == [[6, 7], [10, 11], [14, 15], [18, 19]]


class Fields(Numbers):
    """Samples of several fields of different sizes and kinds."""

    def __getitem__(self, idx: int) -> Any:  # type: ignore[override]
        return {
            "dataset_id": numpy.int16(idx % 3),
            "tokens": torch.arange(3) + idx,
            "mask": torch.tensor([idx % 2 == 0] * 5),
            "weights": numpy.full((2, 1), idx, dtype=numpy.float32),
            "truncated": idx,
        }


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_of_worker_processes_are_those_of_the_main_process(workers: int) -> None:
    here, there = list(loader(Fields())), list(loader(Fields(), workers=workers))
    assert len(here) == len(there) == 5
    for expected, batch in zip(here, there):
        assert type(batch) is dict and list(batch) == list(expected)
        for name, values in expected.items():
            assert batch[name].dtype == values.dtype and torch.equal(batch[name], values), name


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_sample_arrives_as_it_was_raised(workers: int) -> None:
    class Damaged(Numbers):
        def __getitem__(self, idx: int) -> torch.Tensor:
            if idx == 7:
                raise DataError("data.bin", "is damaged", "copy it again")
            return super().__getitem__(idx)

    batches = iter(loader(Damaged(), workers=workers))
    assert next(batches).tolist() == [2, 3]
    with pytest.raises(DataError, match=r"^data.bin: is damaged. Fix: copy it again.$"):
        next(batches)


def test_loader_of_nothing_and_of_external_data() -> None:
    """An external source is passed on whatever it is; nothing else is asked of the arguments."""
    args = Namespace(dataloader_type="external")
    assert build_pretraining_data_loader(None, 0, args=args) is None
    assert loader([]) is None
    external = iter([1, 2])
    assert build_pretraining_data_loader(external, 0, args=args) is external
    with pytest.raises(DataError, match="--dataloader-type: 'sequential' is not known"):
        loader(Numbers(), "sequential")


def test_scripts_that_read_datasets_refuse_external_data() -> None:
    with pytest.raises(
        FlagError, match="--dataloader-type external: the samples of this script come from datasets"
    ):
        source_fields(Namespace(dataloader_type="external"), None)


def test_the_report_names_sources_without_a_length() -> None:
    external = iter([1, 2])
    lines = report.datasets((external, None, [1, 2]))
    assert lines[0] == "> train data: from a source that does not tell its length"
    assert lines[1] == "> test data: 2 samples"


def test_cyclic_epochs_reseed_random_transformations() -> None:
    class Noise(Numbers):
        def __getitem__(self, idx: int) -> torch.Tensor:
            return torch.rand(())

    dataset = RandomSeedDataset(Noise(), seed=5)
    sampler = MegatronPretrainingRandomSampler(dataset, 20, 40, 2, 0, 1, True)
    next(iter(sampler))
    drawn = dataset[3]
    torch.manual_seed(5 + 2 + 3)
    assert drawn == torch.rand(())
