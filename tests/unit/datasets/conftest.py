"""Dataset tests run in the directory of the recordings: their paths are part of the recorded cache keys."""

from __future__ import annotations

import pytest

from tests.unit.datasets.support import GOLDEN


@pytest.fixture(autouse=True)
def _in_golden_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)
