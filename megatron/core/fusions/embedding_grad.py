"""Gradient of an embedding table: rows of the output gradient summed per token id."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.core.kernels.registry import register


def embedding_grad(ids: Tensor, grad_output: Tensor, table_grad: Tensor) -> None:
    """Eager reference. ids [t] int64 (outside 0..v-1: skipped), grad_output [t, h]; table_grad [v, h] +=
    rows, in place.

    The sum runs in the dtype of `table_grad`; deterministic where torch's `index_add_` is (CPU, or
    deterministic mode).
    """
    mine = (ids >= 0) & (ids < table_grad.shape[0])
    rows = torch.where(mine.unsqueeze(-1), grad_output, 0).to(table_grad.dtype)
    table_grad.index_add_(0, torch.where(mine, ids, 0), rows)


@register("embedding_grad", "torch", rank=0)
def _load() -> Any:
    return embedding_grad
