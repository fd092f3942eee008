"""Pipeline schedules, exhaustively over small sizes and without processes."""

from __future__ import annotations

import itertools

import pytest

from megatron.core.errors import ConfigError
from megatron.core.pipeline_parallel.plan import (
    Geometry,
    Op,
    exchanges,
    forward_only,
    last_backwards,
    make_plan,
    no_pipelining,
    one_f_one_b,
    peak_in_flight,
)
from megatron.core.pipeline_parallel.simulator import bubble_fraction, rendezvous_deadlock, timeline

FLAT = [(p, 1, m) for p, m in itertools.product(range(1, 9), range(1, 13))]
INTERLEAVED = [(p, v, p * g) for p, v, g in itertools.product(range(2, 7), range(2, 5), range(1, 5))]
ALL = FLAT + INTERLEAVED


def plans_of(stages: int, chunks: int, microbatches: int) -> list[list[Op]]:
    return [make_plan(stage, stages, chunks, microbatches) for stage in range(stages)]


@pytest.mark.parametrize(("stages", "chunks", "microbatches"), ALL)
def test_every_unit_runs_once_forward_before_backward(stages: int, chunks: int, microbatches: int) -> None:
    for plan in plans_of(stages, chunks, microbatches):
        units = {(m, c) for m in range(microbatches) for c in range(chunks)}
        for kind in "FB":
            assert sorted((op.microbatch, op.chunk) for op in plan if op.kind == kind) == sorted(units)
        position = {op: i for i, op in enumerate(plan)}
        assert all(position[Op("F", m, c)] < position[Op("B", m, c)] for m, c in units)
        for chunk in range(chunks):
            backward = [op.microbatch for op in plan if op.kind == "B" and op.chunk == chunk]
            assert backward == list(range(microbatches)), "gradients must accumulate in microbatch order"


@pytest.mark.parametrize(("stages", "chunks", "microbatches"), ALL)
def test_no_deadlock_buffered_or_rendezvous(stages: int, chunks: int, microbatches: int) -> None:
    plans = plans_of(stages, chunks, microbatches)
    for variant in (plans, [forward_only(plan) for plan in plans]):
        timeline(variant, chunks, lambda stage, op: 1.0)
        for wait_at_once in (False, True):
            assert rendezvous_deadlock(variant, chunks, wait_at_once) == {}


@pytest.mark.parametrize(("stages", "chunks", "microbatches"), FLAT)
def test_one_f_one_b_holds_at_most_the_stages_still_ahead(
    stages: int, chunks: int, microbatches: int
) -> None:
    for stage in range(stages):
        assert peak_in_flight(one_f_one_b(stage, stages, microbatches)) == min(stages - stage, microbatches)


def test_no_pipelining_holds_one_microbatch() -> None:
    assert peak_in_flight(no_pipelining(7)) == 1


@pytest.mark.parametrize(("stages", "microbatches"), [(2, 4), (4, 8), (4, 16), (8, 32)])
def test_bubble_is_the_published_fraction(stages: int, microbatches: int) -> None:
    """Idle share (p-1)/(m+p-1), divided by about the number of chunks when interleaved (arXiv:2104.04473, section 2.2)."""
    flat = timeline(plans_of(stages, 1, microbatches), 1, lambda s, op: 1.0 if op.kind == "F" else 2.0)
    assert bubble_fraction(flat) == pytest.approx((stages - 1) / (microbatches + stages - 1), abs=1e-12)
    split = timeline(plans_of(stages, 2, microbatches), 2, lambda s, op: 0.5 if op.kind == "F" else 1.0)
    assert bubble_fraction(split) == pytest.approx((stages - 1) / (2 * microbatches + stages - 1), abs=1e-12)


@pytest.mark.parametrize(("stages", "chunks", "microbatches"), ALL)
def test_every_message_is_sent_once_and_received_once(stages: int, chunks: int, microbatches: int) -> None:
    sent, received = [], []
    for stage, plan in enumerate(plans_of(stages, chunks, microbatches)):
        for call in exchanges(plan, Geometry(stage, stages, chunks)):
            sent += [(stage, m.peer, m.kind, m.microbatch, m.virtual) for m in call.sends]
            received += [(m.peer, stage, m.kind, m.microbatch, m.virtual) for m in call.receives]
    assert sorted(sent) == sorted(received)
    assert len(set(sent)) == len(sent) == 2 * microbatches * (stages * chunks - 1)


def test_gradients_of_a_chunk_are_complete_at_its_last_backward() -> None:
    plan = make_plan(0, 2, 2, 4)
    assert {c: plan[i] for c, i in last_backwards(plan).items()} == {0: Op("B", 3, 0), 1: Op("B", 3, 1)}


def test_interleaving_needs_whole_groups() -> None:
    with pytest.raises(ConfigError, match="groups of 4"):
        make_plan(0, 4, 2, 6)


def test_the_simulator_names_the_operation_a_broken_plan_waits_at() -> None:
    with pytest.raises(ConfigError, match="Op"):
        timeline([[Op("B", 0), Op("F", 0)], [Op("F", 0), Op("B", 0)]], 1, lambda s, op: 1.0)
