"""Named, levelled stop watches whose times are compared over all ranks."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import device
from megatron.core.collectives import all_gather_single
from megatron.core.errors import InvariantError

#: Width to which a label is filled up with dots.
_LABEL_WIDTH = 48
_OPTIONS = ("max", "minmax", "all")


class TimerBase(ABC):
    """What can be asked of a timer."""

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def start(self, barrier: bool = False) -> None:
        """Begin an interval; barrier: after all ranks have arrived."""

    @abstractmethod
    def stop(self, barrier: bool = False) -> None:
        """End the interval and add it."""

    @abstractmethod
    def reset(self) -> None:
        """Forget the intervals."""

    @abstractmethod
    def elapsed(self, reset: bool = True, barrier: bool = False) -> float:
        """Seconds of all intervals since the last reset."""


class DummyTimer(TimerBase):
    """A timer above the chosen level: free, and without a time to read."""

    def __init__(self) -> None:
        super().__init__("dummy timer")

    def start(self, barrier: bool = False) -> None:
        """Nothing."""

    def stop(self, barrier: bool = False) -> None:
        """Nothing."""

    def reset(self) -> None:
        """Nothing."""

    def elapsed(self, reset: bool = True, barrier: bool = False) -> float:
        """Always an error: the timer never ran."""
        raise RuntimeError(
            "this timer is above --timing-log-level and has no time; raise the level to read it"
        )


class Timer(TimerBase):
    """A stop watch that waits for the device before it reads the clock.

    `elapsed` sums the intervals since the last reset; `active_time` is never reset.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._elapsed = 0.0
        self._active_time = 0.0
        self._started = False
        self._barrier_group: ProcessGroup | None = None
        self._start_time = time.time()

    def set_barrier_group(self, barrier_group: ProcessGroup | None) -> None:
        """Ranks that wait for each other when `barrier` is asked for; None is the world."""
        self._barrier_group = barrier_group

    def start(self, barrier: bool = False) -> None:
        """Begin an interval; AssertionError if one is running."""
        assert not self._started, f"timer {self.name!r} has already been started"
        self._wait(barrier)
        self._start_time = time.time()
        self._started = True

    def stop(self, barrier: bool = False) -> None:
        """End the interval; AssertionError if none is running."""
        assert self._started, f"timer {self.name!r} is not started"
        self._wait(barrier)
        elapsed = time.time() - self._start_time
        self._elapsed += elapsed
        self._active_time += elapsed
        self._started = False

    def reset(self) -> None:
        """Forget the intervals since the last reset and any running one."""
        self._elapsed = 0.0
        self._started = False

    def elapsed(self, reset: bool = True, barrier: bool = False) -> float:
        """Seconds since the last reset; a running timer is read and goes on running."""
        running = self._started
        if running:
            self.stop(barrier=barrier)
        seconds = self._elapsed
        if reset:
            self.reset()
        if running:
            self.start(barrier=barrier)
        return seconds

    def active_time(self) -> float:
        """Seconds of all finished intervals, resets ignored."""
        return self._active_time

    def _wait(self, barrier: bool) -> None:
        if barrier and dist.is_initialized():
            dist.barrier(group=self._barrier_group)
        device.synchronize()


class Timers:
    """All timers of a run. `timers("forward-backward", log_level=1).start()` .. `.stop()`.

    log_level 0-2: timers above it do nothing. log_option: what is reported over the ranks, `max`, `minmax` or
    `all`. InvariantError for another level or option.
    """

    def __init__(self, log_level: int, log_option: str) -> None:
        self._max_log_level = 2
        if log_option not in _OPTIONS:
            raise InvariantError("--timing-log-option", f"{log_option!r} is none of {', '.join(_OPTIONS)}")
        if not 0 <= log_level <= self._max_log_level:
            raise InvariantError(
                "--timing-log-level", f"{log_level} is not between 0 and {self._max_log_level}"
            )
        self._log_level = log_level
        self._log_option = log_option
        self._timers: dict[str, Timer] = {}
        self._log_levels: dict[str, int] = {}
        self._dummy_timer = DummyTimer()

    def __call__(self, name: str, log_level: int | None = None) -> TimerBase:
        """The timer of that name, made on first use at this level (default 2)."""
        if name in self._timers:
            own = self._log_levels[name]
            assert log_level is None or log_level == own, (
                f"timer {name!r} was created at log level {own} and is now asked for at {log_level}"
            )
            return self._timers[name]
        level = self._max_log_level if log_level is None else log_level
        assert level <= self._max_log_level, (
            f"log level {level} of timer {name!r} is larger than the maximum {self._max_log_level}"
        )
        if level > self._log_level:
            return self._dummy_timer
        self._timers[name] = Timer(name)
        self._log_levels[name] = level
        return self._timers[name]

    def get_all_timers_string(
        self,
        names: Sequence[str] | None = None,
        normalizer: float = 1.0,
        reset: bool = True,
        barrier: bool = False,
    ) -> str | None:
        """The report in milliseconds / normalizer over all ranks, or None if no timer ran.

        All ranks must call. Unknown names are left out; times <= 0 of a rank are ignored.
        """
        assert normalizer > 0.0, f"normalizer must be positive, got {normalizer}"
        names = list(self._timers if names is None else names)
        times = self._times_of_all_ranks(names, reset, barrier) * (1000.0 / normalizer)
        if self._log_option == "all":
            return self._every_rank(names, times)
        header = "max" if self._log_option == "max" else "(min, max)"
        lines = [f"{header} time across ranks (ms):"]
        for name, (low, high) in self._extremes(names, times).items():
            label = f"{name} ".ljust(_LABEL_WIDTH, ".")
            value = f"{high:.2f}" if self._log_option == "max" else f"({low:.2f}, {high:.2f})"
            lines.append(f"    {label}: {value}")
        return "\n".join(lines) if len(lines) > 1 else None

    def log(
        self,
        names: Sequence[str] | None,
        rank: int | None = None,
        normalizer: float = 1.0,
        reset: bool = True,
        barrier: bool = False,
    ) -> None:
        """Print the report on one rank (default the last). All ranks must call."""
        report = self.get_all_timers_string(names, normalizer, reset, barrier)
        world, me = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        if report is not None and me == (world - 1 if rank is None else rank):
            print(report, flush=True)

    def write(
        self,
        names: Sequence[str],
        writer: Any,
        iteration: int,
        normalizer: float = 1.0,
        reset: bool = True,
        barrier: bool = False,
    ) -> None:
        """Write the largest time over ranks, seconds / normalizer, as scalar `<name>-time`. All ranks must call."""
        assert normalizer > 0.0, f"normalizer must be positive, got {normalizer}"
        times = self._times_of_all_ranks(names, reset, barrier) / normalizer
        if writer is not None:
            for name, (_, high) in self._extremes(names, times).items():
                writer.add_scalar(f"{name}-time", high, iteration)

    def _times_of_all_ranks(self, names: Sequence[str], reset: bool, barrier: bool) -> Tensor:
        """Seconds [ranks, names]; 0 where a rank has no such timer, as stages of a pipeline may differ."""
        if barrier and dist.is_initialized():
            dist.barrier()
        mine = torch.tensor(
            [self._timers[name].elapsed(reset=reset) if name in self._timers else 0.0 for name in names],
            dtype=torch.float,
        )
        if not dist.is_initialized():
            return mine.unsqueeze(0)
        mine = mine.to(device.current())
        everyone = mine.new_empty(dist.get_world_size() * len(names))
        all_gather_single(everyone, mine)
        return everyone.view(-1, len(names)).cpu()

    @staticmethod
    def _extremes(names: Sequence[str], times: Tensor) -> dict[str, tuple[float, float]]:
        """(min, max) over the ranks on which the timer ran, for names that ran anywhere."""
        ran = (
            (name, [time for time in column if time > 0.0]) for name, column in zip(names, times.T.tolist())
        )
        return {name: (min(column), max(column)) for name, column in ran if column}

    @staticmethod
    def _every_rank(names: Sequence[str], times: Tensor) -> str | None:
        lines = ["times across ranks (ms):"]
        for name, column in zip(names, times.T.tolist()):
            ranks = [f"     rank {rank:2d}: {time:.2f}" for rank, time in enumerate(column) if time > 0.0]
            if ranks:
                lines += [f"  {name}:", *ranks]
        return "\n".join(lines) if len(lines) > 1 else None


@contextmanager
def timed(config: Any, name: str, log_level: int = 1) -> Iterator[None]:
    """Run a block under a timer of `config.timers`, if there are any.

    With `config.barrier_with_L1_time` all ranks must call for a timer of level 1, which starts when the last one has.
    """
    if config.timers is None:
        yield
        return
    timer = config.timers(name, log_level=log_level)
    timer.start(barrier=log_level == 1 and config.barrier_with_L1_time)
    yield
    timer.stop()
