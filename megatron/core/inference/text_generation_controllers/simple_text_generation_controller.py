"""The decoding loop over a batch of requests (spec: inference, section 16)."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron.core import device, parallel_state
from megatron.core.errors import ConfigError
from megatron.core.inference.common_inference_params import CommonInferenceParams
from megatron.core.inference.communication_utils import broadcast_from_last_pipeline_stage
from megatron.core.inference.inference_request import InferenceRequest, Status
from megatron.core.inference.model_inference_wrappers.abstract_model_inference_wrapper import (
    AbstractModelInferenceWrapper,
)
from megatron.core.inference.sampling import log_probs_of, sample, top_log_probs

Requests = OrderedDict[Any, InferenceRequest]


@dataclass
class _Decoded:
    """What a batch came to beside its tokens [b, s]: how many are new [b], and what was asked for besides.

    fp32 log-probabilities [b, s - 1] of all tokens after the first; log-probabilities and ids [b, s, n] of the tokens that
    were most probable in each column.
    """

    generated: Tensor
    log_probs: Tensor | None
    top: tuple[Tensor, Tensor] | None


class SimpleTextGenerationController:
    """Tokenizes, decodes and detokenizes. All ranks of the model call in step, with equal random states."""

    def __init__(self, inference_wrapped_model: AbstractModelInferenceWrapper, tokenizer: Any) -> None:
        self.inference_wrapped_model = inference_wrapped_model
        self.tokenizer = tokenizer

    def tokenize_prompt(self, prompt: str) -> list[int]:
        """The prompt's token ids; an empty prompt is the end of a document, after which another begins."""
        return self.tokenizer.tokenize(prompt) or [self.tokenizer.eod]

    def detokenize_generations(self, prompt_tokens_with_generated_tokens: Tensor) -> str:
        """The text of token ids [n]."""
        return self.tokenizer.detokenize(prompt_tokens_with_generated_tokens.tolist())

    def sample_from_logits(
        self,
        last_token_logits: Tensor,
        common_inference_params: CommonInferenceParams,
        vocab_size: int | None = None,
    ) -> Tensor:
        """fp32 logits [b, v] -> ids int64 [b]; `vocab_size` bounds them. InvariantError for contradictory parameters."""
        wanted = common_inference_params
        return sample(last_token_logits, wanted.top_k, wanted.top_p, wanted.temperature, vocab_size)

    def update_generation_status(
        self,
        updated_prompts_tokens: Tensor,
        generation_started: Tensor,
        current_context_end_position: int,
        is_generation_done_tensor: Tensor,
        generated_sequence_lengths: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Look at the column of tokens [b, s] that was just filled -> (done bool [b], tokens generated so far int64 [b]).

        A row whose generation has started is done at its first end-of-document token, which does not count.
        """
        started = generation_started.bool()
        ends = updated_prompts_tokens[:, current_context_end_position] == self.tokenizer.eod
        done = is_generation_done_tensor.bool() | (ends & started)
        return done, generated_sequence_lengths + (started & ~done)

    def pad_input_prompt_tokens(
        self,
        batch_prompt_tokens_list: list[list[int]],
        max_prompt_length_in_batch: int,
        num_tokens_to_generate: int,
    ) -> Tensor:
        """Prompts as int64 [b, longest + new], filled up with the end-of-document token."""
        length = max_prompt_length_in_batch + num_tokens_to_generate
        rows = [list(row) + [self.tokenizer.eod] * (length - len(row)) for row in batch_prompt_tokens_list]
        return torch.tensor(rows, dtype=torch.long, device=device.current())

    def generate_output_tokens_dynamic_batch(self, active_requests: Requests) -> Requests:
        """Refused: requests join and leave between batches only."""
        raise ConfigError(
            "generate_output_tokens_dynamic_batch",
            "a batch is decoded to its end before the next begins",
            "call generate_all_output_tokens_static_batch",
        )

    def generate_all_output_tokens_static_batch(self, active_requests: Requests) -> Requests:
        """Decode all requests to their end, with the parameters of the first, and return them, filled in.

        A row may generate `num_tokens_to_generate` tokens; it stops before that at an end-of-document token.
        """
        requests = list(active_requests.values())
        wanted = requests[0].inference_parameters
        prompts = [request.prompt_tokens for request in requests]
        tokens = self.pad_input_prompt_tokens(prompts, max(map(len, prompts)), wanted.num_tokens_to_generate)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=tokens.device)
        decoded = self._decode(tokens, lengths, wanted)
        for row, request in enumerate(requests):
            begin, count = len(request.prompt_tokens), int(decoded.generated[row])
            request.generated_length = count
            request.generated_tokens = tokens[row, begin : begin + count]
            request.generated_text = self.detokenize_generations(request.generated_tokens)
            if decoded.log_probs is not None:
                # Entry i is the probability of token i + 1.
                known = decoded.log_probs[row, : begin - 1 + count].tolist()
                request.prompt_log_probs, request.generated_log_probs = known[: begin - 1], known[begin - 1 :]
            if wanted.return_segments:
                request.segments = self._segments(tokens[row, : begin + count].tolist())
            if decoded.top is not None:
                steps = zip(*(each[row, begin : begin + count].tolist() for each in decoded.top))
                request.generated_top_n_logprobs = [
                    {self.tokenizer.detokenize([token]): value for value, token in zip(*step)}
                    for step in steps
                ]
            request.status = Status.COMPLETED
        return active_requests

    def _segments(self, tokens: list[int]) -> list[str]:
        """The text of tokens, cut where each of them begins."""
        text = self.tokenizer.detokenize(tokens)
        begins = self.tokenizer.offsets(tokens, text)
        return [text[begin:end] for begin, end in zip(begins, [*begins[1:], len(text)])]

    @torch.no_grad()
    def _decode(self, tokens: Tensor, lengths: Tensor, wanted: CommonInferenceParams) -> _Decoded:
        """Fill `tokens` [b, s] behind prompts of these lengths [b]."""
        model = self.inference_wrapped_model
        model.prep_model_for_inference(prompts_tokens=tokens)
        done = torch.zeros_like(lengths, dtype=torch.bool)
        generated = torch.zeros_like(lengths)
        log_probs = torch.zeros(tokens.size(0), tokens.size(1) - 1) if wanted.return_log_probs else None
        top = None
        if wanted.top_n_logprobs > 0:
            shape = (*tokens.shape, wanted.top_n_logprobs)
            top = torch.zeros(shape), torch.zeros(shape, dtype=torch.long)
        start = 0
        for end in range(int(lengths.min()), tokens.size(1)):
            inputs = model.get_batch_for_context_window(start, end)
            logits = self._everywhere(model.run_one_forward_step(inputs), tokens.size(0), end - start, wanted)
            started = lengths <= end
            chosen = self.sample_from_logits(logits[:, -1], wanted, self.tokenizer.vocab_size)
            tokens[started, end] = chosen[started]
            if log_probs is not None:
                log_probs[:, start:end] = log_probs_of(logits, tokens[:, start + 1 : end + 1]).cpu()
            if top is not None:
                best = top_log_probs(logits[:, -1], wanted.top_n_logprobs, self.tokenizer.vocab_size)
                top[0][:, end], top[1][:, end] = best[0].cpu(), best[1].cpu()
            start = end
            done, generated = self.update_generation_status(tokens, started, end, done, generated)
            # Shorter prompts have more room than they were given tokens.
            done |= generated >= wanted.num_tokens_to_generate
            if done.all():
                break
        return _Decoded(generated, log_probs, top)

    def _everywhere(
        self, logits: Tensor | None, rows: int, positions: int, wanted: CommonInferenceParams
    ) -> Tensor:
        """Logits of the last position, or of all for log-probabilities, in fp32 on every stage: [b, 1 or n, v]."""
        if not wanted.return_log_probs:
            logits, positions = None if logits is None else logits[:, -1:], 1
        logits = None if logits is None else logits.float()
        if parallel_state.get_pipeline_model_parallel_world_size() == 1:
            assert logits is not None, "a whole model returns logits"
            return logits
        width = self.inference_wrapped_model.inference_wrapper_config.padded_vocab_size
        return broadcast_from_last_pipeline_stage([rows, positions, width], torch.float32, logits)
