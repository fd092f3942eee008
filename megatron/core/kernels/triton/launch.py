"""What every kernel launch needs: shapes as rows, block sizes, program counts."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

WIDEST_ROW = 65536  # elements one program may hold at once


@functools.lru_cache(maxsize=8)
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(t: Tensor) -> int:
    """Multiprocessors of the device of `t`; a handful for CPU tensors (Triton's interpreter)."""
    return _multiprocessors(t.device.index or 0) if t.is_cuda else 3


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n` (and at least 1)."""
    return 1 << max(n - 1, 0).bit_length()


def as_rows(t: Tensor) -> Tensor:
    """[..., h] -> contiguous [rows, h]."""
    return t.reshape(-1, t.shape[-1]).contiguous()


def row_block(width: int) -> tuple[int, int]:
    """(block, warps) for a program that holds a whole row of `width` elements; ValueError where it would
    not fit.
    """
    block = power_of_two(width)
    if block > WIDEST_ROW:
        raise ValueError(
            f"rows of {width} elements are wider than a program holds ({WIDEST_ROW}); use the torch kernel"
        )
    return block, min(max(block // 512, 1), 16)


def draw_seed(like: Tensor) -> Tensor:
    """A fresh int64 [1] seed for in-kernel random numbers, drawn on the device without a host sync.

    It comes from torch's default generator of the device: RNG forks, recomputation and saved states all
    apply.
    """
    return torch.randint(0, 1 << 31, (1,), dtype=torch.int64, device=like.device)
