"""Recorded inputs and outputs, and running a script of tools/openwebtext as a function or as a process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
RECORDED = REPOSITORY / "tests" / "golden" / "openwebtext"
SCRIPTS = REPOSITORY / "tools" / "openwebtext"

Call = Callable[..., list[str]]


def expected(name: str) -> Any:
    return json.loads((RECORDED / name).read_text(encoding="utf-8"))


def documents(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def without_times(line: str) -> str:
    """A printed line with `<t>` for elapsed seconds, as recordings have it."""
    return re.sub(r"((?:elapsed )?time(?: elapsed)?(?: \(s\))?:) [\d.]+", r"\1 <t>", line)


def process(script: str, *words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own."""
    command = [sys.executable, str(SCRIPTS / script), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a script's `main` in this process, without workers; the lines it prints."""

    def run(script: ModuleType, *words: object) -> list[str]:
        monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, words)])
        monkeypatch.setattr(sys.modules["loose_json"], "cores", lambda: 1)
        if hasattr(script, "cores"):
            monkeypatch.setattr(script, "cores", lambda: 1)
        capsys.readouterr()
        script.main()
        return [without_times(line) for line in capsys.readouterr().out.splitlines()]

    return run
