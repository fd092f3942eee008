"""y = x W^T + b by the fastest GEMM of the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: torch's fp32 GEMM on x86 is MKL's. With AVX-512 oneDNN's takes 10 % less time on AMD processors, if it has enough to do.
_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and torch.backends.cpu.get_cpu_capability() == "AVX512"
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
#: Multiplications from which on it is the faster of the two.
_ONEDNN_PAYS_FROM = 1 << 24


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` of these is another GEMM than torch's, which autograd does not know."""
    if not _ONEDNN or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return x.numel() * weight.shape[0] >= _ONEDNN_PAYS_FROM


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [.., i], weight [o, i] (of any strides), bias [o] -> [.., o]. To be called by autograd functions."""
    if uses_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
