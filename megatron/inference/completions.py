"""`POST /completions`: requests in the form of OpenAI's completions call, which evaluation harnesses make.

Harnesses score a text by echoing it: `echo` with `max_tokens` 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron.inference.rest_request import RequestError
from megatron.inference.text_generation.api import ScoredPrompt, generate_and_post_process, score_prompts
from megatron.inference.text_generation.tokenization import end_of_document
from megatron.inference.turns import Task, Turns, announce
from megatron.training import get_tokenizer

MAX_LOGPROBS = 10


@dataclass(frozen=True)
class CompletionRequest:
    """The fields of a request, checked.

    temperature or top_p 0 is greedy. `stop` cuts answers where one of its texts begins; the end of a document always does.
    """

    prompts: list[str] | list[list[int]]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    logprobs: int = 0
    echo: bool = False
    seed: int = -1
    stop: tuple[str, ...] = ()

    @classmethod
    def of(cls, body: Any) -> CompletionRequest:
        """The request in a decoded JSON body; RequestError for the first thing that is wrong with it."""
        if not isinstance(body, dict):
            raise RequestError("the request is not an object", 400)
        # null means the default, for every field.
        given = {name: value for name, value in body.items() if value is not None}
        stop = given.get("stop", [])
        request = cls(
            _prompts(given.get("prompt")),
            _integer(given, "max_tokens", None),
            _number(given, "temperature", 1.0),
            _number(given, "top_p", 1.0),
            _integer(given, "logprobs", 0),
            given.get("echo", False),
            _integer(given, "seed", -1),
            (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list) else (),
        )
        request._check(stop)
        for name in ("best_of", "n"):
            _require(_integer(given, name, 1) == 1, f"{name} must be 1: there is one answer for each prompt")
        return request

    def _check(self, stop: Any) -> None:
        _require(isinstance(self.echo, bool), "echo must be true or false")
        _require(self.max_tokens >= 0, "max_tokens must not be negative")
        _require(self.echo or self.max_tokens > 0, "max_tokens 0 without echo asks for nothing")
        _require(0.0 <= self.temperature <= 100.0, "temperature must be between 0 and 100")
        _require(0.0 <= self.top_p <= 1.0, "top_p must be between 0 and 1")
        _require(0 <= self.logprobs <= MAX_LOGPROBS, f"logprobs must be between 0 and {MAX_LOGPROBS}")
        _require(not (self.logprobs and self.max_tokens), "logprobs are of prompts: they need max_tokens 0")
        texts = isinstance(stop, (str, list)) and all(isinstance(text, str) and text for text in self.stop)
        _require(texts, "stop must be a text, or a list of texts")


class MegatronCompletions:
    """Answers the requests for one model."""

    def __init__(self, model: torch.nn.Module, turns: Turns) -> None:
        self.model = model
        self.turns = turns

    def post(self) -> Any:
        """The answer to the current request."""
        from flask import jsonify, request

        try:
            wanted = CompletionRequest.of(request.get_json())
            # Some tokenizers take one caller at a time, too.
            with self.turns.take():
                choices = self._score(wanted) if wanted.max_tokens == 0 else self._complete(wanted)
        except ValueError as refusal:
            return jsonify({"message": str(refusal)}), 400
        return jsonify({"choices": choices})

    def _complete(self, wanted: CompletionRequest) -> list[dict[str, Any]]:
        tokenizer = get_tokenizer()
        prompts = _ids(wanted.prompts)
        greedy = wanted.temperature == 0.0 or wanted.top_p == 0.0
        announce(Task.GENERATE)
        result: Any = generate_and_post_process(
            self.model,
            prompts=prompts,
            tokens_to_generate=wanted.max_tokens,
            top_k_sampling=1 if greedy else 0,
            top_p_sampling=wanted.top_p if not greedy and wanted.top_p < 1.0 else 0.0,
            temperature=1.0 if greedy else wanted.temperature,
            random_seed=wanted.seed,
        )
        _, segments, _, rows = result
        choices = []
        for index, (given, prompt, row, pieces) in enumerate(zip(wanted.prompts, prompts, rows, segments)):
            # Rows of shorter prompts go on for longer.
            answer = row[len(prompt) : min(len(pieces), len(prompt) + wanted.max_tokens)]
            if answer[-1] == end_of_document(tokenizer):
                answer.pop()
            text = _continuation(prompt, answer)
            text = text[: min((at for stop in wanted.stop if (at := text.find(stop)) >= 0), default=None)]
            if wanted.echo:
                text = _text_of(given) + text
            choices.append({"index": index, "text": text, "logprobs": None})
        return choices

    def _score(self, wanted: CompletionRequest) -> list[dict[str, Any]]:
        prompts = _ids(wanted.prompts)
        announce(Task.SCORE)
        scored = score_prompts(self.model, prompts, wanted.logprobs)
        assert scored is not None, "rank 0 is on the first stage"
        return [
            {
                "index": index,
                "text": (text := _text_of(prompt)),
                "logprobs": _logprobs(score, text, wanted.logprobs),
            }
            for index, (prompt, score) in enumerate(zip(wanted.prompts, scored))
        ]


def _logprobs(scored: ScoredPrompt, text: str, rivals: int) -> dict[str, Any]:
    """Of every token its log-probability, text, place and `rivals`; of the first only text and place are known."""
    tokenizer = get_tokenizer()
    begins = tokenizer.offsets(scored.tokens, text)
    top = [{tokenizer.detokenize([token]): value for token, value in each.items()} for each in scored.top]
    return {
        "token_logprobs": [None, *scored.log_probs],
        "tokens": [text[begin:end] for begin, end in zip(begins, [*begins[1:], len(text)])],
        "text_offset": begins,
        "top_logprobs": [None, *top] if rivals else None,
    }


def _ids(prompts: list[str] | list[list[int]]) -> list[list[int]]:
    tokenizer = get_tokenizer()
    return [list(tokenizer.tokenize(prompt)) if isinstance(prompt, str) else prompt for prompt in prompts]


def _text_of(prompt: Any) -> str:
    """A prompt, or the text of its ids."""
    return prompt if isinstance(prompt, str) else get_tokenizer().detokenize(prompt)


def _continuation(prompt: list[int], answer: list[int]) -> str:
    """The text that an answer adds: many tokenizers write a token otherwise where a text begins."""
    tokenizer = get_tokenizer()
    before, whole = tokenizer.detokenize(prompt), tokenizer.detokenize([*prompt, *answer])
    return whole[len(before) :] if whole.startswith(before) else tokenizer.detokenize(answer)


def _prompts(prompt: Any) -> list[str] | list[list[int]]:
    """A text, texts, ids or lists of ids."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(each, str) for each in prompt):
            return prompt
        rows = prompt if isinstance(prompt[0], list) else [prompt]
        if all(isinstance(row, list) and row and all(type(each) is int for each in row) for row in rows):
            return rows
    raise RequestError(
        "prompt must be a text, a list of texts, a list of ids, or a list of lists of ids", 400
    )


def _integer(given: dict[str, Any], name: str, default: int | None) -> int:
    value = given.get(name, default)
    _require(type(value) is int, f"{name} must be an integer")
    return value  # type: ignore[return-value]


def _number(given: dict[str, Any], name: str, default: float) -> float:
    value = given.get(name, default)
    _require(type(value) in (int, float), f"{name} must be a number")
    return float(value)


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise RequestError(text, 400)
