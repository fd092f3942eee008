"""Random states as a rank of its own has them, without a process group."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_data_parallel_rng_tracker_name,
    get_expert_parallel_rng_tracker_name,
)


@pytest.fixture(autouse=True)
def random_states() -> Iterator[None]:
    tracker = get_cuda_rng_tracker()
    tracker.reset()
    torch.manual_seed(1234)
    tracker.add(get_data_parallel_rng_tracker_name(), 1234)
    tracker.add("model-parallel-rng", 3952)
    tracker.add(get_expert_parallel_rng_tracker_name(), 2258)
    yield
    tracker.reset()
