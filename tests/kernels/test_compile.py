"""Every kernel compiles for GPUs this machine does not have, without spilling registers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import compile_kernels

FAST = (
    "rms_norm",
    "float8_e4m3fn_quantize",
    "vocab_cross_entropy",
    "attention_64",
    "state_space_scan_64_128",
)
MATRIX_KERNELS = (
    "attention_forward", "attention_query_grad", "attention_key_grad", "chunk_states", "chunk_products", "shared_grads",
)  # fmt: skip


def assert_within_limits(launches: dict[compile_kernels.Launch, None], capability: int) -> None:
    assert launches
    for launch in launches:
        if not compile_kernels.exists_on(launch, capability):
            continue
        cost = compile_kernels.compile_for(launch, capability)
        assert cost.stack_bytes <= compile_kernels.STACK_LIMIT, (
            f"sm_{capability} {launch.label()} spills {cost.stack_bytes} bytes"
        )
        assert cost.shared_bytes <= compile_kernels.SHARED_LIMIT[capability], launch.label()
        if launch.name in MATRIX_KERNELS:
            assert cost.matrix_instructions, f"{launch.label()} does not use the matrix units"


@pytest.mark.parametrize("function", FAST)
def test_a_few_kernels_on_hopper(function: str) -> None:
    launches: dict[Any, None] = {}
    with compile_kernels.caught(launches):
        compile_kernels.training_shapes(torch.bfloat16, (64,))[function]()
    assert_within_limits(launches, 90)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_all_kernels(dtype: torch.dtype, capability: int) -> None:
    assert_within_limits(compile_kernels.all_launches(dtype), capability)
