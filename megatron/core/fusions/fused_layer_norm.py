"""Layer norm with an optional zero-centred weight, and the module that models use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from megatron.core import device
from megatron.core.errors import InvariantError
from megatron.core.kernels.registry import Spec, register, select

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


def layer_norm_eager(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool = False
) -> Tensor:
    """Eager reference. x [..., h], weight and bias [h] -> [..., h] in the weight's dtype; statistics in
    fp32.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    x32 = x.to(wide)
    centred = x32 - x32.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = y * (weight.to(wide) + 1 if zero_centered else weight.to(wide))
    return (y if bias is None else y + bias.to(wide)).to(weight.dtype)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool = False
) -> Tensor:
    """x [..., h], weight and bias [h] -> [..., h] in the weight's dtype."""
    gamma = weight + 1 if zero_centered else weight
    if x.dtype == weight.dtype:
        return F.layer_norm(x, (x.shape[-1],), gamma, bias, eps)
    # torch wants one dtype: a wider residual stream is normalised wide and narrowed once
    wide_bias = None if bias is None else bias.to(x.dtype)
    return F.layer_norm(x, (x.shape[-1],), gamma.to(x.dtype), wide_bias, eps).to(weight.dtype)


def residual_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    zero_centered: bool = False,
) -> tuple[Tensor, Tensor]:
    """x, residual [..., h] -> (layer_norm(x + residual), x + residual), each [..., h]."""
    total = x + residual
    return layer_norm(total, weight, bias, eps, zero_centered), total


@register("layer_norm", "torch", rank=0)
def _load() -> Any:
    return layer_norm


@register("residual_layer_norm", "torch", rank=0)
def _load_residual() -> Any:
    return residual_layer_norm


class FusedLayerNorm(torch.nn.Module):
    """LayerNorm or RMSNorm over the last dimension, under the constructor of v0.9.

    `weight` [h] (and `bias` [h] for LayerNorm) carry the attribute `sequence_parallel`: their gradients
    then are partial sums over the tensor-parallel group. `persist_layer_norm` is kept for scripts; the
    registry picks the kernel.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int | Sequence[int],
        eps: float = 1e-5,
        persist_layer_norm: bool = True,
        zero_centered_gamma: bool = False,
        normalization: str = "LayerNorm",
    ) -> None:
        # Alone: a subclass that is one of torch's norms as well makes no second weight.
        torch.nn.Module.__init__(self)
        if normalization not in ("LayerNorm", "RMSNorm"):
            raise InvariantError("normalization", f"must be LayerNorm or RMSNorm, not {normalization!r}")
        shape = (hidden_size,) if isinstance(hidden_size, int) else tuple(hidden_size)
        if len(shape) != 1:
            raise ValueError(f"the norm works on the last dimension alone, hidden_size was {tuple(shape)}")
        self.config = config
        self.hidden_size = torch.Size(shape)
        self.eps = eps
        self.zero_centered_gamma = zero_centered_gamma or config.layernorm_zero_centered_gamma
        self.normalization = normalization
        self.persist_layer_norm = persist_layer_norm
        self.sequence_parallel = config.sequence_parallel
        self.weight = Parameter(torch.empty(self.hidden_size))
        self.weight.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        self.bias: Parameter | None = None
        if normalization == "LayerNorm":
            self.bias = Parameter(torch.empty(self.hidden_size))
            self.bias.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        self.reset_parameters()
        op = "layer_norm" if normalization == "LayerNorm" else "rms_norm"
        self._norm = select(op, Spec(device=device.kind(), dtype=config.params_dtype))

    def reset_parameters(self) -> None:
        """Start as the identity scale: weight 1 (0 when zero-centred), bias 0."""
        torch.nn.init.constant_(self.weight, 0.0 if self.zero_centered_gamma else 1.0)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """input [s, b, h] -> [s, b, h] in the weight's dtype."""
        if self.normalization == "RMSNorm":
            return self._norm(input, self.weight, self.eps, self.zero_centered_gamma)
        return self._norm(input, self.weight, self.bias, self.eps, self.zero_centered_gamma)
