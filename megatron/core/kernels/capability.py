"""One probe of the machine: device kind, compute capability and versions of optional packages."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

# import name -> distributions that provide it, in order of preference
OPTIONAL_PACKAGES: dict[str, tuple[str, ...]] = {
    "triton": ("triton", "pytorch-triton"),
    "transformer_engine": ("transformer-engine", "transformer_engine"),
    "flash_attn": ("flash-attn", "flash_attn"),
    "flash_attn_interface": ("flash-attn-3", "flash_attn_3", "flashattn-hopper"),
    "apex": ("apex",),
    "grouped_gemm": ("grouped_gemm", "grouped-gemm"),
}


@dataclass(frozen=True)
class Capabilities:
    """What this process may use; `compute` is the CUDA compute capability, None without a CUDA device."""

    compute: tuple[int, int] | None = None
    device_name: str = "cpu"
    torch_version: str = "0"
    packages: Mapping[str, str] = field(default_factory=dict)  # import name -> version, installed ones only

    @property
    def has_cuda(self) -> bool:
        return self.compute is not None


_override: list[Capabilities] = []


def probe() -> Capabilities:
    """The capabilities of this process; measured at the first call, never at import."""
    return _override[-1] if _override else _probe_once()


@contextmanager
def pretend(capabilities: Capabilities) -> Iterator[None]:
    """Let `probe()` answer `capabilities` inside the block: plans for, and tests of, machines one does not
    have.
    """
    _override.append(capabilities)
    try:
        yield
    finally:
        _override.pop()


@functools.lru_cache(maxsize=1)
def _probe_once() -> Capabilities:
    compute, name = None, "cpu"
    if torch.cuda.is_available():
        compute = torch.cuda.get_device_capability()
        name = torch.cuda.get_device_name()
    found = {package: _installed_version(package) for package in OPTIONAL_PACKAGES}
    return Capabilities(compute, name, torch.__version__, {p: v for p, v in found.items() if v is not None})


def _installed_version(package: str) -> str | None:
    """Version of an importable package without importing it; "0" when it does not tell its version."""
    if importlib.util.find_spec(package) is None:
        return None
    for distribution in OPTIONAL_PACKAGES[package]:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "0"


def version_tuple(version: str) -> tuple[int, ...]:
    """Numeric part of a version: '2.13.0+cpu' -> (2, 13, 0); comparable, local and pre-release parts
    ignored.
    """
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(n) for n in numbers.group().split(".")) if numbers else (0,)
