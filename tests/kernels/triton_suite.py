"""All suites on the Triton kernels; collected by `test_triton_interpreter` (in a process of its own) and by
`test_gpu`.

The interpreter computes with numpy, which has no bfloat16: matrix products of attention are checked in fp16
there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.core.kernels import registry
from tests.kernels.fused_training import assert_equal_training
from tests.kernels.references import AttentionCase
from tests.kernels.suites import ATTENTION_CASES, SUITES, attention_case, attention_dropout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = (torch.bfloat16, torch.float16) if DEVICE == "cuda" else (torch.float16,)


def kernel(op: str) -> Any:
    """The loaded Triton implementation of `op`."""
    return next(e for e in registry.entries(op) if e.name == "triton").load()


OPERATIONS = [
    (op, name, check)
    for op in registry.PROVIDERS
    if any(e.name == "triton" for e in registry.entries(op))
    for name, check in SUITES.get(op, [])
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("op", "name", "check"), OPERATIONS, ids=lambda v: v if isinstance(v, str) else "")
def test_operation(op: str, name: str, check: Any, dtype: torch.dtype) -> None:
    check(kernel(op), dtype, DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("case", [c for c in ATTENTION_CASES if not c.padding], ids=lambda c: c.name)
def test_attention(case: AttentionCase, dtype: torch.dtype) -> None:
    attention_case(kernel("core_attention"), case, dtype, DEVICE, blind="zero")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_attention_dropout(dtype: torch.dtype) -> None:
    attention_dropout(kernel("core_attention"), dtype, DEVICE)


def test_rope_in_place() -> None:
    from megatron.core.fusions.fused_rope import fused_rope
    from megatron.core.kernels.triton.rope import rope_

    t = torch.randn(6, 2, 3, 20, device=DEVICE)
    freqs = torch.randn(6, 1, 1, 12, device=DEVICE)
    freqs[..., 6:] = freqs[..., :6]
    want = fused_rope(t, freqs)
    assert rope_(t, freqs).data_ptr() == t.data_ptr()
    assert torch.allclose(t, want, atol=1e-6)


def test_training_with_every_kernel_equals_eager_training() -> None:
    # the interpreter takes seconds for a step
    assert_equal_training("triton", DEVICE, steps=200 if DEVICE == "cuda" else 3, exact_steps=3)
