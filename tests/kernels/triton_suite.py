"""All suites on the Triton kernels; collected by `test_triton_interpreter` (in a process of its own) and by
`test_gpu`.

The interpreter computes with numpy, which has no bfloat16: matrix products of attention are checked in fp16
there, those of the state-space scan with their operands' bits decoded.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megatron.core import device
from megatron.core.inference_params import InferenceParams
from megatron.core.kernels import capability, registry
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.kernels.fused_training import assert_equal_training
from tests.kernels.references import AttentionCase, close, noise
from tests.kernels.suites import ATTENTION_CASES, SUITES, attention_case, attention_dropout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = (torch.bfloat16, torch.float16) if DEVICE == "cuda" else (torch.float16,)


def kernel(op: str) -> Any:
    """The loaded Triton implementation of `op`."""
    return next(e for e in registry.entries(op) if e.name == "triton").load()


@pytest.fixture(autouse=True)
def _products_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter would multiply the bits of bfloat16 numbers as integers."""
    import triton.language as tl
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def decoded(t: Any) -> Any:
        if t.dtype.scalar != tl.bfloat16:
            return t
        bits = t.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, decoded(a), decoded(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


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


def mixer(kernels: str) -> MambaMixer:
    """A small mixer in fp16 whose scan is "triton" or "torch", with the weights of any other that this makes."""
    torch.manual_seed(4)
    sizes = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
    config = TransformerConfig(**sizes, params_dtype=torch.float16, use_cpu_initialization=True)
    packages = {"triton": "3.6"} if kernels == "triton" else {}
    machine = capability.Capabilities((9, 0), "this device", torch.__version__, packages)
    registry.forget_choices()
    with capability.pretend(machine), mock.patch.object(device, "kind", return_value="cuda"):
        parts = MambaMixerSubmodules(ColumnParallelLinear, RowParallelLinear)
        made = MambaMixer(config, parts, 32, d_state=12, headdim=16, ngroups=2, chunk_size=16, layer_number=1)
    assert {c.op: c.chosen for c in registry.report()}["state_space_scan"] == kernels
    return made.to(DEVICE)


def test_a_mixer_with_the_scan_equals_one_without() -> None:
    """Values and gradients through recomputation, and the states that decoding goes on from; within fp16's rounding."""
    hidden = noise(23, 2, 32, seed=1, dtype=torch.float16, device=DEVICE)
    upstream = noise(23, 2, 32, seed=2, dtype=torch.float16, device=DEVICE)
    results = []
    for made in (mixer("triton"), mixer("torch")):
        own = hidden.clone().requires_grad_()
        out, _ = made(own)
        grads = torch.autograd.grad(out, [own, *made.parameters()], upstream)
        params = InferenceParams(2, 23)
        windows = []
        with torch.no_grad():
            for window in hidden.split([9, 13, 1]):
                windows.append(made(window, inference_params=params)[0])
                params.sequence_len_offset += window.size(0)
        results.append((out, torch.cat(windows), *grads))
    for i, (ours, plain) in enumerate(zip(*results)):
        close(ours, plain, torch.float16, what=f"result {i}")
    close(results[0][1], results[0][0], torch.float16, what="windows")


def test_training_with_every_kernel_equals_eager_training() -> None:
    # the interpreter takes seconds for a step
    assert_equal_training("triton", DEVICE, steps=200 if DEVICE == "cuda" else 3, exact_steps=3)
