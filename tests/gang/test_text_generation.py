"""v0.9's generation calls against its own recordings: a model whose next token depends on the last one alone."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.inference_params import InferenceParams
from megatron.inference.text_generation import (
    beam_search_and_post_process,
    generate,
    generate_and_post_process,
)
from megatron.training.global_vars import get_context, set_args, set_context
from tests.gang.harness import run_gang

GOLDEN = Path(__file__).parents[1] / "golden/inference"
MARKOV = json.loads((GOLDEN / "toy_markov.json").read_text())
LINES = json.loads((GOLDEN / "toy_end_of_line.json").read_text())
LIMITS = json.loads((GOLDEN / "limits.json").read_text())


class Words:
    """Ids are words, and there are no others."""

    def __init__(self, vocab_size: int, eod: int) -> None:
        self.vocab_size, self.eod = vocab_size, eod

    def tokenize(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def detokenize(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


class Chain(torch.nn.Module):
    """Next-token logits are a row of a table [v, v]; a cache it has no use for is filled all the same."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(
        self, tokens: Tensor, positions: Tensor, mask: Tensor | None, inference_params: InferenceParams
    ) -> Tensor:
        memory = torch.zeros(inference_params.max_sequence_length, inference_params.max_batch_size, 1, 1)
        inference_params.key_value_memory_dict.setdefault(1, (memory, memory.clone()))
        return self.table[tokens]


def start(tokenizer: Any, **limits: int) -> None:
    """One process, its arguments and its tokenizer."""
    import dataclasses

    parallel_state.initialize_model_parallel()
    defaults = {"max_position_embeddings": 64, "max_tokens_to_oom": 12000}
    set_args(Namespace(inference_batch_times_seqlen_threshold=512, **(defaults | limits)))
    set_context(dataclasses.replace(get_context(), tokenizer=tokenizer))


def answers(toy: dict[str, Any]) -> list[dict[str, Any]]:
    """Body: what the recorded requests get."""
    start(Words(toy["vocab_size"], toy["eod"]))
    model = Chain(torch.tensor(toy["next_token_logits_by_current_token"]))
    results = []
    for case in toy["cases"]:
        if case["mode"] == "beam":
            text, segments, scores = beam_search_and_post_process(  # type: ignore[misc]
                model,
                prompts=case["prompts"],
                tokens_to_generate=case["tokens_to_generate"],
                beam_size=case["beam_width"],
                stop_token=case["stop_token"],
                num_return_gen=case["beam_width"],
                length_penalty=case["length_penalty"],
            )
            results.append({"text": text, "segments": segments, "scores": scores})
            continue
        text, segments, log_probs, tokens = generate_and_post_process(  # type: ignore[misc]
            model,
            prompts=case["prompts"],
            tokens_to_generate=case["tokens_to_generate"],
            return_output_log_probs=case["logprobs"],
            add_BOS=case["add_BOS"],
            top_k_sampling=1,
        )
        results.append({"text": text, "segments": segments, "tokens": tokens, "output_logprobs": log_probs})
    return results


@pytest.mark.parametrize("toy", MARKOV, ids=range(len(MARKOV)))
def test_answers_are_the_recorded_ones(toy: dict[str, Any]) -> None:
    (results,) = run_gang(1, answers, toy)
    assert len(results) == len(toy["cases"]) == 36
    for result, case in zip(results, toy["cases"]):
        for name, value in result.items():
            expected = case[name]
            if name == "output_logprobs" and expected is not None:
                assert [len(row) for row in value] == [len(row) for row in expected]
                expected = [pytest.approx(row, abs=1e-6) for row in expected]
            elif name == "scores":
                expected = pytest.approx(expected, abs=1e-6)
            assert value == expected, (case, name)


def lines(toy: dict[str, Any], cases: list[dict[str, Any]], newlines: bool = False) -> list[Any]:
    """Body: a chain that counts upwards unless its map says otherwise, stopped at ends of lines."""
    tokenizer = Words(701, 700)
    if newlines:  # a vocabulary with a newline of its own
        own = {"\n": [9], "\n\n": [10], ":": [7], "": []}
        known = tokenizer.tokenize
        tokenizer.tokenize = lambda text: own[text] if text in own else known(text)  # type: ignore[method-assign]
    start(tokenizer)
    table = torch.zeros(701, 701)
    for token in range(701):
        table[token, toy["map"].get(str(token), (token + 1) % 700)] = 10.0
    results = []
    for case in cases:
        options = {key: value for key, value in case.items() if key not in ("prompt", "text", "tokens")}
        text, _, _, _ = generate_and_post_process(  # type: ignore[misc]
            Chain(table), prompts=[case["prompt"]], top_k_sampling=1, **options
        )
        results.append(text[0])
    return results


def test_lines_end_rows_as_recorded() -> None:
    (texts,) = run_gang(1, lines, LINES, LINES["cases"])
    assert texts == [case["text"] for case in LINES["cases"]]


def test_a_tokenizer_with_newlines_stops_at_its_own() -> None:
    cases = [
        {"prompt": "7", "stop_on_eol": True, "tokens_to_generate": 6},
        {"prompt": "7", "stop_on_double_eol": True, "tokens_to_generate": 4},
        {"prompt": "7", "prevent_newline_after_colon": True, "tokens_to_generate": 1},
    ]
    toy = {"map": {"7": 9, "9": 9, "198": 199}}
    (texts,) = run_gang(1, lines, toy, cases, newlines=True)
    # The third: everything but the forbidden newline is equally likely, and the first of equals is taken.
    assert texts == ["7 9", "7 9 9", "7 0"]


def refusals() -> list[str | None]:
    """Body: what the recorded requests beyond the limits are told."""
    results: list[str | None] = []
    for case in LIMITS:
        limits = {
            name: case[name] for name in ("max_position_embeddings", "max_tokens_to_oom") if name in case
        }
        if not parallel_state.model_parallel_is_initialized():
            start(Words(12, 11), **limits)
        get_context().args.__dict__.update(limits)
        model, number = Chain(torch.zeros(12, 12)), case["tokens_to_generate"]
        try:
            if "beam_width" in case:
                beam_search_and_post_process(
                    model, prompts=case["prompts"], tokens_to_generate=number, beam_size=case["beam_width"]
                )
            else:
                generate_and_post_process(model, prompts=case["prompts"], tokens_to_generate=number)
        except ValueError as error:
            results.append(str(error))
        else:
            results.append(None)
    return results


def test_limits_are_the_recorded_ones() -> None:
    assert run_gang(1, refusals)[0] == [case["error"] for case in LIMITS]


BAD: dict[str, dict[str, Any]] = {
    "no prompt": {"prompts": []},
    "a prompt without tokens": {"prompts": [" "]},
    "no word of the vocabulary": {"prompts": ["hello"]},
    "an id beyond the vocabulary": {"prompts": ["1 12"]},
    "a seed of more than 64 bits": {"random_seed": 2**63},
    "more tokens than memory": {"tokens_to_generate": 10**15},
    "fewer than no tokens": {"tokens_to_generate": -1},
    "two filters": {"top_k_sampling": 3, "top_p_sampling": 0.5},
    "a filter wider than the vocabulary": {"top_k_sampling": 12},
    "no temperature": {"temperature": 0.0},
    "no beam": {"beam_size": 0},
    "more beams than words": {"beam_size": 12},
    "beams beyond the limit of tokens": {"beam_size": 3, "tokens_to_generate": 60},
    "a penalty beyond floats": {"beam_size": 2, "length_penalty": 1e308},
    "nothing to return": {"beam_size": 2, "num_return_gen": 0},
    "two prompts for beams": {"beam_size": 2, "prompts": ["1", "2"]},
}


def refuse_and_go_on() -> list[str]:
    """Body: bad requests, each followed by a good one: the ranks stay together."""
    import dataclasses

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    set_args(
        Namespace(
            inference_batch_times_seqlen_threshold=512,
            max_position_embeddings=64,
            max_tokens_to_oom=100,
            padded_vocab_size=16,
        )
    )
    set_context(dataclasses.replace(get_context(), tokenizer=Words(12, 11)))
    model = Chain(torch.eye(16).roll(1, 1))
    here = torch.distributed.get_rank() == 0
    messages = []
    for what, changed in BAD.items():
        request = {"prompts": ["1 2"], "tokens_to_generate": 3} | changed
        call = beam_search_and_post_process if "beam_size" in request else generate_and_post_process
        with pytest.raises(ValueError) as refused:
            call(model, **(request if here else {}))  # type: ignore[operator]
        messages.append(f"{what}: {refused.value}")
        good = {"prompts": ["1 2"], "tokens_to_generate": 3, "top_k_sampling": 1}
        texts, *_ = generate_and_post_process(model, **(good if here else {}))  # type: ignore[misc]
        assert texts == ["1 2 3 4 5"], what
    return messages


def test_what_is_refused_is_refused_on_every_rank() -> None:
    first, second = run_gang(2, refuse_and_go_on)
    assert len(first) == len(second) == len(BAD)


def draws(seed: int, number: int, **options: Any) -> tuple[list[list[int]], list[int]]:
    """Body: rows of ids and lengths of seeded draws from a padded vocabulary of which 5 ids are real."""
    start(Words(5, 4))
    table = torch.zeros(8, 8)
    table[:, 5:] = 9.0  # padding that would be drawn almost always
    tokens, lengths, _, _ = generate(
        Chain(table), prompts=["1"] * 3, tokens_to_generate=number, random_seed=seed, **options
    )
    assert lengths is not None
    return tokens.tolist(), lengths.tolist()


def test_seeds_are_exact_and_padding_is_never_drawn() -> None:
    large = 2**53 + 1
    first, again, other = (run_gang(1, draws, seed, 20)[0] for seed in (large, large, large - 1))
    assert first == again != other
    drawn = {token for row in first[0] for token in row}
    assert drawn <= set(range(5)) and len(drawn) > 2
    for row, length in zip(*first):
        assert row[length - 1] == 4 or length == 21
    # Without early termination rows are drawn to their end; their lengths still say where the first document ended.
    rows, lengths = run_gang(1, draws, large, 20, use_eod_token_for_early_termination=False)[0]
    assert {len(row) for row in rows} == {21} and lengths == first[1]


def test_a_decaying_top_p_becomes_greedy_and_starts_anew() -> None:
    """From 1 down by half each token: the filter soon leaves the most probable alone."""
    options = {"top_p_sampling": 1.0, "top_p_decay": 0.25, "top_p_bound": 0.1}
    rows, _ = run_gang(1, draws, 3, 20, use_eod_token_for_early_termination=False, **options)[0]
    assert all(token == 0 for row in rows for token in row[4:])
    assert run_gang(1, draws, 3, 20, use_eod_token_for_early_termination=False, **options)[0][0] == rows
