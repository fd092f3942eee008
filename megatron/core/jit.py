"""Which compiler decorates the fused elementwise functions.

torch.compile fuses them on the accelerator. On the CPU it would need a C++ toolchain at run time, so there the
decorator returns the function untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from megatron.core import device

F = TypeVar("F", bound=Callable[..., Any])


def jit_fuser(function: F) -> F:
    """Compile an elementwise function where that helps; the result computes the same values."""
    return cast(F, torch.compile(function, dynamic=True)) if device.available() else function
