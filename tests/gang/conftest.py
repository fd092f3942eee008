"""Ends the gangs with the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.gang import harness


@pytest.fixture(scope="session", autouse=True)
def _gangs() -> Iterator[None]:
    yield
    harness.close_all()
