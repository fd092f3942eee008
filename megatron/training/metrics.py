"""`metrics.jsonl`: every logged number of a run, one JSON object per line, readable while the run goes on."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends one line per record and flushes it, so that a crash loses at most the line being written."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, kind: str, **values: Any) -> None:
        """Append `{"kind": kind, "time": seconds since the epoch, **values}`; non-finite numbers become strings."""
        record = {"kind": kind, "time": round(time.time(), 3)}
        record |= {key: _plain(value) for key, value in values.items() if value is not None}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _plain(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
