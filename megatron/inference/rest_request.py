"""What a client may ask of the server, and how it is told that it may not (spec: inference, section 14).

The texts and their order are v0.9's: clients compare them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MAX_PROMPTS = 128
MAX_TEMPERATURE = 100.0
MAX_TOP_K = 1000


class RequestError(ValueError):
    """A request that is refused: the text for the client, and the status under which v0.9 sends it.

    Most refusals of v0.9 have the status of success.
    """

    def __init__(self, text: str, status: int = 200) -> None:
        super().__init__(text)
        self.text, self.status = text, status


@dataclass(frozen=True)
class RestRequest:
    """The fields of a request, checked. A `beam_width` selects beam search, which has no use for what is about drawing.

    `strip_padding` is not in v0.9: beams that ended early are not filled up with end-of-document tokens.
    """

    prompts: list[str]
    tokens_to_generate: int = 64
    logprobs: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0
    top_p_decay: float = 0.0
    top_p_bound: float = 0.0
    add_BOS: bool = False
    stop_on_double_eol: bool = False
    stop_on_eol: bool = False
    prevent_newline_after_colon: bool = False
    random_seed: int = -1
    no_log: bool = False
    beam_width: int | None = None
    stop_token: int = 50256
    length_penalty: float = 1
    strip_padding: bool = False

    @classmethod
    def of(cls, body: Any) -> RestRequest:
        """The request in a decoded JSON body; RequestError for the first thing that is wrong with it."""
        if not isinstance(body, dict):
            raise RequestError("prompts argument required", 400)
        _check_prompts(body)
        given = {name: body[name] for name in cls.__dataclass_fields__ if name in body}
        request = cls(**given)
        request._check_amount()
        request._check_drawing(given)
        request._check_switches()
        request._check_beams(given)
        return request

    def _check_amount(self) -> None:
        _require(
            isinstance(self.tokens_to_generate, int), "tokens_to_generate must be an integer greater than 0"
        )
        _require(
            self.tokens_to_generate >= 0,
            "tokens_to_generate must be an integer greater than or equal to 0",
        )
        _require_bool(self, "logprobs")
        _require(
            self.tokens_to_generate != 0 or self.logprobs,
            "tokens_to_generate=0 implies logprobs should be True",
        )

    def _check_drawing(self, given: dict[str, Any]) -> None:
        _require(
            type(self.temperature) in (int, float) and 0.0 < self.temperature <= MAX_TEMPERATURE,
            f"temperature must be a positive number less than or equal to {MAX_TEMPERATURE}",
        )
        in_range = f"equal to or greater than 0 and less than or equal to {MAX_TOP_K}"
        _require(type(self.top_k) is int, f"top_k must be an integer {in_range}")
        _require(0 <= self.top_k <= MAX_TOP_K, f"top_k must be {in_range}")
        _require(type(self.top_p) is float, "top_p must be a positive float less than or equal to 1.0")
        _require(not (self.top_p > 0.0 and self.top_k > 0), "cannot set both top-k and top-p samplings.")
        _require(0.0 <= self.top_p <= 1.0, "top_p must be less than or equal to 1.0")
        if "top_p_decay" in given:
            _require(
                type(self.top_p_decay) is float,
                "top_p_decay must be a positive float less than or equal to 1.0",
            )
            _require(self.top_p != 0.0, "top_p_decay cannot be set without top_p")
            _require(0.0 <= self.top_p_decay <= 1.0, "top_p_decay must be less than or equal to 1.0")
        if "top_p_bound" in given:
            _require(
                type(self.top_p_bound) is float,
                "top_p_bound must be a positive float less than or equal to top_p",
            )
            _require(self.top_p != 0.0, "top_p_bound cannot be set without top_p")
            _require(
                0.0 < self.top_p_bound <= self.top_p,
                "top_p_bound must be greater than 0 and less than top_p",
            )

    def _check_switches(self) -> None:
        _require_bool(self, "add_BOS")
        if not all(isinstance(prompt, str) for prompt in self.prompts):
            raise RequestError("prompts is not a list of strings", 500)
        _require(self.add_BOS or all(self.prompts), "Empty prompts require add_BOS=true")
        for name in ("stop_on_double_eol", "stop_on_eol", "prevent_newline_after_colon"):
            _require_bool(self, name)

    def _check_beams(self, given: dict[str, Any]) -> None:
        if "random_seed" in given:
            _require(isinstance(self.random_seed, int), "random_seed must be integer")
            _require(self.random_seed >= 0, "random_seed must be a positive integer")
        _require_bool(self, "no_log")
        if "beam_width" in given:
            _require(isinstance(self.beam_width, int), "beam_width must be integer")
            _require(
                self.beam_width is not None and self.beam_width >= 1, "beam_width must be an integer > 1"
            )
            _require(len(self.prompts) == 1, "When doing beam_search, batch size must be 1")
        _require(isinstance(self.stop_token, int), "stop_token must be an integer")
        if "length_penalty" in given:
            _require(isinstance(self.length_penalty, float), "length_penalty must be a float")
        _require_bool(self, "strip_padding")


def _check_prompts(body: dict[str, Any]) -> None:
    """What v0.9 refuses with a status of its own."""
    for holds, text in (
        ("prompts" in body, "prompts argument required"),
        ("max_len" not in body, "max_len is no longer used.  Replace with tokens_to_generate"),
        ("sentences" not in body, "sentences is no longer used.  Replace with prompts"),
    ):
        if not holds:
            raise RequestError(text, 400)
    prompts = body["prompts"]
    if not isinstance(prompts, list):
        raise RequestError("prompts is not a list of strings", 400)
    if not prompts:
        raise RequestError("prompts is empty", 400)
    if len(prompts) > MAX_PROMPTS:
        raise RequestError(f"Maximum number of prompts is {MAX_PROMPTS}", 400)


def _require(holds: bool, text: str) -> None:
    if not holds:
        raise RequestError(text)


def _require_bool(request: RestRequest, name: str) -> None:
    _require(isinstance(getattr(request, name), bool), f"{name} must be a boolean value")
