"""The product with a weight, whichever GEMM computes it, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron.core.fusions import linear as fusion
from megatron.core.fusions.linear import linear
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float64: 1e-14}


@pytest.fixture(params=[0, fusion._ONEDNN_PAYS_FROM], ids=["large", "small"], autouse=True)
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices, multiplied as large and as small ones are."""
    monkeypatch.setattr(fusion, "_ONEDNN_PAYS_FROM", request.param)


def inputs(shape: str, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(3)
    return {
        "vector": lambda: torch.randn(20, dtype=dtype),
        "rows": lambda: torch.randn(7, 3, 20, dtype=dtype),
        "transposed": lambda: torch.randn(3, 7, 20, dtype=dtype).transpose(0, 1),
        "columns": lambda: torch.randn(20, 5, dtype=dtype).t(),
        "expanded": lambda: torch.randn(7, 1, 20, dtype=dtype).expand(7, 3, 20),
        "one number": lambda: torch.ones((), dtype=dtype).expand(4, 20),
        "nothing": lambda: torch.randn(0, 20, dtype=dtype),
    }[shape]()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "shape", ["vector", "rows", "transposed", "columns", "expanded", "one number", "nothing"]
)
def test_linear_equals_float64(shape: str, turned: bool, dtype: torch.dtype) -> None:
    x = inputs(shape, dtype)
    weight = torch.randn(20, 11, dtype=dtype).t() if turned else torch.randn(11, 20, dtype=dtype)
    for bias in (None, torch.randn(11, dtype=dtype)):
        got = linear(x, weight, bias)
        expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
        assert got.shape == expected.shape
        assert got.dtype == dtype
        if got.numel():
            error = (got.double() - expected).abs().max() / expected.abs().max()
            assert error <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gradients_of_an_undivided_layer_equal_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    x, weight, bias = torch.randn(7, 3, 20), torch.randn(11, 20), torch.randn(11)
    upstream = torch.randn(7, 3, 11)

    def gradients(dtype: torch.dtype, own: bool) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
        if own:
            out = linear_with_grad_accumulation_and_async_allreduce(*leaves, False, False, False)
        else:
            out = leaves[0] @ leaves[1].t() + leaves[2]
        return list(torch.autograd.grad(out, leaves, upstream.to(dtype)))

    for got, expected in zip(gradients(dtype, own=True), gradients(torch.float64, own=False)):
        error = (got.double() - expected).abs().max() / expected.abs().max()
        assert error <= TOLERANCE[dtype]
