"""BERT's masked-word head up to the output layer: dense, GELU, norm."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.torch_layer_norm import WrappedTorchLayerNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import get_linear_layer


class BertLMHead(MegatronModule):
    """h -> h, whole on every tensor parallel rank; under sequence parallelism each rank sees its part of
    the sequence.
    """

    def __init__(self, hidden_size: int, config: TransformerConfig) -> None:
        super().__init__(config)
        self.dense = get_linear_layer(
            hidden_size, hidden_size, config.init_method, config.perform_initialization
        )
        for parameter in self.dense.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.layer_norm = WrappedTorchLayerNorm(
            config, hidden_size, config.layernorm_epsilon, normalization="LayerNorm"
        )
        self.gelu = F.gelu

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [s/sp, b, h] -> [s/sp, b, h]."""
        return self.layer_norm(self.gelu(self.dense(hidden_states)))
