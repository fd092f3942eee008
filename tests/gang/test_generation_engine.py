"""The generation engine against whole forward passes of one process, on every layout of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.inference.common_inference_params import CommonInferenceParams
from megatron.core.inference.engines.mcore_engine import MCoreEngine
from megatron.core.inference.inference_request import Status
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig
from megatron.core.inference.scheduler import Scheduler
from megatron.core.inference.text_generation_controllers.simple_text_generation_controller import (
    SimpleTextGenerationController,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.tokenizer.null import _NullTokenizer
from tests.gang.harness import run_gang
from tests.gang.model_runs import piece_of

VOCAB, LENGTH, NEW = 64, 32, 6
PROMPTS = ["5 9 2", "7 1 30 8 8", "11", "40 41"]


class Numbers:
    """Ids are words; the last id ends a document."""

    vocab_size, eod = VOCAB, VOCAB - 1

    def tokenize(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def detokenize(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def build(tp: int, pp: int) -> GPTModel:
    config = TransformerConfig(
        num_layers=4, hidden_size=16, num_attention_heads=4, num_query_groups=2, init_method_std=0.5,
        use_cpu_initialization=True, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
    )  # fmt: skip
    return GPTModel(
        config, get_gpt_layer_local_spec(), VOCAB, LENGTH, position_embedding_type="rope",
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True, share_embeddings_and_output_weights=False,
    )  # fmt: skip


def complete(tp: int, pp: int, weights: dict[str, Tensor] | None, threshold: int) -> Any:
    """Body: complete the prompts two at a time -> (this rank's weights, per prompt tokens, log-probs and text)."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    model_parallel_cuda_manual_seed(3)
    torch.manual_seed(3)
    model = build(tp, pp)
    if weights is not None:
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(piece_of(weights, model, key, parameter))
    wrapped = GPTInferenceWrapper(model, InferenceWrapperConfig(16, torch.float32, threshold, VOCAB))
    engine = MCoreEngine(SimpleTextGenerationController(wrapped, Numbers()), max_batch_size=2)
    params = CommonInferenceParams(top_k=1, return_log_probs=True, num_tokens_to_generate=NEW)
    requests = engine.generate(PROMPTS[:1], params) + engine.generate(PROMPTS[1:], params)
    assert all(request.status == Status.COMPLETED for request in requests)
    assert [request.generated_length for request in requests] == [len(r.generated_tokens) for r in requests]
    completions = {
        r.prompt: (r.generated_tokens.tolist(), r.generated_log_probs, r.generated_text) for r in requests
    }
    return {key: value.detach() for key, value in model.named_parameters()}, completions


def whole_passes(weights: dict[str, Tensor], prompt: str) -> tuple[list[int], list[float]]:
    """Body: the same, greedily, by one forward pass over everything per token."""
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(3)
    model = build(1, 1).eval()
    model.load_state_dict(weights, strict=False)
    tokens, probabilities, given = Numbers().tokenize(prompt), [], len(Numbers().tokenize(prompt))
    while len(tokens) < given + NEW:
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), torch.arange(len(tokens))[None], None)[0, -1]
        if (chosen := int(logits.argmax())) == Numbers.eod:
            break
        probabilities.append(logits.log_softmax(-1)[chosen].item())
        tokens.append(chosen)
    return tokens[given:], probabilities


@pytest.fixture(scope="module")
def alone() -> tuple[dict[str, Tensor], dict[str, Any]]:
    return run_gang(1, complete, 1, 1, None, 0)[0]


def test_engine_completes_as_whole_forward_passes_do(alone: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    weights, completions = alone
    assert set(completions) == set(PROMPTS)
    for prompt, (tokens, log_probs, text) in completions.items():
        expected, expected_log_probs = run_gang(1, whole_passes, weights, prompt)[0]
        assert tokens == expected and text == Numbers().detokenize(expected)
        assert log_probs == pytest.approx(expected_log_probs, abs=1e-4)


@pytest.mark.parametrize(
    ("tp", "pp", "threshold"),
    [(2, 1, 1000), (1, 2, 1000), (2, 2, 1)],
    ids=["tensor", "pipeline, whole batches", "both, row by row"],
)
def test_layouts_agree(
    tp: int, pp: int, threshold: int, alone: tuple[dict[str, Tensor], dict[str, Any]]
) -> None:
    weights, expected = alone
    for _, completions in run_gang(tp * pp, complete, tp, pp, weights, threshold):
        for prompt, (tokens, log_probs, text) in completions.items():
            assert (tokens, text) == (expected[prompt][0], expected[prompt][2])
            assert log_probs == pytest.approx(expected[prompt][1], abs=1e-4)


def everything_asked_for(weights: dict[str, Tensor]) -> list[Any]:
    """Body: the prompts, greedily and at once, with all that can be asked for; and the same from whole passes."""
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(3)
    model = build(1, 1)
    model.load_state_dict(weights, strict=False)
    wrapped = GPTInferenceWrapper(model, InferenceWrapperConfig(16, torch.float32, 1000, VOCAB))
    tokenizer = _NullTokenizer(VOCAB - 1)
    engine = MCoreEngine(SimpleTextGenerationController(wrapped, tokenizer), max_batch_size=len(PROMPTS))
    params = CommonInferenceParams(
        top_k=1, return_log_probs=True, num_tokens_to_generate=NEW, return_segments=True, top_n_logprobs=3
    )
    results = []
    for request in engine.generate(PROMPTS, params):
        tokens = [*request.prompt_tokens, *request.generated_tokens.tolist()]
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), torch.arange(len(tokens))[None], None)[0]
        results.append((request, tokens, logits.log_softmax(-1)))
    return results


def test_segments_and_the_most_probable_tokens(alone: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    for request, tokens, expected in run_gang(1, everything_asked_for, alone[0])[0]:
        assert "".join(request.segments) == " ".join(map(str, tokens)) and len(request.segments) == len(
            tokens
        )
        given = len(request.prompt_tokens)
        own = request.prompt_log_probs + request.generated_log_probs
        assert own == pytest.approx(
            [expected[i, tokens[i + 1]].item() for i in range(len(tokens) - 1)], abs=1e-5
        )
        assert len(request.prompt_log_probs) == given - 1
        assert len(request.generated_top_n_logprobs) == request.generated_length
        for step, best in enumerate(request.generated_top_n_logprobs):
            values, ids = expected[given - 1 + step].topk(3)
            assert list(best) == [str(token) for token in ids.tolist()]
            assert list(best.values()) == pytest.approx(values.tolist(), abs=1e-5)


def test_rows_end_at_the_end_of_a_document() -> None:
    controller = SimpleTextGenerationController(None, Numbers())  # type: ignore[arg-type]
    tokens = torch.tensor([[1, 63], [1, 5], [63, 63]])
    done, generated = controller.update_generation_status(
        tokens,
        torch.tensor([True, True, False]),
        1,
        torch.zeros(3, dtype=torch.bool),
        torch.tensor([4, 4, 0]),
    )
    assert done.tolist() == [True, False, False] and generated.tolist() == [4, 5, 0]
    prompts = [[1, 2], [3]]
    assert controller.pad_input_prompt_tokens(prompts, 2, 1).tolist() == [[1, 2, 63], [3, 63, 63]]
    assert prompts == [[1, 2], [3]]


def test_queue_is_first_in_first_out() -> None:
    queue = Scheduler(max_batch_size=2)
    for prompt in "abcd":
        queue.add_request(prompt, [1], CommonInferenceParams())
    assert [r.prompt for r in queue.active_request_pool.values()] == ["a", "b"]
    assert {r.status for r in queue.waiting_request_pool.values()} == {Status.WAITING_IN_QUEUE}
    queue.active_request_pool["1"].status = Status.COMPLETED
    queue.update_requests_pools(queue.active_request_pool)
    assert [r.prompt for r in queue.active_request_pool.values()] == ["a", "c"]
    assert list(queue.completed_request_pool) == ["1"] and queue.have_requests_pending()
    with pytest.raises(AssertionError, match="max_batch_size"):
        queue.add_earliest_waiting_request_to_active_pool()
