"""Dropout masks from the generator of the device, quickly.

torch's Bernoulli draws one random number per element and takes 6 ns each on a CPU, more than the whole
arithmetic around it. Sixteen random bits per element are enough: the probability is then met to 1 part in
65536, and the scale uses the probability really applied, so the expectation is exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LEVELS = 1 << 16


def keep_scale(prob: float) -> float:
    """Factor that restores the expectation of what `keep_mask(prob)` leaves."""
    return _LEVELS / max(_LEVELS - dropped_levels(prob), 1)


def dropped_levels(prob: float) -> int:
    """How many of the 65536 values of an element's random bits drop it."""
    if not 0.0 <= prob <= 1.0:
        raise ValueError(f"dropout probability must lie in [0, 1], not {prob}")
    return round(prob * _LEVELS)


def keep_mask(shape: Sequence[int] | torch.Size, prob: float, device: torch.device) -> Tensor:
    """uint8 mask of `shape`: 0 where an element is dropped, with probability `prob`, else 1.

    Draws from the default generator of `device`, so the RNG tracker's forks and checkpointed states apply.
    """
    drop = dropped_levels(prob)
    count = torch.Size(shape).numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=device).random_(-(1 << 63), None)
    if drop == _LEVELS:
        return torch.zeros(shape, dtype=torch.uint8, device=device)
    bits = words.view(torch.int16)[:count].view(shape)
    return (bits >= drop - _LEVELS // 2).view(torch.uint8)
