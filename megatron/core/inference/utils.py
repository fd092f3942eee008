"""Small helpers of the queue."""

from __future__ import annotations


class Counter:
    """An endless iterator over whole numbers; `counter` is the next one."""

    def __init__(self, start: int = 0) -> None:
        self.counter = start

    def __next__(self) -> int:
        value = self.counter
        self.counter += 1
        return value

    def reset(self) -> None:
        """Go on from 0."""
        self.counter = 0
