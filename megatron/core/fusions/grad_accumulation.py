"""Weight gradients added straight into the fp32 `main_grad` buffer: one GEMM instead of a GEMM and an
addition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron.core.kernels.registry import HALF, Needs, Spec, register, select


def linear_wgrad_accumulate_eager(input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """Eager reference. input [t, i], grad_output [t, o]; main_grad [o, i] += grad_output^T input, in place."""
    main_grad.add_(grad_output.t().matmul(input))


def linear_wgrad_accumulate(input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """input [t, i], grad_output [t, o]; main_grad [o, i] += grad_output^T input, accumulated inside the
    GEMM where dtypes agree.
    """
    if main_grad.dtype == input.dtype == grad_output.dtype:
        main_grad.addmm_(grad_output.t(), input)
    else:
        linear_wgrad_accumulate_eager(input, grad_output, main_grad)


def linear_wgrad_accumulate_wide(input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """As `linear_wgrad_accumulate`, half operands accumulated and added in fp32 by cuBLAS without a
    half-precision result.
    """
    if main_grad.dtype == input.dtype:
        main_grad.addmm_(grad_output.t(), input)
    else:
        torch.addmm(main_grad, grad_output.t(), input, out_dtype=main_grad.dtype, out=main_grad)


@register("linear_wgrad_accumulate", "torch", rank=0)
def _load() -> Any:
    return linear_wgrad_accumulate


@register(
    "linear_wgrad_accumulate",
    "cublas_fp32",
    rank=10,
    needs=Needs(cuda=True, capability=(8, 0), packages={}),
    accepts=lambda spec: None if spec.dtype in HALF else "only half-precision operands need it",
)
def _load_wide() -> Any:
    return linear_wgrad_accumulate_wide


@register(
    "linear_wgrad_accumulate",
    "apex",
    rank=5,
    needs=Needs(cuda=True, packages={"apex": "0"}),
    accepts=lambda spec: None if spec.dtype in HALF else "only half-precision operands need it",
)
def _load_apex() -> Any:
    import fused_weight_gradient_mlp_cuda

    def accumulate(input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        if main_grad.dtype == torch.float32:
            fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(input, grad_output, main_grad)
        else:
            fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp16(input, grad_output, main_grad)

    return accumulate


def choose(device: str, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor], None]:
    """The accumulation function for operands of `dtype` on `device`."""
    return select("linear_wgrad_accumulate", Spec(device, dtype))
