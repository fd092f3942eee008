"""The same suites natively on a GPU: Triton kernels, and every other implementation that can run there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.core.errors import FlagError
from megatron.core.fp8.quantize import quantize
from megatron.core.kernels import capability, registry
from megatron.core.transformer.cuda_graphs import record_layers
from tests.kernels import triton_suite
from tests.kernels.references import AttentionCase
from tests.kernels.suites import ATTENTION_CASES, SUITES, attention_case
from tests.unit import test_cuda_graphs as cuda_graphs

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


def test_a_mixer_with_the_scan_equals_one_without() -> None:
    triton_suite.test_a_mixer_with_the_scan_equals_one_without()


def test_rope_in_place() -> None:
    triton_suite.test_rope_in_place()


def test_training_with_every_kernel_equals_eager_training() -> None:
    triton_suite.test_training_with_every_kernel_equals_eager_training()


@pytest.mark.parametrize("fmt", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_triton_rounds_to_fp8_as_torch_does(fmt: torch.dtype, dtype: torch.dtype) -> None:
    """Random values: Triton's interpreter does not round them, so only a GPU can tell."""
    if torch.cuda.get_device_capability() < (8, 9):
        with pytest.raises(FlagError, match=r"needs compute capability 8\.9"):
            registry.select("fp8_quantize", registry.Spec("cuda", dtype), demand="triton")
        return
    run = registry.select("fp8_quantize", registry.Spec("cuda", dtype), demand="triton")
    x = torch.randn(333, 130, device="cuda").to(dtype)
    x[5, 5] = torch.nan
    scale = torch.full((), 37.0, device="cuda")
    mine, theirs = run(x, scale, fmt, None, True), quantize(x, scale, fmt, None, True)
    for got, wanted in zip(mine, theirs):
        assert torch.equal(got.float().nan_to_num(7.0), wanted.float().nan_to_num(7.0))


@pytest.mark.parametrize("rope", [False, True])
def test_recorded_layers_train_as_eager_ones_do(rope: bool) -> None:
    fields = cuda_graphs.config(bf16=True, params_dtype=torch.bfloat16)
    plain, recorded = (cuda_graphs.gpt(fields, rope).cuda().bfloat16() for _ in range(2))
    assert record_layers([recorded], fields, cuda_graphs.S, cuda_graphs.B) == 2
    tokens = torch.randint(cuda_graphs.V, (cuda_graphs.B, cuda_graphs.S), device="cuda")
    positions = torch.arange(cuda_graphs.S, device="cuda").expand_as(tokens)
    for _ in range(3):
        for model in (plain, recorded):
            model.zero_grad()
            model(tokens, positions, None, labels=tokens).mean().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(0.1 * parameter.grad)
    for (name, mine), theirs in zip(recorded.named_parameters(), plain.parameters()):
        assert torch.allclose(mine.float(), theirs.float(), atol=2e-3), name
