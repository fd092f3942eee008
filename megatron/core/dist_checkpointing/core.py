"""The small file that makes a directory a distributed checkpoint: which backends wrote it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megatron.core.errors import CheckpointError

CONFIG_FNAME = "metadata.json"
COMMON_FNAME = "common.pt"

# The name under which callers of the library catch errors of distributed checkpoints.
CheckpointingException = CheckpointError


@dataclass
class CheckpointingConfig:
    """Names and versions of the formats of the sharded and of the common part."""

    sharded_backend: str
    sharded_backend_version: int = 1
    common_backend: str = "torch"
    common_backend_version: int = 1


def check_is_distributed_checkpoint(checkpoint_dir: str | Path) -> bool:
    """Whether the directory holds a complete distributed checkpoint (its metadata.json is written last)."""
    return maybe_load_config(checkpoint_dir) is not None


def maybe_load_config(checkpoint_dir: str | Path) -> CheckpointingConfig | None:
    """The checkpoint's config, or None without a readable one that has only the known fields."""
    try:
        loaded = json.loads((Path(checkpoint_dir) / CONFIG_FNAME).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    known = {field.name for field in fields(CheckpointingConfig)}
    if not isinstance(loaded, dict) or not set(loaded) <= known or "sharded_backend" not in loaded:
        return None
    return CheckpointingConfig(**loaded)


def save_config(config: CheckpointingConfig, checkpoint_dir: str | Path) -> None:
    """Write metadata.json, durably: it declares the checkpoint complete."""
    from megatron.core.dist_checkpointing.durable import write_text

    write_text(Path(checkpoint_dir) / CONFIG_FNAME, json.dumps(asdict(config)))
