"""Datasets built by several ranks: alike, once per file system, and stopped together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.errors import DataError
from tests.gang.harness import run_gang
from tests.unit.datasets.test_gpt_dataset import gpt_config, write_documents


def build(prefix: str, cache: str, building_ranks: list[int]) -> tuple[bool, str] | None:
    """Whether this rank built the indices, and the order of its training samples."""
    config = gpt_config(prefix, Path(cache.format(rank=dist.get_rank())))
    wanted = dist.get_rank() in building_ranks
    train, valid, test = BlendedMegatronDatasetBuilder(GPTDataset, (20, 2, 2), lambda: wanted, config).build()
    if train is None:
        assert valid is None and test is None
        return None
    return train.built_anew_on_cache_miss, str(train.shuffle_index.tolist())


def train_on_nothing(prefix: str) -> str:
    """What each rank raises when only rank 0 builds, and the training split is empty."""
    config = gpt_config(prefix, split="1,999,999")
    try:
        BlendedMegatronDatasetBuilder(GPTDataset, (20, 2, 2), lambda: dist.get_rank() == 0, config).build()
    except DataError as error:
        return str(error)
    return "nothing"


def fail_on_one(prefix: str, failing_rank: int) -> str:
    """What each rank raises when the data is missing on one of them."""
    mine = f"{prefix}-missing" if dist.get_rank() == failing_rank else prefix
    try:
        build(mine, "/tmp/never-{rank}" if dist.get_rank() == failing_rank else f"{prefix}-cache", [0, 1])
    except DataError as error:
        return str(error)
    return "nothing"


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_documents(tmp_path / "data", np.arange(1, 121).reshape(12, 10).tolist())


def test_rank_zero_builds_for_a_shared_disk(prefix: str, tmp_path: Path) -> None:
    results: list[Any] = run_gang(2, build, prefix, f"{tmp_path}/shared", [0, 1])
    assert [built for built, _ in results] == [True, False]
    assert results[0][1] == results[1][1]


def test_each_disk_gets_its_own_cache(prefix: str, tmp_path: Path) -> None:
    results: list[Any] = run_gang(2, build, prefix, f"{tmp_path}/node" + "{rank}", [0, 1])
    assert [built for built, _ in results] == [True, True]
    assert results[0][1] == results[1][1]
    names = [sorted(path.name for path in (tmp_path / f"node{rank}").iterdir()) for rank in (0, 1)]
    assert names[0] == names[1] and len(names[0]) == 15


def test_ranks_that_do_not_build_get_nothing(prefix: str, tmp_path: Path) -> None:
    results = run_gang(2, build, prefix, f"{tmp_path}/shared", [0])
    assert results[0] is not None and results[1] is None


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_failure_on_one_rank_stops_all_with_its_cause(prefix: str, failing_rank: int) -> None:
    errors = run_gang(2, fail_on_one, prefix, failing_rank)
    assert "cannot be found at the path prefix" in errors[failing_rank]
    assert errors[1 - failing_rank].startswith(
        f"rank {failing_rank} stopped while building datasets: DataError: "
    )
    assert "cannot be found at the path prefix" in errors[1 - failing_rank]


def test_unusable_data_stops_also_the_ranks_that_do_not_read_it(prefix: str) -> None:
    errors = run_gang(2, train_on_nothing, prefix)
    assert "the train split is empty" in errors[0]
    assert (
        errors[1].startswith("rank 0 stopped while building datasets")
        and "the train split is empty" in errors[1]
    )
