"""Every torch implementation that can run on this machine's CPU, against float64 references."""

from __future__ import annotations

import pytest
import torch

from megatron.core.kernels import capability, registry
from megatron.core.kernels.registry import Entry, Spec
from tests.kernels.fused_training import assert_equal_training
from tests.kernels.suites import ATTENTION_CASES, SUITES, attention_case, attention_dropout

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def runnable(op: str) -> list[Entry]:
    found = capability.probe()
    return [e for e in registry.entries(op) if not e.needs.cuda and e.refusal(None, found) is None]


def cases() -> list[tuple[Entry, str, registry.Loader]]:
    return [
        (e, name, check)
        for op in registry.PROVIDERS
        for e in runnable(op)
        for name, check in SUITES.get(op, [])
    ]


def test_every_operation_has_a_suite_and_a_reference() -> None:
    for op in registry.PROVIDERS:
        assert op in SUITES or op in ("core_attention", "gpt_layer")
        assert runnable(op), f"{op} has no implementation without a GPU"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("entry", "name", "check"), cases(), ids=lambda v: getattr(v, "name", v if isinstance(v, str) else "")
)
def test_operation(entry: Entry, name: str, check: registry.Loader, dtype: torch.dtype) -> None:
    check(entry.load(), dtype, "cpu")


PROVIDERS = ("matmul_softmax", "sdpa", "blocked")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_attention(provider: str, case: registry.Spec, dtype: torch.dtype) -> None:
    run = {e.name: e for e in registry.entries("core_attention")}[provider].load()
    attention_case(run, case, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_attention_dropout(provider: str, dtype: torch.dtype) -> None:
    run = {e.name: e for e in registry.entries("core_attention")}[provider].load()
    attention_dropout(run, dtype, "cpu")


def test_the_cpu_prefers_blocked_attention() -> None:
    from megatron.core.fusions.core_attention import AttentionSpec

    registry.select("core_attention", AttentionSpec())
    assert registry.report()[-1].chosen == "blocked"
    assert isinstance(Spec(), Spec)


def test_two_hundred_fused_steps_equal_eager_ones() -> None:
    assert_equal_training("torch", "cpu", steps=200, exact_steps=8)
