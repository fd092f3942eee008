"""`--profile`: mark steps for an attached profiler (nsys), or record them with PyTorch's and say where the time went."""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron.core import device

#: Around what `train_step` does after the last backward.
OPTIMIZER_RANGE = "optimizer"
GEMM, ATTENTION, ELEMENTWISE = "GEMM", "attention", "norm/elementwise"
COMMUNICATION, OPTIMIZER, IDLE = "communication", "optimizer", "idle"
KINDS = (GEMM, ATTENTION, ELEMENTWISE, OPTIMIZER, COMMUNICATION, IDLE)

#: What the names of kernels and of PyTorch's operators tell, first match first; all else is elementwise.
_PATTERNS = (
    (
        COMMUNICATION,
        re.compile(r"nccl|c10d::|gloo:|all_?reduce|all_?gather|reduce_?scatter|broadcast_", re.I),
    ),
    (ATTENTION, re.compile(r"flash|fmha|sdpa|attention|attn", re.I)),
    (
        GEMM,
        re.compile(
            r"gemm|cutlass|nvjet|xmma|matmul|::(add|b|badd|_scaled_)?b?mm_?\b|::_?linear(_pointwise)?\b|wgmma",
            re.I,
        ),
    ),
)


@dataclass(frozen=True)
class Event:
    """Something that kept the device busy, from `start` to `end` in microseconds."""

    name: str
    kind: str
    start: float
    end: float


@dataclass(frozen=True)
class Gap:
    """Time in which nothing ran, in microseconds from the beginning, and its neighbours."""

    start: float
    length: float
    after: str
    before: str


@dataclass(frozen=True)
class Summary:
    """Microseconds by kind, which add up to the whole; communication under cover of computation is counted apart."""

    kinds: dict[str, float]
    hidden_communication: float
    gaps: list[Gap]
    steps: int


def kind_of(name: str) -> str:
    """The kind of work a kernel or operator does, by its name."""
    return next((kind for kind, pattern in _PATTERNS if pattern.search(name)), ELEMENTWISE)


def read_trace(path: str | Path) -> tuple[list[Event], int]:
    """(device events, profiled steps) of a Chrome trace written by torch.profiler.

    Where the trace has kernels of an accelerator they are the events; else the operators of the CPU's busiest thread,
    each without the operators it calls.
    """
    entries = [
        e for e in json.loads(Path(path).read_text(encoding="utf-8"))["traceEvents"] if e.get("ph") == "X"
    ]
    steps = {e["name"] for e in entries if e["name"].startswith("ProfilerStep#")}
    kernels = [e for e in entries if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    ranges = "gpu_user_annotation" if kernels else "user_annotation"
    updates = [
        (e["ts"], e["ts"] + e["dur"])
        for e in entries
        if (e.get("cat"), e["name"]) == (ranges, OPTIMIZER_RANGE)
    ]
    spans = [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in kernels] or _operators(entries)
    events = []
    for name, start, end in spans:
        kind = kind_of(name)
        if kind != COMMUNICATION and any(low <= start < high for low, high in updates):
            kind = OPTIMIZER
        events.append(Event(name, kind, start, end))
    return events, max(len(steps), 1)


def _operators(entries: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """Stretches of time of the thread that runs most operators, each named after the innermost operator."""
    threads: defaultdict[Any, list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        if entry.get("cat") == "cpu_op":
            threads[entry.get("tid")].append(entry)
    busiest = max(threads.values(), key=lambda ops: sum(op["dur"] for op in ops), default=[])
    spans: list[tuple[str, float, float]] = []
    stack: list[tuple[str, float]] = []  # (name, end) of the operators around the present time
    now = 0.0

    def advance(to: float) -> None:
        nonlocal now
        while stack and stack[-1][1] <= to:
            name, end = stack.pop()
            if end > now:
                spans.append((name, now, end))
                now = end
        if stack and to > now:
            spans.append((stack[-1][0], now, to))
        now = max(now, to)

    for op in sorted(busiest, key=lambda op: (op["ts"], -op["dur"])):
        advance(op["ts"])
        stack.append((op["name"], op["ts"] + op["dur"]))
    advance(float("inf"))
    return spans


def summarize(events: Iterable[Event], steps: int = 1, gaps: int = 3) -> Summary:
    """Divide the time from the first to the last event among kinds of work.

    Where several events overlap (streams), computation covers communication, and of two computations the one that began
    first counts.
    """
    ordered = sorted(events, key=lambda event: event.start)
    kinds = dict.fromkeys(KINDS, 0.0)
    if not ordered:
        return Summary(kinds, 0.0, [], steps)
    computing = [event for event in ordered if event.kind != COMMUNICATION]
    covered: list[tuple[float, float]] = []  # disjoint stretches of computation, in order
    reached = ordered[0].start
    for event in computing:
        start = max(event.start, reached)
        if event.end > start:
            kinds[event.kind] += event.end - start
            covered.append((start, event.end))
            reached = event.end
    total = _length(ordered)
    busy = _union(ordered)
    kinds[COMMUNICATION] = sum(end - start for start, end in busy) - sum(
        end - start for start, end in covered
    )
    kinds[IDLE] = total - sum(end - start for start, end in busy)
    transferring = sum(end - start for start, end in _union([e for e in ordered if e.kind == COMMUNICATION]))
    found = [Gap(low_end, high - low_end, "", "") for (_, low_end), (high, _) in itertools.pairwise(busy)]
    largest = sorted(found, key=lambda gap: -gap.length)[:gaps]
    return Summary(
        kinds, transferring - kinds[COMMUNICATION], [_named(gap, ordered) for gap in largest], steps
    )


def _length(ordered: list[Event]) -> float:
    return max(event.end for event in ordered) - ordered[0].start


def _union(ordered: list[Event]) -> list[tuple[float, float]]:
    """Disjoint stretches covered by events that are sorted by their start."""
    result: list[tuple[float, float]] = []
    for event in ordered:
        if result and event.start <= result[-1][1]:
            result[-1] = (result[-1][0], max(result[-1][1], event.end))
        else:
            result.append((event.start, event.end))
    return result


def _named(gap: Gap, ordered: list[Event]) -> Gap:
    end = gap.start + gap.length
    after = max((e for e in ordered if e.end <= gap.start), key=lambda e: e.end).name
    before = next(e.name for e in ordered if e.start >= end)
    return Gap(gap.start - ordered[0].start, gap.length, after, before)


def report(summary: Summary) -> list[str]:
    """The lines that `--profile` prints: milliseconds and share per step by kind, and the largest gaps."""
    total = sum(summary.kinds.values())
    lines = [f"> profile of {summary.steps} step(s), {total / summary.steps / 1e3:.2f} ms each:"]
    for kind, spent in summary.kinds.items():
        share = 100 * spent / total if total else 0.0
        line = f">   {kind:<17}{spent / summary.steps / 1e3:10.2f} ms {share:5.1f} %"
        if kind == COMMUNICATION and summary.hidden_communication > 0:
            line += f"  (and {summary.hidden_communication / summary.steps / 1e3:.2f} ms under computation)"
        lines.append(line)
    for gap in summary.gaps:
        lines.append(
            f">   gap of {gap.length / 1e3:.3f} ms at {gap.start / 1e3:.2f} ms: "
            f"after {gap.after[:60]}, before {gap.before[:60]}"
        )
    return lines


class Profiler:
    """Profiles the steps from `--profile-step-start` to `--profile-step-end` on `--profile-ranks`.

    Under nsys the range is marked for it, as v0.9 does. Elsewhere, and with `--use-pytorch-profiler` always, PyTorch's
    profiler writes a trace to `--tensorboard-dir` (or `--save`/profile, or ./profile) and a summary is printed.
    """

    def __init__(self, args: Namespace) -> None:
        self._args = args
        self._active = args.profile and dist.get_rank() in args.profile_ranks
        self._torch: Any = None
        attached = "NSYS_PROFILING_SESSION_ID" in os.environ
        if self._active and (args.use_pytorch_profiler or not attached):
            start = args.profile_step_start
            self._torch = torch.profiler.profile(
                schedule=torch.profiler.schedule(
                    wait=max(start - 1, 0),
                    warmup=1 if start > 0 else 0,
                    active=args.profile_step_end - start,
                    repeat=1,
                ),
                on_trace_ready=self._write,
                record_shapes=True,
                with_stack=args.use_pytorch_profiler,
            )
            self._torch.start()

    def before(self, iteration: int) -> None:
        """Call before step `iteration + 1`."""
        if self._torch is not None:
            self._torch.step()
        elif self._active and iteration == self._args.profile_step_start:
            device.start_external_profiler()

    def after(self, iteration: int) -> None:
        """Call after step `iteration`."""
        if self._active and iteration == self._args.profile_step_end:
            if self._torch is not None:
                self._torch.stop()
                self._torch = None
            else:
                device.stop_external_profiler()

    def _write(self, profile: Any) -> None:
        args = self._args
        folder = Path(args.tensorboard_dir or (Path(args.save) / "profile" if args.save else "profile"))
        folder.mkdir(parents=True, exist_ok=True)
        # The name TensorBoard's profiler plugin looks for.
        path = folder / f"{socket.gethostname()}_{os.getpid()}.{time.time_ns()}.pt.trace.json"
        profile.export_chrome_trace(str(path))
        lines = [f"> trace: {path}", *report(summarize(*read_trace(path)))]
        prefix = f"[rank {dist.get_rank()}] " if len(args.profile_ranks) > 1 else ""
        print("\n".join(prefix + line for line in lines), flush=True)
