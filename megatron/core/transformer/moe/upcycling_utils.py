"""A dense model's weights as the start of a mixture of experts: every expert begins as a copy of the MLP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_SEQUENTIAL = ".mlp.experts.local_experts."


def upcycle_state_dict(
    moe_model: Sequence[torch.nn.Module], dense_model: Sequence[torch.nn.Module]
) -> dict[str, dict[str, Tensor]]:
    """State dicts for the MoE model's chunks, {"model": ..} or {"model0": .., "model1": ..}.

    What both models have is taken from the dense one, experts from its MLP (arXiv:2212.05055); routers keep
    their own initial weights. ValueError for a weight that neither gives.
    """
    result = {}
    for index, (moe, dense) in enumerate(zip(moe_model, dense_model)):
        key = "model" if len(moe_model) == 1 else f"model{index}"
        source = dense.state_dict()
        result[key] = {name: _upcycled(name, value, source) for name, value in moe.state_dict().items()}
    return result


def _upcycled(name: str, value: Any, dense: dict[str, Any]) -> Any:
    if name in dense:
        return dense[name]
    if ".mlp.router." in name or name.endswith("_extra_state"):
        return value
    if _SEQUENTIAL in name:
        layer, rest = name.split(_SEQUENTIAL)
        return dense[f"{layer}.mlp.{rest.split('.', 1)[1]}"]
    for own, part in ((".mlp.experts.weight1", "linear_fc1"), (".mlp.experts.weight2", "linear_fc2")):
        if name.endswith(own):
            transposed = dense[f"{name.removesuffix(own)}.mlp.{part}.weight"].t()
            experts = value.numel() // transposed.numel()
            return transposed.expand(experts, -1, -1).reshape(value.shape)
    raise ValueError(
        f"{name}: the dense model has no weight to start it from; the two models differ in more than their MLPs"
    )


def load_and_upcycle_model(
    load_dense_ckpt_func: Callable[..., tuple[int, float]],
    moe_model: Sequence[torch.nn.Module],
    dense_model: Sequence[torch.nn.Module],
    strict: bool = True,
    load_args: Sequence[Any] = (),
    load_kwargs: dict[str, Any] | None = None,
) -> tuple[int, float]:
    """Load the dense checkpoint (by the given function) and its weights into the MoE model -> what the
    function returned.
    """
    iteration, flops = load_dense_ckpt_func(*load_args, **(load_kwargs or {}))
    states = upcycle_state_dict(moe_model, dense_model)
    for chunk, state in zip(moe_model, states.values()):
        chunk.load_state_dict(state, strict=strict)
    return iteration, flops
