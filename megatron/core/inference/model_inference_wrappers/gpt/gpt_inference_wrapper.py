"""GPT, fed window after window."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.core.inference.model_inference_wrappers.abstract_model_inference_wrapper import (
    AbstractModelInferenceWrapper,
)
from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
from megatron.core.models.gpt.gpt_model import GPTModel


class GPTInferenceWrapper(AbstractModelInferenceWrapper):
    """Prompts in, logits out. The model is causal by itself: no [s, s] mask is built."""

    def __init__(self, model: GPTModel, args: InferenceWrapperConfig) -> None:
        super().__init__(model, args)

    def prep_model_for_inference(self, prompts_tokens: Tensor) -> None:
        """Begin with prompts [b, s]; see the base class."""
        super().prep_model_for_inference(prompts_tokens)
        positions = torch.arange(prompts_tokens.size(1), device=prompts_tokens.device)
        self.position_ids = positions.expand_as(prompts_tokens)

    def get_batch_for_context_window(
        self, context_start_position: int, context_end_position: int
    ) -> list[Tensor | None]:
        """Tokens and positions [b, n] of the window, and None for the mask."""
        window = slice(context_start_position, context_end_position)
        return [self.prompts_tokens[:, window], self.position_ids[:, window], None]
