"""The gradient norm against exact sums, wherever tensors end and however they lie in memory."""

from __future__ import annotations

import math

import pytest
import torch

from megatron.core.optimizer import clip_grads
from megatron.core.optimizer.clip_grads import get_grad_norm_fp32

PIECE = clip_grads._IN_CACHE
#: A rounding of the result: measured 3.2e-16 at most.
EXACT = 4.5e-16


def exact_norm(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(math.fsum(x * x for tensor in tensors for x in tensor.double().flatten().tolist()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "sizes", [(1,), (3, 0, 5), (PIECE - 1, 2), (PIECE, 1), (PIECE + 1,), (2 * PIECE + 7, 4)]
)
def test_it_is_that_of_all_elements(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(sum(sizes))
    grads = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    assert get_grad_norm_fp32(grads) == pytest.approx(exact_norm(grads), rel=EXACT, abs=0)


def test_tensors_may_lie_in_memory_in_any_order() -> None:
    grad = torch.randn(600, 500, generator=torch.Generator().manual_seed(5)).t()
    assert get_grad_norm_fp32(grad) == pytest.approx(exact_norm([grad]), rel=EXACT, abs=0)


def test_tensors_of_different_dtypes_count_together() -> None:
    grads = [torch.full((4,), 3.0, dtype=torch.bfloat16), torch.full((4,), 4.0, dtype=torch.float64)]
    assert get_grad_norm_fp32(grads) == 10.0


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_one_element_spoils_it(value: float) -> None:
    grad = torch.ones(PIECE + 10)
    grad[PIECE + 3] = value
    norm = get_grad_norm_fp32([torch.ones(3), grad])
    assert math.isnan(norm) if math.isnan(value) else norm == math.inf
