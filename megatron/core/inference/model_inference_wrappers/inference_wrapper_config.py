"""What the forward pass of generation must know of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class InferenceWrapperConfig:
    """Sizes and types of activations and logits.

    inference_batch_times_seqlen_threshold: on a pipeline, rows x positions beyond which a pass is cut into micro-batches.
    padded_vocab_size: width of the logits. fp32_residual_connection: stages exchange fp32, whatever `params_dtype`.
    """

    hidden_size: int
    params_dtype: torch.dtype
    inference_batch_times_seqlen_threshold: int
    padded_vocab_size: int
    fp32_residual_connection: bool = False

    def add_attributes(self, attribute_value_pair: dict[str, Any]) -> None:
        """Set further attributes, for wrappers of one's own."""
        for name, value in attribute_value_pair.items():
            setattr(self, name, value)
