"""Which rank is slow: time spent between two points of every step, compared over all ranks.

Off by default and then free: entering and leaving the detector does nothing. On a CPU it stays off, because there
is no device whose kernels could be timed apart from the program.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from megatron.core import device

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Interval:
    """Device time between two events, and host time spent fetching data, in milliseconds."""

    start: torch.Event
    stop: torch.Event
    is_data: bool
    host_ms: float


class StragglerDetector:
    """Context manager around what shall be timed: `with detector:` the forward pass, `with detector(bdata=True):`
    the fetching of a batch. There is one instance per process.

    `report` logs on rank 0 the slowest and fastest ranks by device time. A request to `port` of rank 0's host
    (`curl HOST:PORT`) switches measuring on or off while the run goes on.
    """

    _instance: ClassVar[StragglerDetector | None] = None

    def __new__(cls) -> StragglerDetector:
        """The one instance."""
        if cls._instance is None:
            cls._instance = super().__new__(cls)
            cls._instance._set_defaults()
        return cls._instance

    def _set_defaults(self) -> None:
        self._configured = False
        self._off = True
        self._wanted = False
        self._amp = 3.0
        self._mmcnt = 1
        self._rank = 0
        self._world = 1
        self._is_data = False
        self._open: tuple[torch.Event, float] | None = None
        self._intervals: list[_Interval] = []
        self.start: Callable[[], None] = self.null_method
        self.stop: Callable[[], None] = self.null_method

    def configure(
        self,
        world: int,
        rank: int,
        mmcnt: int = 1,
        amp: float = 3.0,
        port: int = 65535,
        prefill: int = 1024,
        enabled: bool = False,
    ) -> None:
        """Prepare measuring. Without an accelerator, or when already configured, nothing happens.

        mmcnt: how many of the slowest and fastest ranks to name. amp: share of a step that is measured, by which
        estimated throughput is divided (3: the forward pass only). port: of the switch on rank 0, 0 for none.
        prefill is accepted for compatibility; events are made when needed.
        """
        if self._configured or not device.available():
            return
        self._configured, self._world, self._rank = True, world, rank
        self._mmcnt, self._amp, self._wanted = max(mmcnt, 1), amp, enabled
        if rank == 0 and port:
            threading.Thread(target=self._serve_switch, args=(port,), daemon=True).start()
        self._apply(enabled)

    def reset(self) -> None:
        """Forget what was measured."""
        self._open = None
        self._intervals.clear()

    def start_method(self) -> None:
        """Begin an interval."""
        event = torch.Event(device=device.current(), enable_timing=True)
        event.record()
        self._open = event, time.perf_counter()

    def stop_method(self) -> None:
        """End the interval; outside one nothing happens."""
        if self._open is None:
            return
        event = torch.Event(device=device.current(), enable_timing=True)
        event.record()
        start, began = self._open
        host_ms = (time.perf_counter() - began) * 1000.0
        self._intervals.append(_Interval(start, event, self._is_data, host_ms))
        self._open = None
        self._is_data = False

    def elapsed(self) -> tuple[float, float, int, int, int, int]:
        """Since the last reset (device time, host time fetching data) in ms, then `device.sensors()` as it is now.

        Waits for the device.
        """
        device.synchronize()
        on_device = sum(each.start.elapsed_time(each.stop) for each in self._intervals if not each.is_data)
        fetching = sum(each.host_ms for each in self._intervals if each.is_data)
        return on_device, fetching, *device.sensors()

    def report(self, total_flops: float = 0.0, log_interval: int = 0) -> bool:
        """Log the slowest and fastest ranks since the last report; True if this rank logged. All ranks must call.

        total_flops: of all ranks since the last report; log_interval: iterations since then.
        """
        if not self._configured:
            return False
        wanted = torch.tensor([self._wanted], dtype=torch.int32, device=device.current())
        dist.broadcast(wanted, src=0)
        logged = False
        if not self._off:
            mine = torch.tensor(self.elapsed(), dtype=torch.float32, device=device.current())
            everyone = [torch.empty_like(mine) for _ in range(self._world)]
            dist.all_gather(everyone, mine)
            logged = self._log(torch.stack(everyone).cpu(), total_flops, max(log_interval, 1))
            self.reset()
        self._apply(bool(wanted.item()))
        return logged

    def _log(self, measured: torch.Tensor, total_flops: float, log_interval: int) -> bool:
        """measured [ranks, 6]: what `elapsed` gave on each."""
        if self._rank != 0:
            return False
        order = measured[:, 0].argsort().tolist()
        per_rank_flops = total_flops / self._world / self._amp

        def line(rank: int) -> str:
            busy_ms, fetching_ms, celsius, milliwatts, percent, megahertz = measured[rank].tolist()
            teraflops = per_rank_flops / (busy_ms / 1000.0) / 1e12 if busy_ms else 0.0
            return (
                f"rank {rank}: {busy_ms / log_interval:.2f} ms/iter, data {fetching_ms / log_interval:.2f} ms/iter, "
                f"{teraflops:.2f} TFLOP/s, {celsius:.0f} C, {milliwatts / 1000:.0f} W, {percent:.0f} %, {megahertz:.0f} MHz"
            )

        for label, ranks in (("slowest", order[::-1][: self._mmcnt]), ("fastest", order[: self._mmcnt])):
            logger.info(f"straggler report, {label}: " + "; ".join(line(rank) for rank in ranks))
        return True

    def _apply(self, enabled: bool) -> None:
        self._off = not enabled
        self.start = self.start_method if enabled else self.null_method
        self.stop = self.stop_method if enabled else self.null_method

    def _serve_switch(self, port: int) -> None:
        """Toggle at every connection; the next report carries the new state to all ranks."""
        with socket.create_server(("", port)) as server:
            while True:
                connection, _ = server.accept()
                with connection:
                    connection.recv(4096)
                    self._wanted = not self._wanted
                    text = (
                        f"straggler detection turned {'ON' if self._wanted else 'OFF'} from the next report\n"
                    )
                    head = (
                        f"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {len(text)}\r\n\r\n"
                    )
                    connection.sendall((head + text).encode())

    @property
    def enabled(self) -> bool:
        """True while intervals are measured."""
        return not self._off

    @property
    def configured(self) -> bool:
        """True once `configure` found an accelerator."""
        return self._configured

    @property
    def my_rank(self) -> int:
        """This process's rank."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Ranks that are compared."""
        return self._world

    def null_method(self) -> None:
        """Nothing, at no cost."""

    def __call__(self, bdata: bool = False) -> StragglerDetector:
        """`with detector(bdata=True):` marks the interval as fetching data."""
        self._is_data = bdata
        return self

    def __enter__(self) -> Any:
        """Begin an interval if measuring."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the interval; exceptions pass."""
        self.stop()
