"""How far a run is: a bar on a terminal, one line every so many documents elsewhere."""

from __future__ import annotations

import sys
import time

BAR_WIDTH = 30
BAR_SECONDS = 0.5
MIB = 1 << 20


class ProgressReport:
    """Writes to stderr. `total_bytes` is the size of the input on disk, None when unknown."""

    def __init__(self, log_interval: int, total_bytes: int | None) -> None:
        self.log_interval, self.total_bytes = log_interval, total_bytes
        self.on_terminal = sys.stderr.isatty()
        self._start = self._drawn = time.time()
        self._documents = self._characters = 0
        self._next = log_interval

    def update(self, documents: int, characters: int, bytes_done: int) -> None:
        """Account for more documents, their characters, and the bytes of input consumed so far in all."""
        before, before_characters = self._documents, self._characters
        self._documents += documents
        self._characters += characters
        if self.on_terminal:
            self._draw(bytes_done)
            return
        elapsed = max(time.time() - self._start, 1e-9)
        while self._next <= self._documents:
            share = (self._next - before) / documents
            megabytes = (before_characters + share * characters) / elapsed / MIB
            print(
                f"Processed {self._next} documents ({self._next / elapsed} docs/s, {megabytes} MB/s).",
                file=sys.stderr,
                flush=True,
            )
            self._next += self.log_interval

    def _draw(self, bytes_done: int) -> None:
        now = time.time()
        if now - self._drawn < BAR_SECONDS:
            return
        self._drawn = now
        elapsed = now - self._start
        rate = f"{self._documents:,} documents, {self._characters / elapsed / MIB:.1f} MB/s"
        if self.total_bytes:
            share = min(1.0, bytes_done / self.total_bytes)
            left = elapsed * (1 - share) / share if share else 0.0
            filled = "=" * round(BAR_WIDTH * share)
            line = f"[{filled:<{BAR_WIDTH}}] {share:4.0%} {rate}, {_clock(left)} left"
        else:
            line = f"{rate}, {_clock(elapsed)}"
        print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the bar's line."""
        if self.on_terminal:
            print(file=sys.stderr)


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"
