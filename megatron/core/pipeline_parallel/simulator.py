"""Run pipeline plans without processes: when does each operation start, and does the pipeline ever stop?

Used by the schedule tests (deadlock freedom) and by the step-time predictions of `tools/explain.py`.
"""

from __future__ import annotations

from collections.abc import Callable

from megatron.core.errors import ConfigError
from megatron.core.pipeline_parallel.plan import Exchange, Geometry, Message, Op, Plan, exchanges


def timeline(
    plans: list[Plan],
    chunks: int,
    duration: Callable[[int, Op], float],
    transfer: Callable[[int, Message], float] = lambda stage, message: 0.0,
) -> list[list[tuple[Op, float, float]]]:
    """Start and end of every operation on every stage, in the unit of `duration`, with buffered sends.

    `duration(stage, op)` is what an operation takes, `transfer(stage, message)` what its input takes to arrive.
    Raises ConfigError naming the operation each stage waits at if the plans cannot finish.
    """
    geometry = [Geometry(stage, len(plans), chunks) for stage in range(len(plans))]
    ready: dict[Message, float] = {}
    clock, position = [0.0] * len(plans), [0] * len(plans)
    lines: list[list[tuple[Op, float, float]]] = [[] for _ in plans]
    progressed = True
    while progressed:
        progressed = False
        for stage, plan in enumerate(plans):
            while position[stage] < len(plan):
                op = plan[position[stage]]
                need = geometry[stage].received_by(op)
                key = None if need is None else need._replace(peer=stage)
                if key is not None and key not in ready:
                    break
                start = clock[stage] if key is None else max(clock[stage], ready[key])
                end = start + duration(stage, op)
                made = geometry[stage].sent_by(op)
                if made is not None:
                    ready[made] = end + transfer(stage, made)
                lines[stage].append((op, start, end))
                clock[stage], position[stage], progressed = end, position[stage] + 1, True
    stuck = {s: p[position[s]] for s, p in enumerate(plans) if position[s] < len(p)}
    if stuck:
        raise ConfigError("pipeline schedule", f"no stage can go on; each waits at {stuck}")
    return lines


def bubble_fraction(lines: list[list[tuple[Op, float, float]]]) -> float:
    """Idle share of the busiest stage between the first start and the last end of the step."""
    length = max(end for line in lines for _, _, end in line)
    busy = max(sum(end - start for _, start, end in line) for line in lines)
    return 1.0 - busy / length


def rendezvous_deadlock(plans: list[Plan], chunks: int, wait_at_once: bool = False) -> dict[int, int]:
    """Where each stage stops if every exchange is one unbuffered group call, as NCCL runs it; empty if none does.

    Exchanges of a stage run one after another; one completes only when each of its messages stands in an exchange that
    has started at the other end. Operation i waits for the exchange that carries its input, or with `wait_at_once` for
    every exchange before it.
    """
    stages = len(plans)
    geometry = [Geometry(stage, stages, chunks) for stage in range(stages)]
    calls = [exchanges(plan, geometry[s]) for s, plan in enumerate(plans)]

    def keys(stage: int, call: Exchange) -> set[tuple[str, int, int]]:
        return {(m.kind, m.microbatch, m.virtual) for m in (*call.sends, *call.receives)}

    wanted = [[keys(s, call) for call in calls[s]] for s in range(stages)]
    ends: dict[tuple[str, int, int], list[tuple[int, int]]] = {}
    for s in range(stages):
        for i, group in enumerate(wanted[s]):
            for key in group:
                ends.setdefault(key, []).append((s, i))
    carrier = [
        list(range(len(plans[s]))) if wait_at_once else _carriers(plans[s], geometry[s], calls[s])
        for s in range(stages)
    ]

    issued, completed = [0] * stages, [0] * stages  # exchanges handed over / finished
    progressed = True
    while progressed:
        progressed = False
        for s in range(stages):
            # The host issues exchange i once operation i-1 has run, which needed the exchange carrying its input.
            while issued[s] < len(calls[s]) and (issued[s] == 0 or carrier[s][issued[s] - 1] < completed[s]):
                issued[s] += 1
                progressed = True
            while completed[s] < issued[s] and all(
                peer_call <= completed[peer] and peer_call < issued[peer]
                for key in wanted[s][completed[s]]
                for peer, peer_call in ends[key]
                if peer != s or peer_call != completed[s]
            ):
                completed[s] += 1
                progressed = True
    return {s: completed[s] for s in range(stages) if completed[s] < len(calls[s])}


def _carriers(plan: Plan, geometry: Geometry, calls: list[Exchange]) -> list[int]:
    """For each operation, the index of the exchange that brings its input (-1: it needs none)."""
    by_message = {m: i for i, call in enumerate(calls) for m in call.receives}
    needs = (geometry.received_by(op) for op in plan)
    return [-1 if need is None else by_message[need] for need in needs]
