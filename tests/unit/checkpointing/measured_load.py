"""Save and load a model of a given width and print how much memory that takes; run as a program.

Only anonymous memory counts: pages of a mapped file are the kernel's to drop.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import torch

from tests.unit.checkpointing.toy import Run, arguments, one_process


def anonymous_mib() -> float:
    """Memory of this process that is no file's, in MiB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024


class Peak:
    """The largest `anonymous_mib` since the last `restart`."""

    def __init__(self) -> None:
        self.mib = self._before = 0.0
        self._lock = threading.Lock()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            with self._lock:  # a value from before a restart must not be noted after it
                self.mib = max(self.mib, anonymous_mib())
            time.sleep(0.001)

    def restart(self) -> None:
        """Forget what was."""
        with self._lock:
            self._before = self.mib = anonymous_mib()

    def more(self) -> float:
        """Beyond the memory at the restart."""
        return max(self.mib, anonymous_mib()) - self._before


def _fill(run: Run) -> None:
    """Weights that differ from row to row, made in place: drawing ten gigabytes of noise takes minutes."""
    with torch.no_grad():
        for number, weight in enumerate(run.model.parameters()):
            weight.copy_((torch.arange(weight.shape[0]) % 251 + number).view(-1, *[1] * (weight.dim() - 1)))


def main() -> None:
    """`measured_load.py DIRECTORY FORMAT WIDTH`."""
    directory, ckpt_format, width = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.nn.Linear.reset_parameters = lambda self: None  # type: ignore[method-assign]
    peak = Peak()
    with one_process():
        small = Run(arguments(directory / "small", ckpt_format=ckpt_format))
        _fill(small)
        small.iteration = 1
        small.save()
        small.load()  # whatever is imported and allocated once is there now
        run = Run(arguments(directory / "large", ckpt_format=ckpt_format), width=width)
        _fill(run)
        run.iteration = 1
        peak.restart()
        run.save()
        saving = peak.more()
        # Means, exact in float64: sums of whole numbers.
        expected = [w.mean(dtype=torch.float64) for w in run.model.parameters()]
        with torch.no_grad():
            for weight in run.model.parameters():
                weight.fill_(-1.0)
        peak.restart()
        if run.load() != 1:
            raise SystemExit("another checkpoint was loaded")
        loading = peak.more()
        if [w.mean(dtype=torch.float64) for w in run.model.parameters()] != expected:
            raise SystemExit("the weights came back changed")
    model = sum(w.nbytes for w in run.model.parameters()) / 2**20
    print(f"model {model:.0f} MiB; beyond it, saving took {saving:.0f} and loading {loading:.0f} MiB")


if __name__ == "__main__":
    main()
