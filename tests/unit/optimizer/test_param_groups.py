"""Parameter groups against v0.9's recorded ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron.core.optimizer.param_groups import get_param_groups

CASES = json.loads((Path(__file__).parents[2] / "golden/training/param_groups.json").read_text())["cases"]


class _Named:
    """Something with named parameters: dotted names, without building the modules."""

    def __init__(self, recorded):
        self.params = []
        for name, shape, attributes in recorded:
            param = torch.nn.Parameter(
                torch.zeros(shape), requires_grad=attributes.pop("requires_grad", True)
            )
            for attribute, value in attributes.items():
                setattr(param, attribute, value)
            self.params.append((name, param))

    def named_parameters(self):
        return iter(self.params)


CONDITIONS = {
    None: None,
    "name contains 'embedding'": lambda name, param: "embedding" in name,
    "name contains 'head'": lambda name, param: "head" in name,
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_groups_are_v09s(case):
    model = _Named(case["params"])
    args = dict(case["args"])
    for condition in ("no_weight_decay_cond", "scale_lr_cond"):
        args[condition] = CONDITIONS[args[condition]]
    name_of = {param: name for name, param in model.params}
    groups = get_param_groups([model], **args)
    ours = [{**group, "params": [name_of[param] for param in group["params"]]} for group in groups]
    assert ours == case["groups"]
