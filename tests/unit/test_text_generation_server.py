"""The REST interface against recorded exchanges, with calls in place of a model; and the client of the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron.core.errors import FlagError
from megatron.inference import text_generation_server as server

RECORDED = json.loads((Path(__file__).parents[1] / "golden/inference/rest_requests.json").read_text())
#: Their bodies are the framework's.
STATUS_ONLY = {404, 405, 415}


class Calls:
    """Stands in for generation: notes how it was called and answers as the recorded engine did."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Any] = []
        monkeypatch.setattr(server, "generate_and_post_process", self.generate)
        monkeypatch.setattr(server, "beam_search_and_post_process", self.search)

    def generate(self, model: Any, **options: Any) -> Any:
        self.made += ["generate", options]
        if options["tokens_to_generate"] == 999:
            raise ValueError("some limit message")
        return ["T"], [["T"]], [[-1.5]] if options["return_output_log_probs"] else None, [[1]]

    def search(self, model: Any, **options: Any) -> Any:
        self.made += ["beam", options]
        return ["A", "B"], [["A"], ["B"]], [-0.5, -1.5]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def client(**options: Any) -> Any:
    return server.MegatronServer(torch.nn.Identity(), **options).app.test_client()


@pytest.mark.parametrize("exchange", RECORDED, ids=range(len(RECORDED)))
def test_exchanges_are_the_recorded_ones(exchange: dict[str, Any], calls: Calls) -> None:
    options = {"data": exchange["body"], "content_type": exchange["content_type"]}
    response = client().open("/api", method=exchange["method"], **options)
    assert response.status_code == exchange["status"] and calls.made == exchange["engine_calls"]
    if exchange["status"] not in STATUS_ONLY and exchange["body"] != "not json":
        assert response.get_json() == exchange["response"]
    # A refusal that has the status of success gets 400 where that is wanted; answers stay what they are.
    strict = client(strict_http_status=True).open("/api", method=exchange["method"], **options)
    refused = exchange["status"] == 200 and isinstance(exchange["response"], str)
    assert strict.status_code == (400 if refused else exchange["status"])
    assert strict.data == response.data


def test_other_requests(calls: Calls) -> None:
    browser = client()
    assert [browser.get(path).status_code for path in ("/api", "/", "/index.html")] == [404, 404, 200]
    assert (
        browser.get("/index.html").data == (Path(server.__file__).parent / "static/index.html").read_bytes()
    )
    accepted = {"prompts": ["x"], "unknown": 1, "tokens_to_generate": True}
    exact = {"content_type": "application/json; charset=UTF-8"}
    assert browser.put("/api", data=json.dumps(accepted), **exact).get_json()["text"] == ["T"]
    for body, status in (
        ({"prompts": [1]}, 500), ({"prompts": [["x"]]}, 500), (["prompts"], 400), ("prompts", 400), (5, 400),
        ({"prompts": ["x"], "top_p_bound": 0.1}, 200), ({"prompts": ["x"], "temperature": True}, 200),
        ({"prompts": ["x"], "top_k": True}, 200), ({"prompts": ["x"], "temperature": float("nan")}, 200),
    ):  # fmt: skip
        response = browser.put("/api", json=body)
        assert (response.status_code, type(response.get_json())) == (status, str), body
    assert len(calls.made) == 2  # none of these came as far
    browser.put("/api", json={"prompts": ["x"], "beam_width": 2, "strip_padding": True})
    assert calls.made[-1]["strip_padding"] is True


def test_no_log_leaves_no_trace(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    browser = client()
    browser.put("/api", json={"prompts": ["secret"], "no_log": True})
    assert capsys.readouterr().out == ""
    browser.put("/api", json={"prompts": ["x"]})
    address, body, start, end = capsys.readouterr().out.splitlines()
    assert address == "request IP: 127.0.0.1" and json.loads(body) == {"prompts": ["x"]}
    assert start.startswith("start time: ") and end.startswith("end time: ")


def test_missing_package_is_named() -> None:
    with mock.patch("importlib.util.find_spec", return_value=None), pytest.raises(FlagError) as refused:
        server.MegatronServer(torch.nn.Identity())
    assert "flask" in str(refused.value) and '"serve"' in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_a_taken_port_is_named() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(FlagError, match=f"--port {port}: it cannot be listened on"):
            server.MegatronServer(torch.nn.Identity()).run("127.0.0.1", port)


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (200, {"text": ["a b"]}, "Megatron Response: \na b"),
        (200, "not like this", "Error 200: not like this"),
        (400, "prompts is empty", "Error 400: prompts is empty"),
        (415, {"message": "no JSON"}, "Error 415: no JSON"),
        (500, None, "Error 500: the answer is not JSON"),
    ],
)
def test_client_prints_answers_of_any_form(
    status: int, body: Any, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tools import text_generation_cli as cli

    typed = iter(["hello", "many", "3"])

    def read(question: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    sent: list[Any] = []

    def put(url: str, request: dict[str, Any]) -> tuple[int, Any]:
        sent.append((url, request))
        return status, cli.NOT_JSON if body is None else body

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(cli, "put", put)
    cli.main(["localhost:5000"])
    assert sent == [("http://localhost:5000/api", {"prompts": ["hello"], "tokens_to_generate": 3})]
    printed = capsys.readouterr().out
    assert "'many' is not a number" in printed and expected in printed
