"""`POST /completions`: what is accepted, what the model is asked, and what its answer becomes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron.inference import completions, text_generation_server
from megatron.inference.text_generation.api import ScoredPrompt
from megatron.training.tokenizer.null import _NullTokenizer

TOKENIZER = _NullTokenizer(60)


class Calls:
    """Stands in for a model that counts upwards, and for one that scores."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Any] = []
        monkeypatch.setattr(completions, "generate_and_post_process", self.generate)
        monkeypatch.setattr(completions, "score_prompts", self.score)
        monkeypatch.setattr(completions, "get_tokenizer", lambda: TOKENIZER)

    def generate(self, model: Any, prompts: list[list[int]], tokens_to_generate: int, **options: Any) -> Any:
        self.made.append(options)
        length = max(map(len, prompts)) + tokens_to_generate
        rows = [prompt + list(range(30, 30 + length - len(prompt))) for prompt in prompts]
        # The last row ends its document at its second new token.
        rows[-1][len(prompts[-1]) + 1 :] = [TOKENIZER.eod] * (length - len(prompts[-1]) - 1)
        lengths = [length] * (len(rows) - 1) + [len(prompts[-1]) + 2]
        return None, [[""] * each for each in lengths], None, rows

    def score(self, model: Any, prompts: list[list[int]], top_n: int) -> list[ScoredPrompt]:
        self.made.append(top_n)
        return [
            ScoredPrompt(
                row,
                [-float(token) for token in row[1:]],
                [{token: -0.5, 7: -1.0} for token in row[1:]] if top_n else [],
            )
            for row in prompts
        ]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def post(**fields: Any) -> tuple[int, Any]:
    browser = text_generation_server.MegatronServer(torch.nn.Identity()).app.test_client()
    response = browser.post("/completions", json=fields)
    return response.status_code, response.get_json()


def texts(**fields: Any) -> list[str]:
    status, body = post(**fields)
    assert status == 200, body
    assert [choice["index"] for choice in body["choices"]] == list(range(len(body["choices"])))
    return [choice["text"] for choice in body["choices"]]


def test_answers_are_cut_where_they_end(calls: Calls) -> None:
    prompts = ["5 6 7", "1", "2 3"]
    assert texts(prompt=prompts, max_tokens=3) == [" 30 31 32", " 30 31 32", " 30"]
    assert texts(prompt=prompts, max_tokens=3, echo=True) == ["5 6 7 30 31 32", "1 30 31 32", "2 3 30"]
    assert texts(prompt=prompts, max_tokens=3, stop=["32", " 31"]) == [" 30", " 30", " 30"]
    assert texts(prompt=[[5, 6, 7], [1]], max_tokens=1, echo=True) == ["5 6 7 30", "1 30"]
    # Forms of one prompt; its row is the last.
    assert texts(prompt="5 6", max_tokens=3) == texts(prompt=[5, 6], max_tokens=3) == [" 30"]
    assert texts(prompt="5 6", max_tokens=3, stop="3", stream=None, model="any", n=1, best_of=1) == [" "]


def test_how_tokens_are_drawn(calls: Calls) -> None:
    def asked(**fields: Any) -> tuple[int, float, float, int]:
        texts(prompt="5", max_tokens=2, **fields)
        last = calls.made[-1]
        return last["top_k_sampling"], last["top_p_sampling"], last["temperature"], last["random_seed"]

    assert asked() == (0, 0.0, 1.0, -1)
    assert asked(temperature=0) == asked(top_p=0, temperature=3) == (1, 0.0, 1.0, -1)
    assert asked(top_p=0.5, temperature=2, seed=4) == (0, 0.5, 2.0, 4)


def test_scores_are_what_harnesses_read(calls: Calls) -> None:
    status, body = post(prompt=["5 16 7", "3"], max_tokens=0, echo=True, logprobs=2)
    assert status == 200 and calls.made == [2]
    assert body["choices"] == [
        {
            "index": 0,
            "text": "5 16 7",
            "logprobs": {
                "token_logprobs": [None, -16.0, -7.0],
                "tokens": ["5 ", "16 ", "7"],
                "text_offset": [0, 2, 5],
                "top_logprobs": [None, {"16": -0.5, "7": -1.0}, {"7": -1.0}],
            },
        },
        {
            "index": 1,
            "text": "3",
            "logprobs": {
                "token_logprobs": [None], "tokens": ["3"], "text_offset": [0], "top_logprobs": [None],
            },
        },
    ]  # fmt: skip
    _, body = post(prompt=[[5, 6]], max_tokens=0, echo=True)
    assert body["choices"][0]["text"] == "5 6" and body["choices"][0]["logprobs"]["top_logprobs"] is None


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"max_tokens": None}, "max_tokens must be an integer"),
        ({"max_tokens": 0}, "without echo"),
        ({"max_tokens": -1}, "negative"),
        ({"best_of": 2}, "best_of must be 1"),
        ({"n": 2}, "n must be 1"),
        ({"logprobs": 1}, "they need max_tokens 0"),
        ({"logprobs": 11, "max_tokens": 0, "echo": True}, "between 0 and 10"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"top_p": 1.5}, "top_p"),
        ({"echo": 1}, "echo"),
        ({"stop": 3}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"prompt": None}, "prompt must be"),
        ({"prompt": []}, "prompt must be"),
        ({"prompt": ["5", 6]}, "prompt must be"),
        ({"prompt": [[5], []]}, "prompt must be"),
        ({"prompt": "hello"}, "'hello' is not a list of ids"),
    ],
    ids=str,
)
def test_what_is_refused(changed: dict[str, Any], reason: str, calls: Calls) -> None:
    status, body = post(**{"prompt": "5", "max_tokens": 2, **changed})
    assert status == 400 and reason in body["message"] and calls.made == []


def test_other_bodies_are_refused(calls: Calls) -> None:
    browser = text_generation_server.MegatronServer(torch.nn.Identity()).app.test_client()
    assert browser.post("/completions", json=["prompt"]).status_code == 400
    assert browser.post("/completions", data="{", content_type="application/json").status_code == 400
    assert browser.put("/completions", json={}).status_code == 405
