"""Describe optimizer state by the model tensors it belongs to."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
    StateDict,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories


def get_optim_param_to_id_map(optim_params_iter: Iterable[torch.nn.Parameter]) -> dict[int, int]:
    """id(parameter) -> its number in the optimizer, duplicates counted once."""
    numbers: dict[int, int] = {}
    for param in optim_params_iter:
        numbers.setdefault(id(param), len(numbers))
    return numbers


def get_param_id_to_sharded_param_map(
    model_sharded_state_dict: ShardedStateDict, optim_params_iter: Iterable[torch.nn.Parameter]
) -> dict[int, ShardedTensor | ShardedTensorFactory]:
    """Number of each optimizer parameter -> the record that describes it in the model's state dict.

    CheckpointingException if a parameter is not described.
    """
    numbers = get_optim_param_to_id_map(optim_params_iter)
    described, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
    found: dict[int, ShardedTensor | ShardedTensorFactory] = {}
    for record in nested_values(described):
        # What is stored of an fp8 parameter are the values it stands for.
        number = numbers.get(id(getattr(record.data, "stands_for", record.data)))
        if number is not None:
            # A tensor registered under several names is described by the first.
            found.setdefault(number, record)
    missing = len(numbers) - len(found)
    if missing:
        raise CheckpointingException(
            "optimizer state",
            f"{missing} of its {len(numbers)} parameters are not in the model's sharded state dict",
        )
    return found


def make_sharded_optimizer_tensor(
    model_param: ShardedTensor | ShardedTensorFactory, optim_param: torch.Tensor, prefix: str
) -> ShardedTensor | ShardedTensorFactory:
    """The record of `optim_param`, cut like `model_param`, under the key `<prefix>.<model key>`."""
    expected = model_param.local_shape if isinstance(model_param, ShardedTensor) else model_param.data.shape
    if tuple(expected) != tuple(optim_param.shape):
        raise CheckpointingException(
            f"{prefix}.{model_param.key}",
            f"optimizer tensor of shape {tuple(optim_param.shape)} for a parameter of shape {tuple(expected)}",
        )
    changes: dict[str, Any] = {"key": f"{prefix}.{model_param.key}", "data": optim_param}
    if isinstance(model_param, ShardedTensor):
        changes["dtype"] = optim_param.dtype
    record = replace(model_param, **changes)
    record.validate_metadata_integrity()
    return record


def optim_state_to_sharding_state(
    optim_state_dict: StateDict,
    id_to_sharded_param_map: dict[int, ShardedTensor | ShardedTensorFactory],
    exclude_keys: tuple[str, ...] = (),
) -> None:
    """Turn a torch optimizer's state dict into records, in place.

    Per-parameter tensors become `optimizer.state.<name>.<model key>`; `exclude_keys` (such as `step`) are left out.
    The parameter numbers of the groups are not stored.
    """
    sharded_state: dict[int, dict[str, Any]] = {}
    for param_id, param_state in optim_state_dict["state"].items():
        sharded_state[param_id] = {}
        for name, value in param_state.items():
            if name in exclude_keys:
                continue
            if param_id not in id_to_sharded_param_map:
                raise CheckpointingException(
                    f"optimizer.state.{name}", f"parameter {param_id} is not described"
                )
            sharded_state[param_id][name] = make_sharded_optimizer_tensor(
                id_to_sharded_param_map[param_id], value, prefix=f"optimizer.state.{name}"
            )
    optim_state_dict["param_groups"] = deepcopy(optim_state_dict["param_groups"])
    for group in optim_state_dict["param_groups"]:
        group["params"] = LocalNonpersistentObject(group["params"])
    optim_state_dict["state"] = sharded_state
