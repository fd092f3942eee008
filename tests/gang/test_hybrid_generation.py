"""A hybrid model under the engine's forward pass, on every layout, against whole forward passes of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.inference.common_inference_params import CommonInferenceParams
from megatron.core.inference.engines.mcore_engine import MCoreEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
from megatron.core.inference.text_generation_controllers.simple_text_generation_controller import (
    SimpleTextGenerationController,
)
from megatron.core.models.mamba import MambaModel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.gang.harness import run_gang
from tests.gang.model_runs import piece_of
from tests.gang.test_generation_engine import NEW, PROMPTS, Numbers
from tests.unit.ssm.support import toy_stack_spec

VOCAB, LENGTH, BATCH, HIDDEN = 64, 14, 3, 16


def build(tp: int, pp: int, weights: dict[str, Tensor] | None) -> MambaModel:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    model_parallel_cuda_manual_seed(3)
    torch.manual_seed(3)
    config = TransformerConfig(
        num_layers=4, hidden_size=HIDDEN, num_attention_heads=4, num_query_groups=2, init_method_std=0.5,
        use_cpu_initialization=True, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
    )  # fmt: skip
    model = MambaModel(
        config, toy_stack_spec, VOCAB, LENGTH, hybrid_override_pattern="M*M-", position_embedding_type="rope",
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(),
    )  # fmt: skip
    if weights is not None:
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(piece_of(weights, model, key, parameter))
    return model.eval()


def whole(tokens: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Body for one process: its weights, and the logits [b, s, v] of one pass over everything."""
    model = build(1, 1, None)
    with torch.no_grad():
        logits = model(tokens, torch.arange(LENGTH).expand_as(tokens), None)
    return {key: value.detach() for key, value in model.named_parameters()}, logits


def decoded(tp: int, pp: int, weights: dict[str, Tensor], tokens: Tensor, threshold: int) -> Any:
    """Body: logits of a prompt of 5 and of one token after the other, on the last stage."""
    wrapped = GPTInferenceWrapper(
        build(tp, pp, weights), InferenceWrapperConfig(HIDDEN, torch.float32, threshold, VOCAB)
    )
    wrapped.prep_model_for_inference(tokens)
    logits = []
    with torch.no_grad():
        for start, stop in [(0, 5), *((t, t + 1) for t in range(5, LENGTH))]:
            window = wrapped.get_batch_for_context_window(start, stop)
            logits.append(wrapped.run_one_forward_step(window))
    return torch.cat(logits, dim=1) if parallel_state.is_pipeline_last_stage() else None


@pytest.mark.parametrize(
    ("tp", "pp", "threshold"),
    [(1, 1, 1000), (2, 1, 1000), (1, 2, 1000), (2, 2, 1)],
    ids=["alone", "tensor", "pipeline, whole batches", "both, row by row"],
)
def test_decoding_equals_whole_passes(tp: int, pp: int, threshold: int) -> None:
    tokens = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    weights, expected = run_gang(1, whole, tokens)[0]
    results = [
        each for each in run_gang(tp * pp, decoded, tp, pp, weights, tokens, threshold) if each is not None
    ]
    assert len(results) == tp
    for logits in results:
        assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def unequal(tp: int, weights: dict[str, Tensor]) -> list[str]:
    """Body: names of this rank's initial values that are no pieces of one process's."""
    model = build(tp, 1, None)
    return [
        key
        for key, value in model.named_parameters()
        if not torch.equal(value, piece_of(weights, model, key, value))
    ]


@pytest.mark.parametrize("tp", [2, 4])
def test_values_drawn_on_the_host_do_not_depend_on_the_layout(tp: int) -> None:
    weights, _ = run_gang(1, whole, torch.zeros(1, LENGTH, dtype=torch.long))[0]
    assert run_gang(tp, unequal, tp, weights) == [[]] * tp


def completed(pp: int, weights: dict[str, Tensor]) -> dict[str, list[int]]:
    """Body: the engine's greedy completions of prompts of several lengths, two at a time."""
    wrapped = GPTInferenceWrapper(
        build(1, pp, weights), InferenceWrapperConfig(HIDDEN, torch.float32, 0, VOCAB)
    )
    engine = MCoreEngine(SimpleTextGenerationController(wrapped, Numbers()), max_batch_size=2)
    params = CommonInferenceParams(top_k=1, num_tokens_to_generate=NEW)
    return {request.prompt: request.generated_tokens.tolist() for request in engine.generate(PROMPTS, params)}


def continued(weights: dict[str, Tensor]) -> dict[str, list[int]]:
    """Body for one process: the same by one pass over everything per token."""
    model = build(1, 1, weights)
    result = {}
    for prompt in PROMPTS:
        tokens = Numbers().tokenize(prompt)
        given = len(tokens)
        while len(tokens) < given + NEW and tokens[-1] != Numbers.eod:
            with torch.no_grad():
                logits = model(torch.tensor([tokens]), torch.arange(len(tokens))[None], None)
            tokens.append(int(logits[0, -1].argmax()))
        result[prompt] = tokens[given:]
    return result


def test_the_engine_completes_prompts_of_several_lengths() -> None:
    tokens = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    weights, _ = run_gang(1, whole, tokens)[0]
    expected = run_gang(1, continued, weights)[0]
    assert run_gang(2, completed, 2, weights) == [expected, expected]
