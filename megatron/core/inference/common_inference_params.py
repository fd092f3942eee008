"""How tokens are drawn, and how many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class CommonInferenceParams:
    """What a request asks for, whatever the model.

    At most one of top_k (1 is greedy) and top_p filters what is drawn from; neither draws from the whole distribution.
    return_segments: also the text token by token. top_n_logprobs: also, for every step, this many of the most probable
    tokens and their log-probabilities before temperature and filters.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0
    return_log_probs: bool = False
    num_tokens_to_generate: int = 30
    return_segments: bool = False
    top_n_logprobs: int = 0

    def add_attributes(self, attribute_value_pair: dict[str, Any]) -> None:
        """Set further attributes, for wrappers and controllers of one's own."""
        for name, value in attribute_value_pair.items():
            setattr(self, name, value)
