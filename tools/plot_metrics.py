"""Draw the loss curve of a run: `python tools/plot_metrics.py RUN/metrics.jsonl RUN/loss.png`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main(source: Path, target: Path) -> None:
    """One panel: training loss by iteration, validation loss as points."""
    records = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    train = [r for r in records if r["kind"] == "train" and "lm loss" in r]
    valid = [r for r in records if r["kind"] == "validation" and r["at"] == f"iteration {r['iteration']}"]
    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    axes.plot([r["iteration"] for r in train], [r["lm loss"] for r in train], lw=1, label="training")
    axes.plot([r["iteration"] for r in valid], [r["lm loss"] for r in valid], "o", ms=4, label="validation")
    axes.set_xlabel("iteration")
    axes.set_ylabel("lm loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(target, dpi=120)
    print(f"loss curve: {target}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
