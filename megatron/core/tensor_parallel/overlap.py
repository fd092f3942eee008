"""Tensor-parallel transfers in pieces, each under way while the product of another piece runs (--tp-comm-overlap).

With sequence parallelism a column-parallel layer multiplies the tokens of all ranks, a row-parallel one sums its product
over the ranks and keeps its own tokens. Done in one piece, the first GEMM waits for the whole gather and the second's
reduction for the whole GEMM. Here the tokens travel rank by rank: a rank multiplies its own while the others' arrive, and
the sum of one rank's tokens is under way while the next rank's are multiplied. The sums are the same but for their order.

Plain collectives of any backend do this; no buffers outside torch are needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig


@dataclass(frozen=True)
class Overlap:
    """What a linear layer overlaps piece by piece, and which whole transfers of its backward pass it overlaps.

    gathers, scatters: of the forward pass, and the gather of the gradients that belong to the latter. scatters_dgrad: the
    reduction of the input's gradient with its own GEMM, instead of (bulk_wgrad) with the weight gradient's. bulk_dgrad:
    the second gather of the input with the GEMM of the input's gradient.
    """

    gathers: bool = False
    scatters: bool = False
    scatters_dgrad: bool = False
    bulk_dgrad: bool = True
    bulk_wgrad: bool = True


#: Without --tp-comm-overlap: whole transfers, those of the backward pass overlapped.
BULK = Overlap()


def choose(config: ModelParallelConfig, name: str | None) -> Overlap:
    """What the configuration has the layer called `name` (qkv, proj, fc1, fc2) overlap."""
    if not config.tp_comm_overlap or not config.sequence_parallel:
        return BULK
    left_out = (name == "qkv" and config.tp_comm_overlap_disable_qkv) or (
        name == "fc1" and config.tp_comm_overlap_disable_fc1
    )
    return Overlap(
        gathers=config.tp_comm_overlap_ag and not left_out,
        scatters=config.tp_comm_overlap_rs,
        scatters_dgrad=config.tp_comm_overlap_rs_dgrad and not left_out,
        bulk_dgrad=config.tp_comm_bulk_dgrad,
        bulk_wgrad=config.tp_comm_bulk_wgrad,
    )


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out [.., o] = x [.., i] weight [o, i]^T + bias."""
    rows, result = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    if bias is None:
        torch.mm(rows, weight.t(), out=result)
    else:
        torch.addmm(bias, rows, weight.t(), out=result)


def gather_and_multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """x [s/tp, b, i] of every rank, weight [o, i] -> (x of all ranks in the scratch pool [s, b, i], product [s, b, o])."""
    ranks, own = group.size(), group.rank()
    pool = parallel_state.get_global_memory_buffer()
    whole = pool.get_tensor((ranks * x.shape[0], *x.shape[1:]), x.dtype, "mpu")
    product = x.new_empty(ranks * x.shape[0], *x.shape[1:-1], weight.shape[0])
    pieces, products = whole.chunk(ranks), product.chunk(ranks)
    pieces[own].copy_(x)
    arrivals = [
        dist.broadcast(piece, src=dist.get_global_rank(group, rank), group=group, async_op=True)
        for rank, piece in enumerate(pieces)
    ]
    _multiply(x, weight, bias, products[own])
    for rank in range(ranks):
        arrivals[rank].wait()
        if rank != own:
            _multiply(pieces[rank], weight, bias, products[rank])
    return whole, product


def multiply_and_scatter(x: Tensor, weight: Tensor, group: ProcessGroup) -> Tensor:
    """x [s, b, i], weight [o, i] -> this rank's tokens of the product summed over the ranks [s/tp, b, o]."""
    ranks = group.size()
    sums: list[Tensor] = []
    transfers = []
    for rank, piece in enumerate(x.chunk(ranks)):
        part = x.new_empty(*piece.shape[:-1], weight.shape[0])
        _multiply(piece, weight, None, part)
        sums.append(part)
        transfers.append(dist.reduce(part, dst=dist.get_global_rank(group, rank), group=group, async_op=True))
    for transfer in transfers:
        transfer.wait()
    return sums[group.rank()]
