"""`--config-logger-dir`: the constructor arguments of the main objects, one JSON file per object and rank."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron.core import parallel_state
from megatron.core.errors import InvariantError

_counts: Counter[str] = Counter()


def get_config_logger_path(config: Any) -> str:
    """The directory a configuration names; empty if it names none."""
    return getattr(config, "config_logger_dir", "") or ""


def has_config_logger_enabled(config: Any) -> bool:
    """Whether objects of this configuration write their arguments."""
    return get_config_logger_path(config) != ""


def get_path_count(path: str) -> int:
    """How often this process asked for `path` before; counts this time too."""
    _counts[path] += 1
    return _counts[path] - 1


def get_path_with_count(path: str) -> str:
    """`<path>.iter<n>`, where n counts the calls for this path from 0."""
    return f"{path}.iter{get_path_count(path)}"


class JSONEncoderWithMcoreTypes(json.JSONEncoder):
    """Writes configurations, specs, dtypes and functions by what they say, and any other object by its type."""

    def default(self, o: Any) -> Any:
        """A value that json can write in place of `o`."""
        if isinstance(o, (torch.dtype, torch.device, torch.Size)):
            return str(o)
        if isinstance(o, enum.Enum):
            return o.name
        if dataclasses.is_dataclass(o) and not isinstance(o, type):
            return {field.name: getattr(o, field.name) for field in dataclasses.fields(o)}
        if isinstance(o, torch.nn.Module):
            return {"type": type(o).__name__, "parameters": sum(p.numel() for p in o.parameters())}
        name = getattr(o, "__qualname__", None)
        return f"{o.__module__}.{name}" if name else f"<{type(o).__name__}>"


def log_config_to_disk(config: Any, dict_data: Mapping[str, Any], prefix: str = "") -> None:
    """Write `dict_data` to `<directory>/<prefix>.rank_<tp>_<dp>_<cp>_<pp>_<ep>.iter<n>.json`.

    Values that hold `self` are left out, and `prefix` is the class of `self` if it is empty. InvariantError if the
    configuration names no directory.
    """
    folder = get_config_logger_path(config)
    if not folder:
        raise InvariantError(
            "config_logger_dir", "is empty", "set it, or ask has_config_logger_enabled first"
        )
    Path(folder).mkdir(parents=True, exist_ok=True)
    owner = dict_data.get("self")
    stem = f"{prefix or type(owner).__name__}.rank_{parallel_state.get_all_ranks()}"
    path = Path(get_path_with_count(str(Path(folder) / stem)) + ".json")
    data = {
        name: value for name, value in dict_data.items() if value is not owner and not name.startswith("__")
    }
    path.write_text(
        json.dumps(data, cls=JSONEncoderWithMcoreTypes, indent=2, skipkeys=True), encoding="utf-8"
    )
