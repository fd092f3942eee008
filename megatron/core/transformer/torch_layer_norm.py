"""A norm in plain torch, under the constructor every norm of a layer specification has."""

from __future__ import annotations

import torch

from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.transformer.transformer_config import TransformerConfig


class WrappedTorchLayerNorm(FusedLayerNorm, torch.nn.LayerNorm):  # type: ignore[misc]
    """LayerNorm or RMSNorm [*, h] -> [*, h]; v0.9's name for the norm used when no kernel library is
    installed.

    It counts as torch's LayerNorm, by which users' code finds norms, and describes itself as such.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        persist_layer_norm: bool = False,
        zero_centered_gamma: bool = False,
        normalization: str | None = None,
    ) -> None:
        super().__init__(
            config,
            hidden_size,
            eps,
            persist_layer_norm,
            zero_centered_gamma,
            normalization or config.normalization,
        )
        self.normalized_shape, self.elementwise_affine = tuple(self.hidden_size), True
