"""One step of a generating model: the forward pass of megatron.core.inference under v0.9's name for it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.training import get_args


class ForwardStep:
    """Runs windows of tokens through `model`, one chunk of a (pipelined) GPT; `inference_params` keeps keys and values.

    Other classes may take its place if they are made and called like this one.
    """

    def __init__(self, model: Any, max_batch_size: int, max_sequence_length: int) -> None:
        """For batches of at most this many sequences of at most this many tokens. InvariantError for several chunks."""
        self.model = model
        args: Any = get_args()
        self._wrapped = GPTInferenceWrapper(model, args)
        self._wrapped.begin(max_batch_size, max_sequence_length)
        self.inference_params = self._wrapped.inference_params

    def __call__(
        self, tokens: Tensor, position_ids: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor | None:
        """Tokens and positions [b, n] that follow those of the calls before -> fp32 logits [b, n, v] on the last stage.

        `attention_mask` bool [b or 1, 1, n, seen so far + n], or None: the model is causal by itself. On a pipeline batches
        beyond `--inference-batch-times-seqlen-threshold` pass in parts. All ranks of the model must call.
        """
        logits = self._wrapped.run_one_forward_step([tokens, position_ids, attention_mask])
        return None if logits is None else logits.float()
