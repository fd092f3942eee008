"""One vector per sample from one position of the sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron.core import tensor_parallel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import get_linear_layer


class Pooler(MegatronModule):
    """tanh(dense(hidden state of one position))."""

    def __init__(
        self,
        hidden_size: int,
        init_method: Callable[[Tensor], Any],
        config: TransformerConfig,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__(config)
        self.dense = get_linear_layer(hidden_size, hidden_size, init_method, config.perform_initialization)
        self.sequence_parallel = sequence_parallel

    def forward(self, hidden_states: Tensor, sequence_index: int = 0) -> Tensor:
        """hidden_states [s/sp, b, h] -> [b, h] of position `sequence_index`, on every tensor parallel rank."""
        if self.sequence_parallel:
            # Every rank then computes the same, so the gradients of the ranks must not be summed.
            hidden_states = tensor_parallel.gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False
            )
        return torch.tanh(self.dense(hidden_states[sequence_index]))
