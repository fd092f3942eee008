"""Gradient of an embedding table without atomics: ids are sorted, one program sums the rows of one id;
deterministic.
"""

# mypy: allow-untyped-defs
# (arguments of kernels are pointers and numbers of Triton's own language)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def sum_runs(ids, order, grad, table, tokens, vocab, width, BLOCK: tl.constexpr):
    at = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    mine = tl.load(ids + at)
    before = tl.load(ids + at - 1, mask=at > 0, other=-1)
    if (mine != before) & (mine >= 0) & (mine < vocab):
        total = tl.zeros([BLOCK], dtype=tl.float32)
        current = mine
        while current == mine:
            row = tl.load(order + at).to(tl.int64)
            total += tl.load(grad + row * width + cols, mask=inside, other=0.0).to(tl.float32)
            at += 1
            current = tl.load(ids + at, mask=at < tokens, other=-1)
        place = table + mine.to(tl.int64) * width + cols
        old = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        tl.store(place, (old + total).to(table.dtype.element_ty), mask=inside)


def embedding_grad(ids: Tensor, grad_output: Tensor, table_grad: Tensor) -> None:
    """ids [t] int64 (outside 0..v-1: skipped), grad_output [t, h]; contiguous table_grad [v, h] += rows, in
    place.
    """
    tokens = ids.numel()
    if not tokens or not table_grad.numel():
        return
    ordered, order = torch.sort(ids.reshape(-1), stable=True)
    width = table_grad.shape[1]
    grad = grad_output.reshape(-1, width).contiguous()
    block = min(triton.next_power_of_2(width), 256)
    sum_runs[(tokens, triton.cdiv(width, block))](
        ordered, order, grad, table_grad, tokens, table_grad.shape[0], width, BLOCK=block, num_warps=2
    )
