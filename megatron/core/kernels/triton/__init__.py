"""Triton kernels, one family of operations per file; this file enters them in the registry without
importing Triton.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from megatron.core.kernels.registry import HALF, Accepts, Needs, register

TRITON = Needs(cuda=True, capability=(8, 0), packages={"triton": "3.0"})
FP8 = Needs(cuda=True, capability=(8, 9), packages={"triton": "3.0"})
FLOATS = (torch.float16, torch.bfloat16, torch.float32)

# op -> (file, function, rank): a rank below 0 loses to the torch implementation until measured to win
KERNELS: dict[str, tuple[str, str, int]] = {
    "layer_norm": ("norm", "layer_norm", 10),
    "residual_layer_norm": ("norm", "residual_layer_norm", 10),
    "rms_norm": ("norm", "rms_norm", 10),
    "residual_rms_norm": ("norm", "residual_rms_norm", 10),
    "bias_gelu": ("bias_activation", "bias_gelu", 10),
    "bias_swiglu": ("bias_activation", "bias_swiglu", 10),
    "bias_geglu": ("bias_activation", "bias_geglu", 10),
    "bias_dropout_add": ("bias_dropout_add", "bias_dropout_add", 10),
    "masked_softmax": ("masked_softmax", "masked_softmax", 10),
    "rope": ("rope", "rope", 10),
    "vocab_cross_entropy": ("cross_entropy", "vocab_cross_entropy", 10),
    "linear_cross_entropy": ("cross_entropy", "linear_cross_entropy", 10),
    "embedding_grad": ("embedding_grad", "embedding_grad", 10),
    "l2_norm": ("multi_tensor", "l2_norm", -10),
    "scale": ("multi_tensor", "scale", -10),
    "adam": ("multi_tensor", "adam", -10),
    "sgd": ("multi_tensor", "sgd", -10),
}


def _floats_only(spec: Any) -> str | None:
    return None if spec.dtype in FLOATS else f"takes fp16, bf16 or fp32, not {spec.dtype}"


def _accepts_attention(spec: Any) -> str | None:
    if spec.context_parallel > 1:
        return "sees one context-parallel shard only"
    if spec.masked:
        return "takes no mask tensor"
    if spec.head_dim > 256:
        return f"takes head sizes up to 256, not {spec.head_dim}"
    if spec.layer_scaling and spec.dtype == torch.float16:
        return "does not divide fp16 scores before they overflow (query-key layer scaling)"
    # exact fp32 products run outside the matrix units and spill registers
    return None if spec.dtype in HALF else "takes fp16 or bf16 (add --bf16)"


def _accepts_scan(spec: Any) -> str | None:
    # a use that does not tell its sizes has the usual ones
    widest = max(getattr(spec, "width", 0), getattr(spec, "state", 0))
    if widest > 128:
        return f"takes heads and states of up to 128 numbers, not {widest}"
    # as for attention: exact fp32 products spill registers
    return None if spec.dtype in HALF else "takes fp16 or bf16 (add --bf16)"


def _enter(op: str, file: str, function: str, rank: int, accepts: Accepts, needs: Needs = TRITON) -> None:
    def load() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"{__name__}.{file}"), function)

    register(op, "triton", rank=rank, needs=needs, accepts=accepts)(load)


for _op, (_file, _function, _rank) in KERNELS.items():
    _enter(_op, _file, _function, _rank, _floats_only)
# below sdpa, which needs a dense mask for packed documents and windows and then declines
_enter("core_attention", "attention", "attention", 9, _accepts_attention)
_enter("state_space_scan", "state_space", "state_space_scan", 10, _accepts_scan)
_enter("fp8_quantize", "fp8_quantize", "quantize", 10, _floats_only, FP8)
