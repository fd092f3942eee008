"""A layout of one rank, without processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    parallel_state.set_current(ProcessGroupCollection())
    yield
    parallel_state.destroy_model_parallel()
