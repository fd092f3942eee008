#!/usr/bin/env python3
"""From process start to the first iteration of `pretrain_gpt.py`, beside a bare `import torch`, in one run.

    python benchmarks/startup.py [--runs 10]

One process, the 10M-parameter GPT of benchmarks/cpu_pretrain.py, mock data, no checkpoint. Starts and bare imports take
turns. Of each the least of all runs counts: wall time, and CPU time of the process, which load of others hardly changes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cpu_pretrain import ROOT, SMALL

#: Seconds Megatron-LM core_v0.9.0 needs from process start to the first iteration, brought to a CPU, on a quiet machine.
V09_SECONDS = 2.6
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")

#: Lines of the log by which the phases end.
PHASES = {
    "initialized": "[after megatron is initialized]",
    "model built": "[after model, optimizer, and learning rate scheduler are built]",
    "data ready": "[after dataloaders are built]",
    "first step begins": "[before the start of training step]",
    "first step done": " iteration        1/",
}


def cpu_seconds(process: int) -> float:
    """CPU time a running process has used so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


def start(words: list[str], environment: dict[str, str]) -> Iterator[tuple[str, float, float]]:
    """Run Python; yields each line it prints with wall and CPU seconds since the start."""
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None, "the output is piped"
        for line in process.stdout:
            yield line, time.perf_counter() - began, cpu_seconds(process.pid)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with status {process.returncode}")


def measure(runs: int, threads: int) -> dict[str, dict[str, float]]:
    """Least wall and CPU seconds until `import torch` and until each phase."""
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads), PYTHONUNBUFFERED="1")
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # as for a user, the second start finds compiled modules
    least: dict[str, dict[str, float]] = {}

    def note(phase: str, wall: float, cpu: float) -> None:
        seen = least.setdefault(phase, {"wall": wall, "cpu": cpu})
        seen["wall"], seen["cpu"] = min(seen["wall"], wall), min(seen["cpu"], cpu)

    with tempfile.TemporaryDirectory() as folder:
        command = SMALL.command(1, folder)
        for number in range(runs + 1):
            for _, wall, cpu in start(["-c", "import torch; print('imported', flush=True)"], environment):
                if number:
                    note("import torch", wall, cpu)
            for line, wall, cpu in start(command, environment):
                for phase, text in PHASES.items():
                    if number and text in line:
                        note(phase, wall, cpu)
    return least


def main() -> None:
    """Measure, print and write the figures down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    least = measure(options.runs, options.threads)
    base = least["import torch"]
    for phase, seconds in least.items():
        ratios = ", ".join(
            f"{kind} {value:.2f} s ({value / base[kind]:.2f} x)" for kind, value in seconds.items()
        )
        print(f"{phase:18} {ratios}")
    import torch

    record: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/startup.py", *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "threads": options.threads,
        "runs": options.runs,
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "seconds": {phase: {k: round(v, 3) for k, v in s.items()} for phase, s in least.items()},
        "v09_seconds_to_first_iteration": V09_SECONDS,
    }
    (ROOT / "benchmarks/results").mkdir(exist_ok=True)
    (ROOT / "benchmarks/results/cpu_startup.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
