"""The harness itself: results in order, failures labelled, hangs ended, state forgotten, workers reused."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from megatron.core import parallel_state
from tests.gang.harness import GangError, run_gang


def _sum_of_ranks(offset: int) -> tuple[int, float, int]:
    value = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(value)
    return dist.get_rank(), value.item(), os.getpid()


def _fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise ValueError("deliberate")


def _hang_on_one() -> None:
    if dist.get_rank() == 0:
        dist.barrier()
    else:
        time.sleep(30)


def _die_on_one() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def _leave_groups_behind() -> bool:
    clean = not parallel_state.is_initialized()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    return clean


def test_results_come_in_rank_order_from_reused_workers() -> None:
    first = run_gang(2, _sum_of_ranks, 10)
    second = run_gang(2, _sum_of_ranks, 20)
    assert [result[:2] for result in first] == [(0, 21.0), (1, 21.0)]
    assert [result[:2] for result in second] == [(0, 41.0), (1, 41.0)]
    assert [result[2] for result in first] == [result[2] for result in second]


def test_failure_names_the_rank_and_spares_the_gang() -> None:
    before = run_gang(2, _sum_of_ranks, 0)
    with pytest.raises(GangError, match=r"(?s)--- rank 1 of 2.*ValueError: deliberate"):
        run_gang(2, _fail_on_one)
    assert run_gang(2, _sum_of_ranks, 0) == before


def test_hang_ends_with_stacks_of_all_ranks() -> None:
    with pytest.raises(GangError, match=r"(?s)rank 0 of 2.*_hang_on_one.*rank 1 of 2.*_hang_on_one"):
        run_gang(2, _hang_on_one, timeout_s=1.0)
    assert run_gang(2, _sum_of_ranks, 0)[0][1] == 1.0


def test_dead_rank_is_reported() -> None:
    with pytest.raises(GangError, match="status 7"):
        run_gang(2, _die_on_one)


def test_state_is_forgotten_between_bodies() -> None:
    assert run_gang(2, _leave_groups_behind) == [True, True]
    assert run_gang(2, _leave_groups_behind) == [True, True]
