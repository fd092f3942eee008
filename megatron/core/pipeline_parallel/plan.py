"""Pipeline schedules as lists of operations: integers only, no tensors and no processes.

Vocabulary: a *stage* is a pipeline rank, a *chunk* one of the model parts a stage holds (one, unless the pipeline is
interleaved), a *virtual stage* a (chunk, stage) pair numbered in the order a microbatch meets them:
`virtual = chunk * stages + stage`.

Sources: 1F1B, Narayanan et al. 2019 (PipeDream-Flush); interleaving, Narayanan et al. 2021 (arXiv:2104.04473, section 2.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron.core.errors import ScheduleError


class Op(NamedTuple):
    """Forward ("F") or backward ("B") of one microbatch through one model chunk of this stage."""

    kind: Literal["F", "B"]
    microbatch: int
    chunk: int = 0


Plan = list[Op]


class Message(NamedTuple):
    """One hand-over between neighbouring virtual stages: an activation ("F") or its gradient ("B").

    `virtual` is the virtual stage that *receives* it; `peer` the stage at the other end.
    """

    kind: Literal["F", "B"]
    microbatch: int
    virtual: int
    peer: int


@dataclass(frozen=True)
class Geometry:
    """How many stages and chunks the pipeline has, and which stage this is."""

    stage: int
    stages: int
    chunks: int = 1

    def virtual(self, chunk: int) -> int:
        return chunk * self.stages + self.stage

    @property
    def last_virtual(self) -> int:
        return self.stages * self.chunks - 1

    def received_by(self, op: Op) -> Message | None:
        """What must arrive before `op` can run; None at the ends of the pipeline."""
        virtual = self.virtual(op.chunk)
        source = virtual - 1 if op.kind == "F" else virtual + 1
        if not 0 <= source <= self.last_virtual:
            return None
        return Message(op.kind, op.microbatch, virtual, source % self.stages)

    def sent_by(self, op: Op) -> Message | None:
        """What `op` produces for a neighbour; None at the ends of the pipeline."""
        virtual = self.virtual(op.chunk)
        target = virtual + 1 if op.kind == "F" else virtual - 1
        if not 0 <= target <= self.last_virtual:
            return None
        return Message(op.kind, op.microbatch, target, target % self.stages)


def no_pipelining(microbatches: int) -> Plan:
    """Forward and backward of each microbatch in turn: one set of activations alive."""
    return [op for m in range(microbatches) for op in (Op("F", m), Op("B", m))]


def one_f_one_b(stage: int, stages: int, microbatches: int) -> Plan:
    """Warm up with forwards until the pipe is full, then alternate, then drain.

    At most `stages - stage` microbatches are in flight on a stage.
    """
    warmup = min(stages - stage - 1, microbatches)
    forward = [Op("F", m) for m in range(microbatches)]
    backward = [Op("B", m) for m in range(microbatches)]
    return _alternate(forward, backward, warmup)


def interleaved_one_f_one_b(stage: int, stages: int, chunks: int, microbatches: int) -> Plan:
    """1F1B over `stages * chunks` virtual stages; microbatches advance in groups of `stages` per chunk.

    Raises ScheduleError if the microbatches do not divide into such groups.
    """
    if microbatches % stages:
        raise ScheduleError(
            "--num-layers-per-virtual-pipeline-stage",
            f"the interleaved schedule moves microbatches in groups of {stages} (the pipeline size), "
            f"but there are {microbatches} per step",
            "choose --global-batch-size so that global / (micro batch x data parallel) is a multiple of "
            "--pipeline-model-parallel-size",
        )
    total = microbatches * chunks
    # With a single group per chunk nothing can overlap: all forwards, then all backwards (as v0.9).
    warmup = total if microbatches == stages else min((stages - stage - 1) * 2 + (chunks - 1) * stages, total)

    def unit(k: int) -> tuple[int, int]:
        group, within = divmod(k, stages * chunks)
        chunk, offset = divmod(within, stages)
        return group * stages + offset, chunk

    forward = [Op("F", *unit(k)) for k in range(total)]
    backward = [Op("B", m, chunks - 1 - c) for m, c in map(unit, range(total))]
    return _alternate(forward, backward, warmup)


def forward_only(plan: Plan) -> Plan:
    """The same order without backward passes, for evaluation."""
    return [op for op in plan if op.kind == "F"]


def make_plan(stage: int, stages: int, chunks: int, microbatches: int) -> Plan:
    """The training plan for this geometry."""
    if chunks > 1:
        return interleaved_one_f_one_b(stage, stages, chunks, microbatches)
    if stages > 1:
        return one_f_one_b(stage, stages, microbatches)
    return no_pipelining(microbatches)


def _alternate(forward: Plan, backward: Plan, warmup: int) -> Plan:
    steady = [op for f, b in zip(forward[warmup:], backward) for op in (f, b)]
    return forward[:warmup] + steady + backward[len(forward) - warmup :]


class Exchange(NamedTuple):
    """Messages handed to the transport together, after one operation and before the next."""

    sends: tuple[Message, ...]
    receives: tuple[Message, ...]


def exchanges(plan: Plan, geometry: Geometry) -> list[Exchange]:
    """The communication of a plan: entry i is issued before operation i, entry len(plan) after the last one.

    An exchange carries what the operation before it produced, together with the input of a later one. Which later one
    decides whether unbuffered group calls can meet: on a plain pipeline it is the next operation; interleaved, it is the
    next operation *of the same kind*, which also hides a transfer behind the operation in between. Both are shown free of
    deadlock by `simulator.rendezvous_deadlock` in the tests; swapping them is not.
    """
    needs = [geometry.received_by(op) for op in plan]
    makes = [geometry.sent_by(op) for op in plan]
    served_by = _served_by_kind(plan) if geometry.chunks > 1 else list(range(len(plan)))
    receives: list[list[Message]] = [[] for _ in range(len(plan) + 1)]
    for i, need in enumerate(needs):
        if need is not None:
            receives[served_by[i]].append(need)
    sends = [(m,) if m is not None else () for m in (None, *makes)]
    return [Exchange(s, tuple(r)) for s, r in zip(sends, receives)]


def _served_by_kind(plan: Plan) -> list[int]:
    """For each operation the exchange that brings its input: the one right after the previous operation of its kind."""
    previous = {"F": -1, "B": next((i for i, op in enumerate(plan) if op.kind == "B"), 0) - 1}
    result = []
    for i, op in enumerate(plan):
        result.append(previous[op.kind] + 1)
        previous[op.kind] = i
    return result


def last_backwards(plan: Plan) -> dict[int, int]:
    """For each chunk the position in the plan of its last backward: where its gradients are complete."""
    return {op.chunk: i for i, op in enumerate(plan) if op.kind == "B"}


def peak_in_flight(plan: Plan) -> int:
    """The largest number of forwards whose backward has not run yet: how many sets of activations a stage holds."""
    alive = peak = 0
    for op in plan:
        alive += 1 if op.kind == "F" else -1
        peak = max(peak, alive)
    return peak
