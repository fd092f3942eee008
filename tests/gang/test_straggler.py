"""Which rank is slow: reports over ranks that wait for known times, with a device whose events read the host's clock."""

from __future__ import annotations

import logging
import re
import socket
import time
import urllib.request
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist

from megatron.core import straggler
from tests.gang.harness import run_gang

FAST_S, SLOW_S, FETCH_S = 0.02, 0.3, 0.05
ITERATIONS = 2


class HostEvent:
    """An event that is reached when it is recorded."""

    def __init__(self, device: torch.device, enable_timing: bool) -> None:
        del device, enable_timing

    def record(self) -> None:
        self.reached = time.perf_counter()

    def elapsed_time(self, later: HostEvent) -> float:
        return (later.reached - self.reached) * 1000.0


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _three_reports(port: int) -> list[list[str]]:
    """What is logged after an interval measured, one after the switch was asked, and one with measuring off."""
    accelerator = SimpleNamespace(
        available=lambda: True,
        current=lambda: torch.device("cpu"),
        synchronize=lambda: None,
        sensors=lambda: (61, 350_000, 97, 1980),
    )
    detector = straggler.StragglerDetector
    with (
        patch.object(torch, "Event", HostEvent),
        patch.object(straggler, "device", accelerator),
        patch.object(detector, "_instance", None),
    ):
        return _measured(detector(), port)


def _measured(detector: straggler.StragglerDetector, port: int) -> list[list[str]]:
    handler = Lines()
    straggler.logger.addHandler(handler)
    straggler.logger.setLevel(logging.INFO)
    rank = dist.get_rank()
    detector.configure(dist.get_world_size(), rank, mmcnt=2, port=port, enabled=True)
    reports = []
    for number in range(3):
        for _ in range(ITERATIONS):
            with detector(bdata=True):
                time.sleep(FETCH_S if rank == 0 else 0.0)
            with detector:
                time.sleep(SLOW_S if rank == 2 else FAST_S)
        if number == 1 and rank == 0:
            with urllib.request.urlopen(f"http://localhost:{port}") as answer:
                assert b"OFF" in answer.read()
        logged = detector.report(6e12, ITERATIONS)
        assert logged == (rank == 0 and number < 2)
        reports.append(handler.lines)
        handler.lines = []
    assert not detector.enabled
    straggler.logger.removeHandler(handler)
    return reports


def test_the_slow_rank_is_named_until_measuring_is_switched_off() -> None:
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    reports = run_gang(4, _three_reports, port)
    assert all(lines == [] for rank in reports[1:] for lines in rank)
    first, second, third = reports[0]
    assert third == []
    for slowest, fastest in (first, second):
        assert slowest.startswith("straggler report, slowest: rank 2: ") and "; rank" in slowest
        assert "61 C, 350 W, 97 %, 1980 MHz" in slowest
        assert fastest.startswith("straggler report, fastest: rank ") and "rank 2" not in fastest
        busy, fetching, teraflops = (
            float(x) for x in re.findall(r"([\d.]+) (?:ms/iter|TFLOP/s)", slowest)[:3]
        )
        # Sleeping lasts at least as long as asked; nothing bounds it from above on a busy machine.
        assert busy >= 1000 * SLOW_S and fetching >= 0.0
        # A quarter of 6 TFLOP fell to the rank; a third of that is the forward pass.
        assert abs(teraflops - 0.5 / (busy * ITERATIONS / 1000)) < 0.01
