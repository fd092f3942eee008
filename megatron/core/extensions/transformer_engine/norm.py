"""TransformerEngine's LayerNorm and RMSNorm, chosen by the configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import transformer_engine as te

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


class TENorm:
    """Constructs a norm: `TENorm(config, hidden_size, eps)` is an instance of TE's LayerNorm or RMSNorm."""

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5
    ) -> torch.nn.Module:
        norms = {"LayerNorm": te.pytorch.LayerNorm, "RMSNorm": te.pytorch.RMSNorm}
        if config.normalization not in norms:
            raise ValueError(f"normalization must be LayerNorm or RMSNorm, not {config.normalization!r}")
        return norms[config.normalization](
            hidden_size,
            eps=eps,
            sequence_parallel=config.sequence_parallel,
            zero_centered_gamma=config.layernorm_zero_centered_gamma,
        )
