"""Which layer is of which kind, against v0.9's recorded patterns; log lines; what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from megatron.core.errors import MegatronError
from megatron.core.ssm.mamba_hybrid_layer_allocation import Symbols, allocate_layers

RECORDED = json.loads(
    (Path(__file__).resolve().parents[2] / "golden" / "models" / "mamba_allocation.json").read_text()
)


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: f"{case['layers']} {case['override'] or ''}")
def test_recorded_patterns(case: dict[str, Any]) -> None:
    arguments = (case["layers"], case["attention_ratio"], case["mlp_ratio"], case["override"])
    if "error" in case:
        with pytest.raises(ValueError) as refused:
            allocate_layers(*arguments)
        assert isinstance(refused.value, MegatronError) and "--hybrid-override-pattern" in str(refused.value)
    else:
        assert "".join(allocate_layers(*arguments)) == case["pattern"]


def test_halves_of_a_layer_go_to_the_even_number() -> None:
    counts = [allocate_layers(n, 0.5, 0.0).count(Symbols.ATTENTION) for n in (3, 5, 7, 9)]
    assert counts == [2, 2, 4, 4]


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        ((0, 0.0, 0.0), "--num-layers"),
        ((4, 1.5, 0.0), "--hybrid-attention-ratio"),
        ((4, 0.0, -0.5), "--hybrid-mlp-ratio"),
        ((4, 0.75, 0.5), "--hybrid-mlp-ratio"),
    ],
)
def test_impossible_ratios_are_refused(arguments: tuple[int, float, float], flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        allocate_layers(*arguments)


def test_what_was_chosen_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        allocate_layers(4, 0.0, 0.0)
    assert not caplog.messages
    with caplog.at_level(logging.INFO):
        allocate_layers(8, 0.25, 0.5)
    text = "\n".join(caplog.messages)
    assert "M-*-M*--" in text and "2 attention layers of 8" in text
    assert "Target attention ratio: 0.25. Actual attention ratio: 0.25." in text
    assert "Target MLP ratio: 0.50. Actual MLP ratio: 0.50." in text
    for pattern, words in (("M-*-M*--", "is the pattern"), ("MM**----", "takes the place of M-*-M*--")):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            allocate_layers(8, 0.25, 0.5, pattern)
        assert words in caplog.messages[0] and pattern in caplog.text
