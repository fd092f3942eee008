"""One record per parameter: how it is split, over which group, and what its gradient needs.

A module declares `PLACEMENT = {"weight": Placed(dim=0, over="tp"), ...}`; initialisation, the classic parameter
attributes, checkpoint records, norm counting, gradient groups and converters all read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection

Axis = Literal["tp", "ep"]
Offsets = tuple[tuple[int, int, int], ...]

#: Classic attribute -> its value on a parameter that is whole on every rank.
_TENSOR_PARALLEL_DEFAULTS = {"tensor_model_parallel": False, "partition_dim": -1, "partition_stride": 1}


@dataclass(frozen=True)
class Placed:
    """Where the pieces of one parameter live.

    dim: the dimension cut into equal pieces, None = whole. over: the axis whose ranks hold the pieces.
    stride: pieces per rank along `dim` (2 for a gate stacked on an up projection). sequence_parallel_grad: the
    parameter is whole but each tensor rank sees only its part of the sequence, so gradients are summed over tp.
    expert: one of the experts divided over ep; its gradient is reduced among the replicas of that expert.
    shared_embedding: tied across pipeline stages; the gradient is summed over the embedding group.
    """

    dim: int | None = None
    over: Axis | None = None
    sequence_parallel_grad: bool = False
    stride: int = 1
    expert: bool = False
    shared_embedding: bool = False


def apply(module: torch.nn.Module, placement: Mapping[str, Placed] | None = None) -> None:
    """Set the classic attributes on a module's own parameters from its (or the given) PLACEMENT."""
    for name, placed in (placement or getattr(module, "PLACEMENT", {})).items():
        parameter = getattr(module, name, None)
        if parameter is not None:
            mark(parameter, placed)


def mark(parameter: Tensor, placed: Placed) -> None:
    """Set the classic attributes of one parameter."""
    if placed.dim is not None:
        set_tensor_model_parallel_attributes(parameter, True, placed.dim, placed.stride)
    parameter.allreduce = not placed.expert  # type: ignore[attr-defined]
    parameter.sequence_parallel = placed.sequence_parallel_grad  # type: ignore[attr-defined]
    if placed.shared_embedding:
        parameter.shared_embedding = True  # type: ignore[attr-defined]


# The classic attributes -------------------------------------------------------------------------------------------


def set_tensor_model_parallel_attributes(tensor: Tensor, is_parallel: bool, dim: int, stride: int) -> None:
    """Record that a tensor is cut along `dim`; AssertionError if it already says something about that."""
    for attribute in _TENSOR_PARALLEL_DEFAULTS:
        assert not hasattr(tensor, attribute), f"the tensor already has the attribute {attribute}"
    tensor.tensor_model_parallel = is_parallel  # type: ignore[attr-defined]
    tensor.partition_dim = dim  # type: ignore[attr-defined]
    tensor.partition_stride = stride  # type: ignore[attr-defined]


def set_defaults_if_not_set_tensor_model_parallel_attributes(tensor: Tensor) -> None:
    """Mark a tensor that says nothing as whole on every rank."""
    for attribute, default in _TENSOR_PARALLEL_DEFAULTS.items():
        if not hasattr(tensor, attribute):
            setattr(tensor, attribute, default)


def copy_tensor_model_parallel_attributes(destination_tensor: Tensor, source_tensor: Tensor) -> None:
    """Copy what the source says about its placement; what it leaves unsaid is left alone."""
    for attribute in _TENSOR_PARALLEL_DEFAULTS:
        if hasattr(source_tensor, attribute):
            setattr(destination_tensor, attribute, getattr(source_tensor, attribute))


def param_is_not_tensor_parallel_duplicate(param: Tensor) -> bool:
    """True where this rank's copy counts in a sum over tp: pieces everywhere, whole parameters on tp rank 0."""
    if getattr(param, "tensor_model_parallel", False):
        return True
    return parallel_state.resolve(None).rank("tp") == 0


# Checkpoint records -----------------------------------------------------------------------------------------------


def make_tp_sharded_tensor_for_checkpoint(
    tensor: Tensor,
    key: str,
    tp_axis: int = 0,
    replica_id: Any = None,
    prepend_offsets: Offsets = (),
    *,
    pg_collection: ProcessGroupCollection | None = None,
    **kwargs: Any,
) -> ShardedTensor:
    """Describe a tensor cut along `tp_axis` over the tensor-parallel ranks.

    prepend_offsets: (axis, index, size) of extra leading axes, e.g. the layer. replica_id: default
    (0, 0, rank among dp x cp); the copy with all zeros is the one written.
    """
    groups = parallel_state.resolve(pg_collection)
    if replica_id is None:
        replica_id = (0, 0, groups.rank("dp_cp"))
    split = (tp_axis + len(prepend_offsets), groups.rank("tp"), groups.size("tp"))
    return ShardedTensor.from_rank_offsets(
        key,
        tensor,
        *prepend_offsets,
        split,
        replica_id=replica_id,
        prepend_axis_num=len(prepend_offsets),
        **kwargs,
    )


def make_sharded_tensor_for_checkpoint(
    tensor: Tensor,
    key: str,
    prepend_offsets: Offsets = (),
    replica_id: Any = None,
    *,
    pg_collection: ProcessGroupCollection | None = None,
    **kwargs: Any,
) -> ShardedTensor:
    """Describe a tensor that is whole on every tensor-parallel rank (default replica: (0, tp, dp x cp))."""
    if replica_id is None:
        groups = parallel_state.resolve(pg_collection)
        replica_id = (0, groups.rank("tp"), groups.rank("dp_cp"))
    return ShardedTensor.from_rank_offsets(
        key,
        tensor,
        *prepend_offsets,
        replica_id=replica_id,
        prepend_axis_num=len(prepend_offsets),
        **kwargs,
    )


def make_sharded_object_for_checkpoint(
    obj: Any,
    key: str,
    sharded_offsets: Offsets = (),
    replica_id: Any = None,
    *,
    pg_collection: ProcessGroupCollection | None = None,
    **kwargs: Any,
) -> ShardedObject:
    """Describe an object that is no tensor: one per cell of the grid that the offsets span."""
    if replica_id is None:
        groups = parallel_state.resolve(pg_collection)
        replica_id = (0, groups.rank("tp"), groups.rank("dp_cp"))
    ordered = sorted(sharded_offsets)
    assert [axis for axis, _, _ in ordered] == list(range(len(ordered))), (
        f"the offsets of {key} must name the axes 0, 1, .. once each, got {sharded_offsets}"
    )
    offset = tuple(index for _, index, _ in ordered) or (0,)
    shape = tuple(size for _, _, size in ordered) or (1,)
    return ShardedObject(key, obj, shape, offset, replica_id, **kwargs)


def make_sharded_tensors_for_checkpoint(
    state_dict: Mapping[str, Any],
    prefix: str,
    tensor_parallel_layers_axis_map: Mapping[str, int] | None = None,
    sharded_offsets: Offsets = (),
    extra_state_suffix: str = "_extra_state",
    *,
    pg_collection: ProcessGroupCollection | None = None,
) -> dict[str, Any]:
    """Describe every entry of a module's own state dict.

    tensor_parallel_layers_axis_map: entry -> dimension cut over tp; other tensors are whole, and entries whose
    name ends in extra_state_suffix are objects.
    """
    axes = tensor_parallel_layers_axis_map or {}
    described: dict[str, Any] = {}
    for name, value in state_dict.items():
        key = f"{prefix}{name}"
        if name.endswith(extra_state_suffix):
            described[key] = make_sharded_object_for_checkpoint(
                value, key, sharded_offsets, pg_collection=pg_collection
            )
        elif name in axes:
            described[key] = make_tp_sharded_tensor_for_checkpoint(
                value, key, axes[name], prepend_offsets=sharded_offsets, pg_collection=pg_collection
            )
        else:
            described[key] = make_sharded_tensor_for_checkpoint(
                value, key, prepend_offsets=sharded_offsets, pg_collection=pg_collection
            )
    return described
