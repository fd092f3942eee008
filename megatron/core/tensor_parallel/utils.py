"""Splitting tensors and the vocabulary among tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import parallel_state
from megatron.core.collectives import all_gather_single
from megatron.core.process_groups_config import group_rank, group_size
from megatron.core.utils import divide


def split_tensor_along_last_dim(
    tensor: Tensor, num_partitions: int, contiguous_split_chunks: bool = False
) -> tuple[Tensor, ...]:
    """Equal parts [..., n / num_partitions] of a tensor [..., n]; views unless contiguous copies are asked for."""
    parts = torch.split(tensor, divide(tensor.size(-1), num_partitions), dim=-1)
    return tuple(part.contiguous() for part in parts) if contiguous_split_chunks else tuple(parts)


def split_tensor_into_1d_equal_chunks(
    tensor: Tensor, new_buffer: bool = False, group: ProcessGroup | None = None
) -> Tensor:
    """This tensor-parallel rank's share [numel / tp] of the flattened tensor; new_buffer: copied, not viewed."""
    group = parallel_state.get_tensor_model_parallel_group() if group is None else group
    share = divide(tensor.numel(), group_size(group))
    start = share * group_rank(group)
    piece = tensor.view(-1)[start : start + share]
    return piece.clone() if new_buffer else piece


def gather_split_1d_tensor(tensor: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The opposite of `split_tensor_into_1d_equal_chunks`: any shape of n values -> [n * tp]. All ranks must call."""
    group = parallel_state.get_tensor_model_parallel_group() if group is None else group
    gathered = tensor.new_empty(tensor.numel() * group_size(group))
    all_gather_single(gathered, tensor.reshape(-1), group=group)
    return gathered


class VocabUtility:
    """Rows [first, last) of the vocabulary on a rank."""

    @staticmethod
    def vocab_range_from_per_partition_vocab_size(
        per_partition_vocab_size: int, rank: int, world_size: int
    ) -> Sequence[int]:
        """The range of `rank` where every rank has this many rows."""
        first = rank * per_partition_vocab_size
        return first, first + per_partition_vocab_size

    @staticmethod
    def vocab_range_from_global_vocab_size(
        global_vocab_size: int, rank: int, world_size: int
    ) -> Sequence[int]:
        """The range of `rank` where the whole vocabulary is divided equally."""
        share = divide(global_vocab_size, world_size)
        return VocabUtility.vocab_range_from_per_partition_vocab_size(share, rank, world_size)
