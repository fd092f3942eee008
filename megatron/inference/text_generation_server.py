"""A model behind HTTP: `PUT /api` and `POST /completions` on global rank 0 (spec: inference, sections 13, 14 and 18).

Flask parses and answers the requests; it is the optional extra `serve`, imported where it is used.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron.core.errors import FlagError
from megatron.inference.completions import MegatronCompletions
from megatron.inference.rest_request import RequestError, RestRequest
from megatron.inference.text_generation import beam_search_and_post_process, generate_and_post_process
from megatron.inference.turns import Closed, Task, Turns, announce

#: Longer requests are refused before they are read into memory.
MAX_BODY_BYTES = 64 * 2**20
#: Backends end a rank that waits for minutes without a word.
_KEEP_AWAKE_SECONDS = 15.0


class MegatronGenerate:
    """Answers the requests for one model."""

    def __init__(
        self, model: torch.nn.Module, turns: Turns | None = None, *, strict_http_status: bool = False
    ) -> None:
        self.model = model
        self.turns = turns or Turns()
        self.strict_http_status = strict_http_status

    @staticmethod
    def send_do_generate() -> None:
        """Have the other ranks take part in `generate_and_post_process`."""
        announce(Task.GENERATE)

    @staticmethod
    def send_do_beam_search() -> None:
        """Have the other ranks take part in `beam_search_and_post_process`."""
        announce(Task.BEAM)

    def put(self) -> Any:
        """The answer to the current request."""
        from flask import jsonify, request

        body = request.get_json()
        try:
            wanted = RestRequest.of(body)
            if not wanted.no_log:
                _log(f"request IP: {request.remote_addr}", json.dumps(body), f"start time: {_now()}")
            answer = self._answer(wanted)
        except RequestError as refusal:
            return jsonify(refusal.text), self._status(refusal.status)
        except ValueError as refusal:
            return jsonify(str(refusal)), self._status(200)
        if not wanted.no_log:
            _log(f"end time: {_now()}")
        return jsonify(answer)

    def _status(self, of_v09: int) -> int:
        return 400 if self.strict_http_status else of_v09

    def _answer(self, wanted: RestRequest) -> dict[str, Any]:
        with self.turns.take():
            if wanted.beam_width is None:
                return self._generate(wanted)
            return self._search(wanted, wanted.beam_width)

    def _generate(self, wanted: RestRequest) -> dict[str, Any]:
        self.send_do_generate()
        result: Any = generate_and_post_process(
            self.model,
            prompts=wanted.prompts,
            tokens_to_generate=wanted.tokens_to_generate,
            return_output_log_probs=wanted.logprobs,
            top_k_sampling=wanted.top_k,
            top_p_sampling=wanted.top_p,
            top_p_decay=wanted.top_p_decay,
            top_p_bound=wanted.top_p_bound,
            temperature=wanted.temperature,
            add_BOS=wanted.add_BOS,
            use_eod_token_for_early_termination=True,
            stop_on_double_eol=wanted.stop_on_double_eol,
            stop_on_eol=wanted.stop_on_eol,
            prevent_newline_after_colon=wanted.prevent_newline_after_colon,
            random_seed=wanted.random_seed,
        )
        text, segments, logprobs, _ = result
        return {"text": text, "segments": segments, "logprobs": logprobs}

    def _search(self, wanted: RestRequest, beam_width: int) -> dict[str, Any]:
        # v0.9 has no such field, and neither has a replacement of its function.
        more: dict[str, Any] = {"strip_padding": True} if wanted.strip_padding else {}
        self.send_do_beam_search()
        result: Any = beam_search_and_post_process(
            self.model,
            prompts=wanted.prompts,
            tokens_to_generate=wanted.tokens_to_generate,
            beam_size=beam_width,
            add_BOS=wanted.add_BOS,
            stop_token=wanted.stop_token,
            num_return_gen=beam_width,
            length_penalty=wanted.length_penalty,
            prevent_newline_after_colon=wanted.prevent_newline_after_colon,
            **more,
        )
        text, segments, scores = result
        return {"text": text, "segments": segments, "scores": scores}


class MegatronServer:
    """The HTTP side: `app` is a Flask application with the API and the page `/index.html`.

    strict_http_status: refusals have the status 400 instead of v0.9's, which is 200 for most.
    """

    def __init__(self, model: torch.nn.Module, *, strict_http_status: bool = False) -> None:
        require_http_packages()
        from flask import Flask

        self.turns = Turns()
        generate = MegatronGenerate(model, self.turns, strict_http_status=strict_http_status)
        self.app = Flask(__name__, static_url_path="")
        self.app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES
        self.app.add_url_rule("/api", "api", generate.put, methods=["PUT"])
        completions = MegatronCompletions(model, self.turns)
        self.app.add_url_rule("/completions", "completions", completions.post, methods=["POST"])
        for status in (400, 413, 415):
            self.app.register_error_handler(status, _in_json)
        self.app.register_error_handler(Closed, lambda _: ({"message": "the server is ending"}, 503))

    def run(self, url: str, port: int) -> None:
        """Serve on this address until SIGINT or SIGTERM, then release the other ranks. To be called from the main thread.

        FlagError if the port cannot be had; RuntimeError once the ranks are out of step.
        """
        try:
            http = _listen(url, port, self.app)
        except FlagError:
            announce(Task.END)
            raise
        serving = threading.Thread(target=http.serve_forever, name="http", daemon=True)
        with _signals_set(self.turns.closed):
            serving.start()
            where = f"http://{url}:{http.server_port} (PUT /api, POST /completions, GET /index.html)"
            print(f"> process {os.getpid()} serves on {where}; SIGINT or SIGTERM ends all ranks", flush=True)
            self.turns.wait_until_closed(_KEEP_AWAKE_SECONDS)
            http.shutdown()
            serving.join()
            self.turns.end()
        print("> the server has ended", flush=True)


def require_http_packages() -> None:
    """FlagError where the packages that serve HTTP are missing."""
    if importlib.util.find_spec("flask") is None:
        raise FlagError(
            "the text generation server",
            "the package flask is not installed",
            'pip install flask, or install this project with the extra "serve"',
        )


def _listen(url: str, port: int, app: Any) -> Any:
    """A threaded HTTP server that is bound to its port."""
    from werkzeug.serving import make_server

    try:
        return make_server(url, port, app, threaded=True)
    except (
        OSError,
        OverflowError,
        SystemExit,
    ) as error:  # it exits, after a line of its own, where a port is taken
        reason = error if isinstance(error, (OSError, OverflowError)) else "another program has it"
        raise FlagError(
            f"--port {port}", f"it cannot be listened on: {reason}", "choose another one"
        ) from error


@contextmanager
def _signals_set(event: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set `event` inside the block."""
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    for each in before:
        signal.signal(each, lambda *_: event.set())
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _in_json(error: Any) -> tuple[dict[str, str], int]:
    return {"message": error.description}, error.code


def _now() -> str:
    return f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}"


def _log(*lines: str) -> None:
    print("\n".join(lines), flush=True)
