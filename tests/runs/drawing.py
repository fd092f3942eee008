"""Hypothesis over whole runs: a few examples in every run of the tests, many more in parts that can be repeated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import SearchStrategy

_QUIET = settings(
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def always_the_same(examples: int) -> settings:
    """So many examples, drawn alike every time."""
    return settings(_QUIET, max_examples=examples, derandomize=True)


def check_part(check: Callable[[Any], None], drawn: SearchStrategy[Any], number: int, examples: int) -> None:
    """Check so many examples, which `number` determines."""
    seed(number)(settings(_QUIET, max_examples=examples)(given(drawn)(check)))()
