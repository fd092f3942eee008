"""What a benchmark ran on, for the records in benchmarks/results."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any


def surroundings(packages: Iterable[str]) -> dict[str, Any]:
    """Command line, processor, cores, and the versions of Python and of the packages that did the work."""
    return {
        "command": " ".join(["python", *sys.argv]),
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "packages": {package: version(package) for package in packages},
    }


def processor() -> str:
    """The processor's name as the kernel tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
