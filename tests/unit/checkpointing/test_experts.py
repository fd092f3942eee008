"""Weights of experts in the three forms that v0.9 stores them in, against its recorded files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron.core.errors import CheckpointError
from megatron.training.checkpointing.experts import rearranged_experts
from tests.unit.checkpointing.toy import Run, Toy, arguments, one_process, same
from tests.unit.models import recorded

FORMS = ("one by one", "together", "Transformer Engine's")


@pytest.fixture(autouse=True)
def process() -> Iterator[None]:
    with one_process():
        yield


def stored(form: str) -> dict[str, Tensor]:
    """The recorded model's weights in a form; the third differs from the first in names alone."""
    weights = recorded.weights("moe", "grouped" if form == "together" else "tp1pp1")
    tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    if form != "Transformer Engine's":
        return tensors
    return {
        re.sub(r"local_experts\.(\d+)\.(.*\.weight)", r"\2\1", name): value for name, value in tensors.items()
    }


@pytest.mark.parametrize("wanted", FORMS[:2])
@pytest.mark.parametrize("form", FORMS)
def test_any_form_becomes_the_one_that_a_model_has(form: str, wanted: str) -> None:
    weights, expected = stored(form), stored(wanted)
    found = rearranged_experts(weights, expected)
    assert (found is weights) == (form == wanted)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("layer", ["linear_fc1", "linear_fc2"])
def test_what_does_not_fit_is_left_for_the_model_to_report(layer: str) -> None:
    """Two experts of a file are no four of a model, three of a model do not share the file's 4 x 64 columns."""
    weights = stored("one by one")
    prefix = "decoder.layers.1.mlp.experts."
    two = {name: v for name, v in weights.items() if not re.search(r"local_experts\.[23]", name)}
    assert rearranged_experts(two, weights) is two
    three = [f"{prefix}local_experts.{j}.{layer}.weight" for j in range(3)]
    assert not set(three) & rearranged_experts(stored("together"), three).keys()


class ToyExperts(Toy):
    """The toy's two matrices as those of one expert, alone or in the form of several."""

    def __init__(self, grouped: bool) -> None:
        super().__init__()
        self.grouped = grouped

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:  # type: ignore[override]
        weights = super().state_dict()
        prefix, number = (
            "decoder.layers.0.mlp.experts.",
            "weight" if self.grouped else "local_experts.0.linear_fc",
        )
        for index, name in enumerate(("first.weight", "second.weight"), start=1):
            value = weights.pop(name)
            place = f"{prefix}{number}{index}" + ("" if self.grouped else ".weight")
            weights[place] = value.T.contiguous() if self.grouped else value
        return weights

    def load_state_dict(
        self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False
    ) -> None:  # type: ignore[override]
        assert state_dict.keys() == self.state_dict().keys(), "another form"
        for index, layer in enumerate((self.first, self.second), start=1):
            (value,) = (
                v for name, v in state_dict.items() if re.search(rf"(fc|experts\.weight){index}", name)
            )
            layer.weight.data.copy_(value.T if self.grouped else value)


@pytest.mark.parametrize("grouped", [False, True])
def test_an_optimizer_of_the_other_form_is_refused(tmp_path: Path, grouped: bool) -> None:
    """Its state has as many numbers in another order, which no shape shows."""
    run = Run(arguments(tmp_path))
    run.model.__class__, run.model.grouped = ToyExperts, grouped
    run.step()
    run.save()
    other = Run(arguments(tmp_path))
    other.model.__class__, other.model.grouped = ToyExperts, not grouped
    with pytest.raises(
        CheckpointError, match=r"experts in another form \(--moe-grouped-gemm\).*--no-load-optim"
    ):
        other.load()
    other.args.no_load_optim = True
    assert other.load() == 1
    assert same(other.weights()[::2], run.weights()[::2]) and not other.optimizer.state
