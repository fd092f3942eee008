"""v0.9's generation calls on a GPT: every layout answers as one process does, and that as whole forward passes do."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.inference.text_generation import beam_search_and_post_process, generate_and_post_process
from megatron.training.global_vars import get_context, set_args, set_context
from tests.gang.harness import run_gang
from tests.gang.model_runs import piece_of
from tests.gang.test_generation_engine import LENGTH, VOCAB, Numbers, build

#: Prompts of unequal length, with more new tokens than the shortest has.
GREEDY = {
    "prompts": ["5 9 2", "7 1 30 8 8", "11"], "tokens_to_generate": 6, "top_k_sampling": 1,
    "return_output_log_probs": True, "add_BOS": True,
}  # fmt: skip
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "drawn": {
        "prompts": ["5 9 2", "40"], "tokens_to_generate": 5, "top_p_sampling": 0.9, "top_p_decay": 0.9,
        "top_p_bound": 0.3, "temperature": 1.5, "random_seed": 7, "return_output_log_probs": True,
    },
    "drawn by rank": {"prompts": ["3"] * 4, "tokens_to_generate": 5, "top_k_sampling": 9, "random_seed": 0},
    "scored": {
        "prompts": ["5 9 2", "7 1 30 8 8", "11"], "tokens_to_generate": 0, "return_output_log_probs": True,
    },
    "beams": {
        "prompts": ["7 1 30"], "tokens_to_generate": 6, "beam_size": 3, "num_return_gen": 3, "stop_token": 12,
    },
    "beams by their sums": {
        # More tokens than there is room for: the rows end with the room.
        "prompts": [" ".join(map(str, range(LENGTH - 4)))], "tokens_to_generate": 40, "beam_size": 4,
        "num_return_gen": 2, "length_penalty": 0.0,
    },
}  # fmt: skip


def ask(tp: int, pp: int, weights: dict[str, Tensor] | None, threshold: int) -> Any:
    """Body: this rank's weights, and its answers to the requests."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    model_parallel_cuda_manual_seed(3)
    torch.manual_seed(3)
    set_args(
        Namespace(
            inference_batch_times_seqlen_threshold=threshold,
            max_position_embeddings=LENGTH,
            max_tokens_to_oom=12000,
            padded_vocab_size=VOCAB,
            hidden_size=16,
            params_dtype=torch.float32,
            fp32_residual_connection=False,
        )
    )
    set_context(dataclasses.replace(get_context(), tokenizer=Numbers()))
    model = build(tp, pp)
    if weights is not None:
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(piece_of(weights, model, key, parameter))
    here = torch.distributed.get_rank() == 0
    answers = {}
    for name, request in REQUESTS.items():
        call = beam_search_and_post_process if "beam_size" in request else generate_and_post_process
        answers[name] = call(model, **(request if here else {}))  # type: ignore[operator]
    return {key: value.detach() for key, value in model.named_parameters()}, answers


@pytest.fixture(scope="module")
def alone() -> tuple[dict[str, Tensor], dict[str, Any]]:
    return run_gang(1, ask, 1, 1, None, 512)[0]


def assert_same(answer: Any, expected: Any) -> None:
    """Texts, segments and ids equal; log-probabilities and scores close."""
    for mine, theirs in zip(answer, expected, strict=True):
        if theirs and isinstance(theirs[0], float):
            assert mine == pytest.approx(theirs, abs=1e-4)
        elif theirs and theirs[0] and isinstance(theirs[0][0], float):
            assert [pytest.approx(row, abs=1e-4) for row in theirs] == mine
        else:
            assert mine == theirs


@pytest.mark.parametrize(
    ("tp", "pp", "threshold"),
    [(2, 1, 512), (1, 2, 512), (1, 2, 6), (2, 2, 1)],
    ids=["tensor", "pipeline", "pipeline, in parts", "both, row by row"],
)
def test_layouts_answer_alike(
    tp: int, pp: int, threshold: int, alone: tuple[dict[str, Tensor], dict[str, Any]]
) -> None:
    weights, expected = alone
    results = run_gang(tp * pp, ask, tp, pp, weights, threshold)
    for rank, (_, answers) in enumerate(results):
        for name, answer in answers.items():
            if rank == 0:
                assert_same(answer, expected[name])
            elif rank < tp:  # the first stage, which was not told to return log-probabilities
                assert answer[0] == expected[name][0]
            else:
                assert answer is None


def log_probs(weights: dict[str, Tensor], rows: list[list[int]]) -> list[Tensor]:
    """Body: log-probabilities [s, v] after every token of each row, by one forward pass without cache."""
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(3)
    model = build(1, 1).eval()
    model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        return [
            model(torch.tensor([row]), torch.arange(len(row))[None], None)[0].log_softmax(-1) for row in rows
        ]


def test_greedy_answers_are_those_of_whole_passes(alone: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    weights, answers = alone
    texts, segments, probabilities, _ = answers["greedy"]
    rows = [Numbers().tokenize(text) for text in texts]
    for row, pieces, own, expected in zip(
        rows, segments, probabilities, run_gang(1, log_probs, weights, rows)[0]
    ):
        assert row[0] == Numbers.eod and pieces == [str(token) for token in row]
        assert own == pytest.approx([expected[i, row[i + 1]].item() for i in range(len(row) - 1)], abs=1e-5)
    for row, prompt, expected in zip(rows, GREEDY["prompts"], run_gang(1, log_probs, weights, rows)[0]):
        given = 1 + len(prompt.split())
        assert row[given:] == expected[given - 1 : -1].argmax(-1).tolist()
        assert len(row) == 1 + 5 + 6 or row[-1] == Numbers.eod


def test_scores_are_those_of_whole_passes(alone: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    """Of prompts, entry by entry; of beams, the mean or the sum over what was generated, the stop token included."""
    weights, answers = alone
    _, _, probabilities, _ = answers["scored"]
    rows = [Numbers().tokenize(prompt) for prompt in REQUESTS["scored"]["prompts"]]
    for row, own, expected in zip(rows, probabilities, run_gang(1, log_probs, weights, rows)[0]):
        assert own == pytest.approx([expected[i, row[i + 1]].item() for i in range(len(row) - 1)], abs=1e-5)
    for name, stop, length in (("beams", 12, 3 + 6), ("beams by their sums", 50256, LENGTH)):
        texts, _, scores = answers[name]
        given = len(REQUESTS[name]["prompts"][0].split())
        assert scores == sorted(scores, reverse=True) and len(scores) == REQUESTS[name]["num_return_gen"]
        rows = [Numbers().tokenize(text) for text in texts]
        assert {len(row) for row in rows} == {length} and len(set(texts)) == len(texts)
        for row, score, expected in zip(rows, scores, run_gang(1, log_probs, weights, rows)[0]):
            while row[-1] == Numbers.eod and stop == 12:
                row.pop()
            counted = row + [stop] if len(row) < length else row
            parts = [expected[i, counted[i + 1]].item() for i in range(given - 1, len(counted) - 1)]
            mean = sum(parts) / (len(parts) if name == "beams" else 1)
            assert score == pytest.approx(mean, abs=1e-4)
