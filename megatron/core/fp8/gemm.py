"""The operation `fp8_gemm`: a product of two fp8 matrices that share their last dimension."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.core.kernels.registry import Needs, register


def fp8_gemm_emulated(
    a: Tensor, b: Tensor, inverse_a: Tensor, inverse_b: Tensor, out_dtype: torch.dtype, fast: bool = True
) -> Tensor:
    """Reference: a [m, k] b [n, k]^T, each times its inverse scale, multiplied and summed in fp32 -> [m, n].

    fp8 values and their products are exact in fp32, so this differs from the hardware only in the order and width of
    sums. `fast` allows narrower sums and changes nothing here.
    """
    product = a.float() @ b.float().t()
    return product.mul_(inverse_a * inverse_b).to(out_dtype)


def fp8_gemm(
    a: Tensor, b: Tensor, inverse_a: Tensor, inverse_b: Tensor, out_dtype: torch.dtype, fast: bool = True
) -> Tensor:
    """The same on the matrix units; m, n and k are multiples of 16."""
    return torch._scaled_mm(
        a, b.t(), scale_a=inverse_a, scale_b=inverse_b, out_dtype=out_dtype, use_fast_accum=fast
    )


@register("fp8_gemm", "emulated", rank=0)
def _load_emulated() -> Any:
    return fp8_gemm_emulated


@register("fp8_gemm", "scaled_mm", rank=10, needs=Needs(cuda=True, capability=(8, 9)))
def _load() -> Any:
    return fp8_gemm
