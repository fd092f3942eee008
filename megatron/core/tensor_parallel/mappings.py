"""Collectives as differentiable functions: what moves forward and what its gradient does.

Each function names its region: *tensor-parallel* (activations whole or cut along the last dimension) or
*sequence-parallel* (cut along the first). Every one takes an optional group (None = the current tensor-parallel
one), all of whose ranks must call, and is the identity without a graph node where that group has one rank.

| function | forward | backward |
|---|---|---|
| copy_to_tensor_model_parallel_region | identity | all-reduce |
| reduce_from_tensor_model_parallel_region | all-reduce | identity |
| scatter_to_tensor_model_parallel_region | split last | gather last |
| gather_from_tensor_model_parallel_region | gather last | split last |
| scatter_to_sequence_parallel_region | split first | gather first |
| gather_from_sequence_parallel_region | gather first | reduce-scatter first (or split) |
| reduce_scatter_to_sequence_parallel_region | reduce-scatter first | gather first |
| all_gather_last_dim_from_tensor_parallel_region | gather last | reduce-scatter last |
| reduce_scatter_last_dim_to_tensor_parallel_region | reduce-scatter last | gather last |
| all_to_all | all-to-all first | all-to-all first |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import parallel_state
from megatron.core.collectives import all_gather_single, reduce_scatter_single
from megatron.core.utils import divide

Move = Callable[[Tensor], Tensor]


# Collectives on plain tensors; group sizes above one ----------------------------------------------------------------


def all_reduce(input_: Tensor, group: ProcessGroup) -> Tensor:
    """The sum over ranks, in a new tensor: autograd may still need the input."""
    summed = input_.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(summed, group=group)
    return summed


def split_first_dim(input_: Tensor, group: ProcessGroup, sizes: Sequence[int] | None = None) -> Tensor:
    """This rank's rows; equal shares unless sizes are given."""
    rows = sizes or [divide(input_.shape[0], group.size())] * group.size()
    start = sum(rows[: group.rank()])
    return input_[start : start + rows[group.rank()]].contiguous()


def split_last_dim(input_: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's equal share of the last dimension."""
    share = divide(input_.shape[-1], group.size())
    return input_.narrow(-1, group.rank() * share, share).contiguous()


def gather_first_dim(
    input_: Tensor, group: ProcessGroup, sizes: Sequence[int] | None = None, out: Tensor | None = None
) -> Tensor:
    """All ranks' rows, in rank order. sizes: rows of every rank where they differ. out: write here instead."""
    rows = input_.shape[0]
    if sizes is None or len(set(sizes)) == 1:
        shape = (rows * group.size(), *input_.shape[1:])
        gathered = input_.new_empty(shape) if out is None else out
        all_gather_single(gathered, input_.contiguous(), group=group)
        return gathered
    # Unequal shares travel padded to the longest: not every backend gathers unequal ones.
    longest = max(sizes)
    padded = input_.new_zeros((longest, *input_.shape[1:]))
    padded[:rows] = input_
    gathered = input_.new_empty((longest * group.size(), *input_.shape[1:]))
    all_gather_single(gathered, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(gathered.split(longest), sizes)], out=out)


def gather_last_dim(input_: Tensor, group: ProcessGroup) -> Tensor:
    """All ranks' columns, in rank order."""
    parts = input_.new_empty((group.size(), *input_.shape))
    all_gather_single(parts, input_.contiguous().unsqueeze(0), group=group)
    return torch.cat(parts.unbind(0), dim=-1)


def reduce_scatter_first_dim(
    input_: Tensor, group: ProcessGroup, sizes: Sequence[int] | None = None, out: Tensor | None = None
) -> Tensor:
    """This rank's rows of the sum over ranks. sizes: rows of every rank where they differ."""
    if sizes is None or len(set(sizes)) == 1:
        share = divide(input_.shape[0], group.size())
        reduced = input_.new_empty((share, *input_.shape[1:])) if out is None else out
        reduce_scatter_single(reduced, input_.contiguous(), group=group)
        return reduced
    mine = sizes[group.rank()]
    received = exchange_first_dim(input_, group, [mine] * group.size(), sizes)
    return torch.sum(received.view(group.size(), mine, *input_.shape[1:]), dim=0, out=out)


def reduce_scatter_last_dim(input_: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's columns of the sum over ranks."""
    share = divide(input_.shape[-1], group.size())
    stacked = torch.stack(input_.split(share, dim=-1))
    reduced = torch.empty_like(stacked[0])
    reduce_scatter_single(reduced.unsqueeze(0), stacked, group=group)
    return reduced


def exchange_first_dim(
    input_: Tensor,
    group: ProcessGroup,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
) -> Tensor:
    """Send row block j to rank j, receive one from each. Sizes default to equal blocks."""
    rows = input_.shape[0] if output_split_sizes is None else sum(output_split_sizes)
    received = input_.new_empty((rows, *input_.shape[1:]))
    dist.all_to_all_single(
        received,
        input_.contiguous(),
        output_split_sizes=None if output_split_sizes is None else list(output_split_sizes),
        input_split_sizes=None if input_split_sizes is None else list(input_split_sizes),
        group=group,
    )
    return received


# Differentiable forms ---------------------------------------------------------------------------------------------


class _Moved(torch.autograd.Function):
    """A pair of moves: one applied to the activation, the other to its gradient."""

    @staticmethod
    def forward(ctx: Any, input_: Tensor, forward: Move | None, backward: Move | None) -> Tensor:
        """input_ [..] -> what `forward` makes of it; None is the identity."""
        ctx.move = backward
        return input_.view_as(input_) if forward is None else forward(input_)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        """The other move, on the gradient."""
        return grad_output if ctx.move is None else ctx.move(grad_output), None, None


def _tensor_parallel(group: ProcessGroup | None) -> ProcessGroup | None:
    """The group to move over, or None where nothing has to move."""
    if group is None:
        group = parallel_state.resolve(None).tp
    return None if group is None or group.size() == 1 else group


def copy_to_tensor_model_parallel_region(input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Enter a region where every rank computes with the same input [..]; gradients are summed."""
    over = _tensor_parallel(group)
    if over is None:
        return input_
    return _Moved.apply(input_, None, lambda grad: all_reduce(grad, over))


def reduce_from_tensor_model_parallel_region(input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Leave a region of partial results [..]: their sum on every rank."""
    over = _tensor_parallel(group)
    if over is None:
        return input_
    return _Moved.apply(input_, lambda value: all_reduce(value, over), None)


def scatter_to_tensor_model_parallel_region(input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Keep this rank's columns: [.., h] -> [.., h/tp]."""
    over = _tensor_parallel(group)
    if over is None:
        return input_
    return _Moved.apply(
        input_, lambda value: split_last_dim(value, over), lambda grad: gather_last_dim(grad, over)
    )


def gather_from_tensor_model_parallel_region(input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Join all ranks' columns: [.., h/tp] -> [.., h]."""
    over = _tensor_parallel(group)
    if over is None:
        return input_
    return _Moved.apply(
        input_, lambda value: gather_last_dim(value, over), lambda grad: split_last_dim(grad, over)
    )


def scatter_to_sequence_parallel_region(input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Keep this rank's tokens: [s, ..] -> [s/tp, ..]."""
    over = _tensor_parallel(group)
    if over is None:
        return input_
    return _Moved.apply(
        input_, lambda value: split_first_dim(value, over), lambda grad: gather_first_dim(grad, over)
    )


def gather_from_sequence_parallel_region(
    input_: Tensor,
    tensor_parallel_output_grad: bool = True,
    output_split_sizes: Sequence[int] | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Join all ranks' tokens: [s/tp, ..] -> [s, ..].

    tensor_parallel_output_grad: what follows is computed differently on each rank, so gradients are partial and
    are summed; False: it is computed alike everywhere, so each rank just keeps its own part of the gradient.
    output_split_sizes: tokens of every rank where they differ.
    """
    over = _tensor_parallel(group)
    if over is None:
        return input_

    def backward(grad: Tensor) -> Tensor:
        if tensor_parallel_output_grad:
            return reduce_scatter_first_dim(grad, over, output_split_sizes)
        return split_first_dim(grad, over, output_split_sizes)

    return _Moved.apply(input_, lambda value: gather_first_dim(value, over, output_split_sizes), backward)


def reduce_scatter_to_sequence_parallel_region(
    input_: Tensor, input_split_sizes: Sequence[int] | None = None, group: ProcessGroup | None = None
) -> Tensor:
    """Sum partial results and keep this rank's tokens: [s, ..] -> [s/tp, ..]; sizes as in the gather."""
    over = _tensor_parallel(group)
    if over is None:
        return input_
    return _Moved.apply(
        input_,
        lambda value: reduce_scatter_first_dim(value, over, input_split_sizes),
        lambda grad: gather_first_dim(grad, over, input_split_sizes),
    )


def gather_from_sequence_parallel_region_to_moe(
    input_: Tensor, use_global_buffer: bool = False, group: ProcessGroup | None = None
) -> Tensor:
    """Join the tokens of all tensor x expert ranks: [t, ..] -> [t * tp * ep, ..]; gradients are summed.

    use_global_buffer: place the result in the scratch pool; it is valid until the next such call.
    """
    over = _tensor_parallel(parallel_state.get_tensor_and_expert_parallel_group() if group is None else group)
    if over is None:
        return input_
    return _Moved.apply(
        input_,
        lambda value: gather_first_dim(
            value, over, out=_scratch(value, value.shape[0] * over.size(), use_global_buffer)
        ),
        lambda grad: reduce_scatter_first_dim(grad, over),
    )


def reduce_scatter_to_sequence_parallel_region_from_moe(
    input_: Tensor, use_global_buffer: bool = False, group: ProcessGroup | None = None
) -> Tensor:
    """Sum over all tensor x expert ranks and keep this rank's tokens: [t * tp * ep, ..] -> [t, ..]."""
    over = _tensor_parallel(parallel_state.get_tensor_and_expert_parallel_group() if group is None else group)
    if over is None:
        return input_
    return _Moved.apply(
        input_,
        lambda value: reduce_scatter_first_dim(value, over),
        lambda grad: gather_first_dim(
            grad, over, out=_scratch(grad, grad.shape[0] * over.size(), use_global_buffer)
        ),
    )


def _scratch(like: Tensor, rows: int, wanted: bool) -> Tensor | None:
    if not wanted:
        return None
    pool = parallel_state.get_global_memory_buffer()
    return pool.get_tensor((rows, *like.shape[1:]), like.dtype, "mpu")


def all_gather_last_dim_from_tensor_parallel_region(
    input_: Tensor, group: ProcessGroup | None = None
) -> Tensor:
    """Join all ranks' columns [.., h/tp] -> [.., h]; gradients are partial and are summed."""
    over = _tensor_parallel(group)
    if over is None:
        return input_
    return _Moved.apply(
        input_, lambda value: gather_last_dim(value, over), lambda grad: reduce_scatter_last_dim(grad, over)
    )


def reduce_scatter_last_dim_to_tensor_parallel_region(
    input_: Tensor, group: ProcessGroup | None = None
) -> Tensor:
    """Sum partial results and keep this rank's columns: [.., h] -> [.., h/tp]."""
    over = _tensor_parallel(group)
    if over is None:
        return input_
    return _Moved.apply(
        input_, lambda value: reduce_scatter_last_dim(value, over), lambda grad: gather_last_dim(grad, over)
    )


def all_to_all(
    group: ProcessGroup | None,
    input_: Tensor,
    output_split_sizes_: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
) -> Tensor:
    """Exchange row blocks: block j of [t, ..] goes to rank j. Sizes default to equal blocks."""
    if group is None or group.size() == 1:
        return input_
    return _Moved.apply(
        input_,
        lambda value: exchange_first_dim(value, group, output_split_sizes_, input_split_sizes),
        lambda grad: exchange_first_dim(grad, group, input_split_sizes, output_split_sizes_),
    )


def all_to_all_sp2hp(input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """From tokens divided to columns divided: [t/tp, h] -> [t, h/tp]."""
    over = _tensor_parallel(group)
    if over is None:
        return input_
    tokens = input_.reshape(-1, input_.shape[-1])
    blocks = torch.cat(tokens.split(divide(tokens.shape[1], over.size()), dim=1))
    return all_to_all(over, blocks)


def all_to_all_hp2sp(input_: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """From columns divided to tokens divided: [t, h/tp] -> [t/tp, h]."""
    over = _tensor_parallel(group)
    if over is None:
        return input_
    received = all_to_all(over, input_.reshape(-1, input_.shape[-1]))
    return torch.cat(received.split(divide(received.shape[0], over.size())), dim=1)
