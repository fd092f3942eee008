"""One prompt on its way through an engine."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from megatron.core.inference.common_inference_params import CommonInferenceParams


class Status(Enum):
    """Where a request is."""

    WAITING_IN_QUEUE = 1
    ACTIVE_AND_GENERATING_TOKENS = 2
    ACTIVE_BUT_NOT_GENERATING_TOKENS = 3
    COMPLETED = 4


@dataclass
class InferenceRequest:
    """A prompt, what was asked, and in the end what came of it.

    `generated_tokens` int64 [n] follow the prompt; `generated_length` n does not count the end-of-document token that
    stopped them. `generated_log_probs` has one entry per generated token, `prompt_log_probs` one per token of the prompt
    after its first. `segments` are prompt and answer token by token. `generated_top_n_logprobs` holds for each generated
    token the texts of the tokens that were most probable, and their log-probabilities. What was not asked for is None.
    """

    request_id: str
    prompt: str
    inference_parameters: CommonInferenceParams
    prompt_tokens: list[int]
    arrival_time: float
    status: Status
    generated_text: str | None = None
    generated_tokens: Tensor | None = None
    generated_log_probs: list[float] | None = None
    generated_length: int = 0
    prompt_log_probs: list[float] | None = None
    segments: list[str] | None = None
    generated_top_n_logprobs: list[dict[str, float]] | None = None
