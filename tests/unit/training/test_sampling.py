"""Drawing tokens: the filters against recordings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.inference.text_generation import sampling

FILTERS = json.loads((Path(__file__).parents[2] / "golden/inference/filters.json").read_text())


@pytest.mark.parametrize("case", FILTERS, ids=range(len(FILTERS)))
def test_filters_keep_what_the_recording_kept(case: dict[str, Any]) -> None:
    for k, kept in case["top_k"].items():
        logits = torch.tensor(case["logits"])
        sampling.modify_logits_for_top_k_filtering(logits, int(k))
        assert logits.isfinite().tolist() == kept
    for p, kept in case["top_p"].items():
        logits = torch.tensor(case["logits"])
        sampling.modify_logits_for_top_p_filtering(logits, float(p))
        assert logits.isfinite().tolist() == kept


def test_sample_is_greedy_for_one_and_never_draws_padding() -> None:
    logits = torch.tensor([[0.0, 1.0, 5.0], [3.0, 1.0, 2.0]])
    assert sampling.sample(logits, top_k=1).tolist() == [2, 0]
    assert sampling.sample(logits, top_k=1, vocab_size=2).tolist() == [1, 0]
    assert sampling.sample(logits.repeat(50, 1), vocab_size=2).unique().tolist() == [0, 1]
    # As cold as floats get: the most probable, and no division by what is almost nothing.
    assert sampling.sample(logits, temperature=1e-300).tolist() == [2, 0]
    with pytest.raises(ValueError, match="exclude"):
        sampling.sample(logits, top_k=2, top_p=0.5)
    with pytest.raises(ValueError, match=r"temperature: .* is not above 0"):
        sampling.sample(logits, temperature=0.0)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"top_k": 2, "top_p": 0.4}, "exclude"),
        ({"top_p": 1.4}, "is not a probability"),
        ({"top_k": 110}, "not below"),
    ],
)
def test_parameters_are_judged_before_logits_are_looked_at(parameters: dict[str, Any], words: str) -> None:
    """As v0.9 asserts: whoever checks parameters need not have logits."""
    with pytest.raises(AssertionError, match=words):
        sampling.sample(None, **parameters, vocab_size=100)  # type: ignore[arg-type]
