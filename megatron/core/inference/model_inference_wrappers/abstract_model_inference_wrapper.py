"""A model that is fed window after window of tokens and remembers keys and values of those before."""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor

from megatron.core import device, parallel_state, tensor_parallel
from megatron.core.errors import InvariantError
from megatron.core.inference.communication_utils import (
    recv_from_prev_pipeline_rank_,
    send_to_next_pipeline_rank,
)
from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
from megatron.core.inference_params import InferenceParams


class AbstractModelInferenceWrapper(abc.ABC):
    """Runs `model`, one chunk of a (pipelined) language model, for generation.

    `inference_wrapper_config` may be any object with the fields of InferenceWrapperConfig, such as parsed arguments.
    All ranks of the model call in step.
    """

    def __init__(self, model: torch.nn.Module, inference_wrapper_config: InferenceWrapperConfig) -> None:
        if isinstance(model, (list, tuple, torch.nn.ModuleList)):
            raise InvariantError(
                "model", "interleaved chunks cannot generate", "pass the only chunk of this stage"
            )
        self.model: Any = model
        self.inference_wrapper_config = inference_wrapper_config

    @property
    def pipeline_communication_dtype(self) -> torch.dtype:
        """What stages exchange."""
        config = self.inference_wrapper_config
        return torch.float32 if config.fp32_residual_connection else config.params_dtype

    def begin(self, max_batch_size: int, max_sequence_length: int) -> None:
        """No dropout, and an empty cache for this many sequences of this many tokens."""
        self.model.eval()
        self.inference_params = InferenceParams(max_batch_size, max_sequence_length)

    def prep_model_for_inference(self, prompts_tokens: Tensor) -> None:
        """Begin with prompts [b, s], padded to the longest sequence there will be: no dropout, and an empty cache."""
        self.begin(*prompts_tokens.shape)
        self.prompts_tokens = prompts_tokens

    @abc.abstractmethod
    def get_batch_for_context_window(
        self, context_start_position: int, context_end_position: int
    ) -> list[Tensor | None]:
        """The inputs of one step, tokens first, for positions [start, end); those before `start` are in the cache."""

    def _forward(self, inference_input: list[Tensor | None]) -> Tensor:
        tokens, position_ids, attention_mask = inference_input
        return self.model(tokens, position_ids, attention_mask, inference_params=self.inference_params)

    def forward_pass_without_pipeline_parallel(self, inference_input: list[Tensor | None]) -> Tensor:
        """Inputs of n positions -> logits [b, n, v]."""
        logits = self._forward(inference_input)
        self.inference_params.sequence_len_offset += _tokens(inference_input).size(1)
        return self._of_all_ids(logits)

    def _of_all_ids(self, logits: Tensor) -> Tensor:
        """Logits [b, n, v] from this rank's share, unless the model gathers them itself (`parallel_output=False`)."""
        shares = parallel_state.get_tensor_model_parallel_world_size()
        if shares == 1 or logits.size(-1) == self.inference_wrapper_config.padded_vocab_size:
            return logits
        return tensor_parallel.gather_from_tensor_model_parallel_region(logits)

    def _forward_in_pipeline(self, inference_input: list[Tensor | None], rows: int) -> Tensor | None:
        """The same on a pipeline, `rows` at a time; logits on the last stage, None on the others."""
        batch_size, positions = _tokens(inference_input).shape
        config, cache = self.inference_wrapper_config, self.inference_params
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        logits: list[Tensor] = []
        for start in range(0, batch_size, rows):
            part = [
                # A mask may be one for all samples.
                each if each is None or each.size(0) != batch_size else each[start : start + rows]
                for each in inference_input
            ]
            here = _tokens(part).size(0)
            if not first:
                received = torch.empty(
                    (positions, here, config.hidden_size),
                    dtype=self.pipeline_communication_dtype,
                    device=device.current(),
                )
                recv_from_prev_pipeline_rank_(received)
                self.model.set_input_tensor(received)
            cache.batch_size_offset = start
            output = self._forward(part)
            if last:
                logits.append(self._of_all_ids(output))
            else:
                send_to_next_pipeline_rank(output.to(self.pipeline_communication_dtype))
        cache.batch_size_offset = 0
        cache.sequence_len_offset += positions
        return torch.cat(logits) if last else None

    def forward_pass_with_pipeline_parallel_small_input_batch(
        self, inference_input: list[Tensor | None]
    ) -> Tensor | None:
        """The whole batch in one pass: inputs of n positions -> logits [b, n, v] on the last stage, else None."""
        return self._forward_in_pipeline(inference_input, _tokens(inference_input).size(0))

    def forward_pass_with_pipeline_parallel_large_input_batch(
        self, inference_input: list[Tensor | None]
    ) -> Tensor | None:
        """As many rows at a time as the threshold holds, so that stages work at the same time."""
        threshold = self.inference_wrapper_config.inference_batch_times_seqlen_threshold
        return self._forward_in_pipeline(
            inference_input, max(1, threshold // _tokens(inference_input).size(1))
        )

    def run_one_forward_step(self, inference_input: list[Tensor | None]) -> Tensor | None:
        """One step in the way that suits layout and size: logits [b, n, v], on a pipeline only on its last stage."""
        if parallel_state.get_pipeline_model_parallel_world_size() == 1:
            return self.forward_pass_without_pipeline_parallel(inference_input)
        threshold = self.inference_wrapper_config.inference_batch_times_seqlen_threshold
        if _tokens(inference_input).numel() > threshold:
            return self.forward_pass_with_pipeline_parallel_large_input_batch(inference_input)
        return self.forward_pass_with_pipeline_parallel_small_input_batch(inference_input)


def _tokens(inference_input: list[Tensor | None]) -> Tensor:
    tokens = inference_input[0]
    assert tokens is not None, "the first input of a step are its tokens"
    return tokens
