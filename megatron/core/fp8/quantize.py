"""The operation `fp8_quantize`: a matrix to fp8, as it is and transposed, with its largest magnitude noted on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.core.kernels.registry import register


def quantize(
    x: Tensor, scale: Tensor, fmt: torch.dtype, amax: Tensor | None = None, transposed: bool = False
) -> tuple[Tensor, Tensor | None]:
    """x [r, c] times scale (fp32, one element), saturated and rounded to `fmt`: ([r, c], [c, r] or None).

    The largest magnitude of x is entered in `amax` (fp32, one element) where it is larger. NaN stays NaN, so that the
    checks for it see it; infinities saturate and show in `amax`.
    """
    if amax is not None:
        torch.maximum(amax, largest(x), out=amax)
    top = torch.finfo(fmt).max
    rows = (x.float() * scale).clamp_(-top, top).to(fmt)
    return rows, rows.t().contiguous() if transposed else None


def largest(x: Tensor) -> Tensor:
    """The largest magnitude of x as an fp32 scalar on its device; 0 for an empty tensor."""
    if not x.numel():
        return torch.zeros((), device=x.device)
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high).float()


@register("fp8_quantize", "torch", rank=0)
def _load() -> Any:
    return quantize
