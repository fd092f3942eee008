"""The same suites natively on a GPU: Triton kernels, and every other implementation that can run there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.core.kernels import capability, registry
from tests.kernels import triton_suite
from tests.kernels.references import AttentionCase
from tests.kernels.suites import ATTENTION_CASES, SUITES, attention_case

pytestmark = pytest.mark.gpu

OPERATIONS = [(op, name, check) for op in registry.PROVIDERS for name, check in SUITES.get(op, [])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("op", "name", "check"), OPERATIONS, ids=lambda v: v if isinstance(v, str) else "")
def test_every_ready_implementation(op: str, name: str, check: Any, dtype: torch.dtype) -> None:
    for entry in registry.entries(op):
        if entry.refusal(registry.Spec("cuda", dtype), capability.probe()) is None:
            check(entry.load(), dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda c: c.name)
def test_every_ready_attention(case: AttentionCase, dtype: torch.dtype) -> None:
    from megatron.core.fusions.core_attention import AttentionSpec

    spec = AttentionSpec(
        "cuda", dtype, head_dim=case.width, heads=case.heads, groups=case.groups, causal=case.causal,
        masked=case.padding, packed=bool(case.documents), window=case.window is not None,
    )  # fmt: skip
    for entry in registry.entries("core_attention"):
        if entry.refusal(spec, capability.probe()) is None:
            blind = "mean" if entry.name in ("matmul_softmax", "sdpa") else "zero"
            attention_case(entry.load(), case, dtype, "cuda", blind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("op", "name", "check"), triton_suite.OPERATIONS, ids=lambda v: v if isinstance(v, str) else ""
)
def test_triton_operation(op: str, name: str, check: Any, dtype: torch.dtype) -> None:
    triton_suite.test_operation(op, name, check, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [c for c in ATTENTION_CASES if not c.padding], ids=lambda c: c.name)
def test_triton_attention(case: AttentionCase, dtype: torch.dtype) -> None:
    triton_suite.test_attention(case, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_triton_attention_dropout(dtype: torch.dtype) -> None:
    triton_suite.test_attention_dropout(dtype)


def test_rope_in_place() -> None:
    triton_suite.test_rope_in_place()


def test_training_with_every_kernel_equals_eager_training() -> None:
    triton_suite.test_training_with_every_kernel_equals_eager_training()
