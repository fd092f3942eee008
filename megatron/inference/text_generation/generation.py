"""The decoding loop: prompts in, tokens out, one forward pass per token over cached keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.core import parallel_state, tensor_parallel
from megatron.core.errors import FlagError
from megatron.core.inference.sampling import sample
from megatron.core.inference_params import InferenceParams


@torch.no_grad()
def generate_tokens(
    model: torch.nn.Module,
    prompts: list[list[int]],
    tokens_to_generate: int,
    *,
    end_token: int,
    max_sequence_length: int,
    vocab_size: int | None = None,
    top_k: int = 0,
    top_p: float = 0.0,
    temperature: float = 1.0,
) -> list[list[int]]:
    """Each prompt (non-empty token ids) with what follows it, up to and including `end_token`.

    The model must be whole on this pipeline stage; all tensor-parallel ranks call with equal arguments and equal random
    state. FlagError if the longest row would exceed `max_sequence_length`, or on a pipeline.
    """
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        raise FlagError(
            "--pipeline-model-parallel-size",
            "generation needs the whole model in one stage",
            "convert the checkpoint",
        )
    longest = max(map(len, prompts))
    total = longest + tokens_to_generate
    if total > max_sequence_length:
        raise FlagError(
            "--max-position-embeddings",
            f"{longest} prompt tokens and {tokens_to_generate} new ones exceed its {max_sequence_length}",
            "shorten the prompt or generate fewer tokens",
        )
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.full((len(prompts), total), end_token)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = torch.tensor(prompt)
    model.eval()
    cache = InferenceParams(len(prompts), total)
    ends = torch.full_like(lengths, total)
    done = torch.zeros_like(lengths, dtype=torch.bool)
    previous = 0
    device = next(model.parameters()).device
    for position in range(int(lengths.min()), total):
        logits = _last_logits(model, tokens[:, previous:position].to(device), previous, cache)
        cache.sequence_len_offset = previous = position
        chosen = sample(logits, top_k, top_p, temperature, vocab_size).cpu()
        started = lengths <= position
        tokens[started, position] = chosen[started]
        stops = started & ~done & (chosen == end_token)
        ends[stops] = position + 1
        done |= stops
        if done.all():
            break
    return [row[:end].tolist() for row, end in zip(tokens, ends.tolist())]


def _last_logits(model: Any, tokens: Tensor, offset: int, cache: InferenceParams) -> Tensor:
    """fp32 logits [b, v] after the last of `tokens` [b, n], which follow `offset` cached ones."""
    positions = torch.arange(offset, offset + tokens.size(1), device=tokens.device).expand_as(tokens)
    logits = model(tokens, positions, None, inference_params=cache)[:, -1].float()
    return tensor_parallel.gather_from_tensor_model_parallel_region(logits)
