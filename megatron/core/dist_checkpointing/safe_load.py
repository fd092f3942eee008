"""Read pickled checkpoint files without running what strangers put into them.

Only the types that checkpoints are made of are rebuilt: torch's own safe set plus the few below. A class of a
Megatron package that does not exist here (old loss scalers, old enums) becomes an inert stand-in. Anything else
is refused by name.
"""

from __future__ import annotations

import argparse
import io
import pickle
import re
import types
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch.serialization import safe_globals

from megatron.core.enums import ModelType
from megatron.core.errors import CheckpointError

_ZIP_MAGIC = b"PK\x03\x04"
_STAND_IN_ROOTS = ("megatron", "fp16")
_MOST_STAND_INS = 32
_REFUSED_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


class UnsafeFileError(CheckpointError):
    """The file would import something that is not allowed; no other checkpoint should quietly replace it."""


class StandIn:
    """What is left of an object whose class belongs to another Megatron version: its attributes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.constructor_arguments = (args, kwargs)


def allowed_globals() -> list[Any]:
    """The types beyond torch's own that a checkpoint may contain, as `torch.serialization.safe_globals` takes it."""
    reconstruct = np.empty(0).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    allowed: list[Any] = [
        argparse.Namespace,
        types.SimpleNamespace,
        io.BytesIO,
        ModelType,
        np.ndarray,
        np.dtype,
    ]
    allowed += [type(np.dtype(code)) for code in "?bBhHiIqQefdFDSUO"]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        # numpy 2 renamed the module; files of either age are read by either.
        allowed += [(reconstruct, f"{module}._reconstruct"), (scalar, f"{module}.scalar")]
    return allowed


def load_file(path: str | Path, *, allow_unsafe_pickle: bool = False, mmap: bool = True) -> Any:
    """torch.load on the CPU, memory-mapped when the format allows it, refusing everything but plain data.

    CheckpointError if the file is missing or damaged, UnsafeFileError if it would import something that is not
    allowed; `allow_unsafe_pickle` loads even that, and so runs whatever code the file holds.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            is_zip = file.read(4) == _ZIP_MAGIC
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read: {error.strerror}", "check the path") from error
    return _load(str(path), path, mmap=mmap and is_zip, allow_unsafe_pickle=allow_unsafe_pickle)


def load_stream(stream: IO[bytes], name: str, *, allow_unsafe_pickle: bool = False) -> Any:
    """As `load_file` for a seekable stream; `name` stands for it in messages."""
    return _load(stream, name, mmap=None, allow_unsafe_pickle=allow_unsafe_pickle)


def _load(source: Any, name: str | Path, *, mmap: bool | None, allow_unsafe_pickle: bool) -> Any:
    stand_ins: list[Any] = []
    while True:
        try:
            if hasattr(source, "seek"):
                source.seek(0)
            if allow_unsafe_pickle:
                return torch.load(source, map_location="cpu", weights_only=False, mmap=mmap)
            with safe_globals(allowed_globals() + stand_ins):
                return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            refused = _REFUSED_GLOBAL.search(str(error))
            if refused is None:
                why = f"not a file of plain tensors and numbers, or damaged ({_reason(error)})"
                raise CheckpointError(str(name), why, "use an earlier checkpoint") from error
            if refused[1].split(".")[0] not in _STAND_IN_ROOTS or len(stand_ins) >= _MOST_STAND_INS:
                why = f"it refers to {refused[1]}, and loading it could run code"
                fix = "use another file or, if you trust its author, load it in a training run with --allow-unsafe-pickle"
                raise UnsafeFileError(str(name), why, fix) from None
            stand_ins.append((_stand_in(refused[1]), refused[1]))
        except (RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError, OSError) as error:
            # torch has no error of its own for a damaged file: it surfaces as any of these.
            why = f"the file is damaged or was cut short ({_reason(error)})"
            raise CheckpointError(str(name), why, "use an earlier checkpoint") from error


def _reason(error: Exception) -> str:
    """The telling line of an error: torch wraps a refused pickle in a page of advice."""
    inner = re.search(r"WeightsUnpickler error:\s*(\S.*)", str(error))
    lines = (inner[1] if inner else str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _stand_in(full_name: str) -> type:
    module, _, name = full_name.rpartition(".")
    return type(name, (StandIn,), {"__module__": module})
