"""Give the tensors that one tensor-parallel rank read to all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import device, parallel_state
from megatron.core.errors import InvariantError

#: Dimensions a broadcast tensor may have.
_MAX_DIMS = 5


def broadcast_data(
    keys: Sequence[str],
    data: Mapping[str, Tensor] | None,
    datatype: torch.dtype,
    group: ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """The tensors under `keys`, of one dtype and any shape, on the device of every tensor-parallel rank.

    data is read on the first rank of the group only. Two collectives: shapes, then all values in one buffer. All
    ranks of the group must call. ValueError for a tensor of another dtype or more than five dimensions.
    """
    group = parallel_state.get_tensor_model_parallel_group() if group is None else group
    source = group.rank() == 0
    if source:
        if data is None:
            raise ValueError("broadcast_data: the first tensor-parallel rank has no data to broadcast")
        for key in keys:
            if data[key].dtype != datatype:
                raise InvariantError(
                    f"broadcast_data: {key}", f"has dtype {data[key].dtype}, expected {datatype}"
                )
            if data[key].dim() > _MAX_DIMS:
                raise InvariantError(
                    f"broadcast_data: {key}", f"has {data[key].dim()} dimensions, at most {_MAX_DIMS}"
                )
        if group.size() == 1:
            return {key: data[key].to(device.current()) for key in keys}

    table = torch.full((len(keys), _MAX_DIMS + 1), -1, dtype=torch.int64)
    if source:
        assert data is not None, "checked above"
        for row, key in zip(table, keys):
            row[0] = data[key].dim()
            row[1 : 1 + data[key].dim()] = torch.tensor(data[key].shape)
    table = table.to(device.current())
    dist.broadcast(table, group=group, group_src=0)
    shapes = [tuple(row[1 : 1 + row[0]]) for row in table.tolist()]

    sizes = [math.prod(shape) for shape in shapes]
    if source:
        assert data is not None, "checked above"
        flat = torch.cat([data[key].reshape(-1) for key in keys]).to(device.current())
    else:
        flat = torch.empty(sum(sizes), dtype=datatype, device=device.current())
    dist.broadcast(flat, group=group, group_src=0)
    return {key: part.view(shape) for key, part, shape in zip(keys, flat.split(sizes), shapes)}
