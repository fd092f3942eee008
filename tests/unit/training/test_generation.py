"""Sampling filters against recordings; the decoding loop against full forward passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.inference.text_generation import sampling
from megatron.inference.text_generation.generation import generate_tokens
from tests.gang.harness import run_gang

FILTERS = json.loads((Path(__file__).parents[2] / "golden/inference/filters.json").read_text())


@pytest.mark.parametrize("case", FILTERS, ids=range(len(FILTERS)))
def test_filters_keep_what_the_recording_kept(case: dict[str, Any]) -> None:
    for k, kept in case["top_k"].items():
        logits = torch.tensor(case["logits"])
        sampling.modify_logits_for_top_k_filtering(logits, int(k))
        assert logits.isfinite().tolist() == kept
    for p, kept in case["top_p"].items():
        logits = torch.tensor(case["logits"])
        sampling.modify_logits_for_top_p_filtering(logits, float(p))
        assert logits.isfinite().tolist() == kept


def test_sample_is_greedy_for_one_and_clamps_padding() -> None:
    logits = torch.tensor([[0.0, 1.0, 5.0], [3.0, 1.0, 2.0]])
    assert sampling.sample(logits, top_k=1).tolist() == [2, 0]
    assert sampling.sample(logits, top_k=1, vocab_size=2).tolist() == [1, 0]
    with pytest.raises(ValueError, match="exclude"):
        sampling.sample(logits, top_k=2, top_p=0.5)


def greedy_both_ways(tp: int) -> tuple[list[list[int]], list[list[int]]]:
    """Body: continue two prompts of different lengths with the cache, and by a whole forward pass per token."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    model_parallel_cuda_manual_seed(3)
    config = TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=2, use_cpu_initialization=True,
        tensor_model_parallel_size=tp, init_method_std=0.5,
    )  # fmt: skip
    torch.manual_seed(3)
    model = GPTModel(
        config, get_gpt_layer_local_spec(), vocab_size=64, max_sequence_length=24, position_embedding_type="rope",
        parallel_output=True,
    ).eval()  # fmt: skip
    prompts = [[5, 9, 2], [7, 1, 30, 8, 8]]
    cached = generate_tokens(model, prompts, 6, end_token=63, max_sequence_length=24, top_k=1)
    whole = GPTModel.forward
    expected = []
    for prompt, row in zip(prompts, cached):
        tokens = list(prompt)
        while len(tokens) < len(row):
            ids = torch.tensor([tokens])
            logits = whole(model, ids, torch.arange(len(tokens))[None], None)[:, -1]
            parts = [torch.empty_like(logits) for _ in range(tp)]
            torch.distributed.all_gather(parts, logits.contiguous())
            tokens.append(int(torch.cat(parts, dim=-1).argmax()))
        expected.append(tokens)
    return cached, expected


@pytest.mark.parametrize("tp", [1, 2])
def test_cached_generation_equals_whole_forward_passes(tp: int) -> None:
    for cached, expected in run_gang(tp, greedy_both_ways, tp):
        assert cached == expected
        assert all(len(row) > 3 for row in cached)
