"""Weights of experts, which v0.9 stores in three forms, from the form of a file to the form of a model.

Under `….mlp.experts.` an MLP per expert has `local_experts.{j}.linear_fc1.weight` [out, in], Transformer Engine's grouped
layers have `linear_fc1.weight{j}` [out, in], and other grouped experts one `weight1` [h, e*f] for all of a rank, which is
[e, in, out] in memory. Sizes are those of one rank; j counts its own experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor

#: Where a model keeps experts: one by one, or together.
_PLACE = re.compile(
    r"(.*\.mlp\.experts\.)(?:local_experts\.(?P<expert>\d+)\.(?P<leaf>linear_fc[12]\.(?:weight|bias))|weight(?P<number>[12]))"
)
#: Of matrices that stand together: the name, and the axis that is the model's width.
_TOGETHER = {"linear_fc1.weight": ("weight1", 0), "linear_fc2.weight": ("weight2", 1)}


def expert_tensors(
    weights: dict[str, Any], prefix: str, leaf: str, experts: int
) -> tuple[list[str], list[Tensor]]:
    """(names read from `weights`, each expert's tensor called `leaf` [out, in]); both are empty if there is none.

    `experts`: how many there are, which does not show where all stand in one tensor.
    """
    for form in (f"{prefix}local_experts.{{}}.{leaf}", f"{prefix}{leaf}{{}}"):
        if names := list(takewhile(weights.__contains__, map(form.format, count()))):
            return names, [weights[name] for name in names]
    own, width = _TOGETHER.get(leaf, ("", 0))
    matrix = weights.get(prefix + own)
    if matrix is None or not experts or matrix.shape[1 - width] % experts:
        return [], []
    shape = (experts, matrix.shape[0], -1) if width == 0 else (experts, -1, matrix.shape[1])
    return [prefix + own], list(matrix.view(shape).transpose(1, 2))


def rearranged_experts(weights: dict[str, Any], wanted: Iterable[str]) -> dict[str, Any]:
    """`weights` with the experts in the form of a model whose state-dict keys are `wanted`.

    The same dictionary if they are in that form already; what cannot be made is left for the model to report.
    """
    asked: dict[tuple[str, str], list[tuple[str, int | None]]] = {}
    for name in wanted:
        if name not in weights and (place := _PLACE.fullmatch(name)):
            leaf = place["leaf"] or f"linear_fc{place['number']}.weight"
            expert = place["expert"] and int(place["expert"])
            asked.setdefault((place[1], leaf), []).append((name, expert))
    made: dict[str, Tensor] = {}
    read: set[str] = set()
    for (prefix, leaf), places in asked.items():
        names, tensors = expert_tensors(weights, prefix, leaf, len(places))
        for name, expert in places:
            if expert is None and tensors:
                together = torch.stack(tensors).transpose(1, 2)  # [e, in, out]
                shape = (together.shape[1], -1) if leaf == "linear_fc1.weight" else (-1, together.shape[2])
                made[name] = together.reshape(shape)
            elif expert is not None and expert < len(tensors):
                made[name] = tensors[expert]
        if places[0][0] in made:
            read.update(names)
    if not made:
        return weights
    return {**{name: value for name, value in weights.items() if name not in read}, **made}
