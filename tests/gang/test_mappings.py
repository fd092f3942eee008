"""Every mapping, forward and backward, against the definition on the stacked tensors of all ranks.

Each rank holds x[rank]; a mapping f turns the list of inputs into a list of outputs. With a random direction d the
gradient of sum over ranks of <f(x)[rank], d[rank]> is known in closed form and is compared exactly (the values are
small integers, so sums do not round).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.tensor_parallel import mappings
from tests.gang.harness import run_gang

S, H = 8, 4


def _integers(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-9, 10, shape, generator=generator).float()


def _run(
    name: str, rows: int, columns: int, out_rows: int, out_columns: int, *args: object
) -> dict[str, Tensor]:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    size, rank = dist.get_world_size(), dist.get_rank()
    x = _integers(1, size, rows, columns)[rank].requires_grad_()
    output = getattr(mappings, name)(x, *args)
    (grad,) = torch.autograd.grad(output, x, _integers(2, size, out_rows, out_columns)[rank])
    return {"output": output.detach(), "grad": grad, "rank": torch.tensor(rank)}


def _columns(whole: Tensor, rank: int, size: int) -> Tensor:
    return whole.chunk(size, dim=-1)[rank]


def _rows(whole: Tensor, rank: int, size: int) -> Tensor:
    return whole.chunk(size, dim=0)[rank]


Expected = Callable[[Tensor, int, int], Tensor]  # (all ranks' tensors, rank, size) -> this rank's result


def _identity(all_: Tensor, rank: int, size: int) -> Tensor:
    return all_[rank]


def _sum(all_: Tensor, rank: int, size: int) -> Tensor:
    return all_.sum(0)


def _own_columns(all_: Tensor, rank: int, size: int) -> Tensor:
    return _columns(all_[rank], rank, size)


def _own_rows(all_: Tensor, rank: int, size: int) -> Tensor:
    return _rows(all_[rank], rank, size)


def _all_columns(all_: Tensor, rank: int, size: int) -> Tensor:
    return torch.cat(list(all_), dim=-1)


def _all_rows(all_: Tensor, rank: int, size: int) -> Tensor:
    return torch.cat(list(all_), dim=0)


def _sum_rows(all_: Tensor, rank: int, size: int) -> Tensor:
    return _rows(all_.sum(0), rank, size)


def _sum_columns(all_: Tensor, rank: int, size: int) -> Tensor:
    return _columns(all_.sum(0), rank, size)


# name, extra arguments, forward, backward, how output rows and columns relate to input ones (x size, / size)
CASES: list[tuple[str, tuple[object, ...], Expected, Expected, int, int]] = [
    ("copy_to_tensor_model_parallel_region", (), _identity, _sum, 0, 0),
    ("reduce_from_tensor_model_parallel_region", (), _sum, _identity, 0, 0),
    ("scatter_to_tensor_model_parallel_region", (), _own_columns, _all_columns, 0, -1),
    ("gather_from_tensor_model_parallel_region", (), _all_columns, _own_columns, 0, 1),
    ("scatter_to_sequence_parallel_region", (), _own_rows, _all_rows, -1, 0),
    ("gather_from_sequence_parallel_region", (), _all_rows, _sum_rows, 1, 0),
    ("gather_from_sequence_parallel_region", (False,), _all_rows, _own_rows, 1, 0),
    ("reduce_scatter_to_sequence_parallel_region", (), _sum_rows, _all_rows, -1, 0),
    ("gather_from_sequence_parallel_region_to_moe", (), _all_rows, _sum_rows, 1, 0),
    ("gather_from_sequence_parallel_region_to_moe", (True,), _all_rows, _sum_rows, 1, 0),
    ("reduce_scatter_to_sequence_parallel_region_from_moe", (), _sum_rows, _all_rows, -1, 0),
    ("all_gather_last_dim_from_tensor_parallel_region", (), _all_columns, _sum_columns, 0, 1),
    ("reduce_scatter_last_dim_to_tensor_parallel_region", (), _sum_columns, _all_columns, 0, -1),
]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("name", "args", "forward", "backward", "row_power", "column_power"), CASES)
def test_mapping(
    size: int,
    name: str,
    args: tuple[object, ...],
    forward: Expected,
    backward: Expected,
    row_power: int,
    column_power: int,
) -> None:
    out_rows, out_columns = int(S * float(size) ** row_power), int(H * float(size) ** column_power)
    inputs, directions = _integers(1, size, S, H), _integers(2, size, out_rows, out_columns)
    for rank, result in enumerate(run_gang(size, _run, name, S, H, out_rows, out_columns, *args)):
        assert torch.equal(result["output"], forward(inputs, rank, size))
        assert torch.equal(result["grad"], backward(directions, rank, size))


def _uneven(sizes: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    rank, total = dist.get_rank(), sum(sizes)
    x = _integers(10 + rank, sizes[rank], H).requires_grad_()
    gathered = mappings.gather_from_sequence_parallel_region(x, True, sizes)
    (grad,) = torch.autograd.grad(gathered, x, _integers(20 + rank, total, H))
    y = _integers(30 + rank, total, H).requires_grad_()
    scattered = mappings.reduce_scatter_to_sequence_parallel_region(y, sizes)
    (back,) = torch.autograd.grad(scattered, y, _integers(40 + rank, sizes[rank], H))
    return gathered.detach(), grad, scattered.detach(), back


@pytest.mark.parametrize("sizes", [[3, 1], [0, 5], [2, 0, 4, 1]])
def test_uneven_shares(sizes: list[int]) -> None:
    size, total = len(sizes), sum(sizes)
    ends = torch.tensor(sizes).cumsum(0).tolist()

    def share(whole: Tensor, rank: int) -> Tensor:
        return whole[ends[rank] - sizes[rank] : ends[rank]]

    whole = torch.cat([_integers(10 + rank, sizes[rank], H) for rank in range(size)])
    grad_sum = sum(_integers(20 + rank, total, H) for rank in range(size))
    value_sum = sum(_integers(30 + rank, total, H) for rank in range(size))
    back_whole = torch.cat([_integers(40 + rank, sizes[rank], H) for rank in range(size)])
    for rank, (gathered, grad, scattered, back) in enumerate(run_gang(size, _uneven, sizes)):
        assert torch.equal(gathered, whole)
        assert torch.equal(grad, share(grad_sum, rank))
        assert torch.equal(scattered, share(value_sum, rank))
        assert torch.equal(back, back_whole)


def _exchanges() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size, rank = dist.get_world_size(), dist.get_rank()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    group = parallel_state.get_tensor_model_parallel_group()
    to = [[1, 2], [3, 4]][rank]  # rows this rank sends to rank 0 and to rank 1
    arriving = [[1, 3], [2, 4]][rank]
    x = _integers(rank, sum(to), H).requires_grad_()
    received = mappings.all_to_all(group, x, arriving, to)
    (grad,) = torch.autograd.grad(received, x, received.detach() * 2)
    tokens = _integers(5, 6, 2 * H).chunk(2)[rank].requires_grad_()
    heads = mappings.all_to_all_sp2hp(tokens)
    back = mappings.all_to_all_hp2sp(heads)
    (round_trip,) = torch.autograd.grad(back, tokens, tokens.detach() * 3)
    return (
        received.detach(),
        grad - 2 * x.detach(),
        heads.detach(),
        (back - tokens).abs() + round_trip - 3 * tokens,
    )


def test_all_to_all_and_its_two_uses() -> None:
    sent = [_integers(0, 3, H), _integers(1, 7, H)]
    expected = [torch.cat((sent[0][:1], sent[1][:3])), torch.cat((sent[0][1:], sent[1][3:]))]
    whole = _integers(5, 6, 2 * H)
    for rank, (received, grad_error, heads, round_trip) in enumerate(run_gang(2, _exchanges)):
        assert torch.equal(received, expected[rank])
        assert not grad_error.any()
        assert torch.equal(heads, whole.chunk(2, dim=1)[rank])
        assert not round_trip.any()


def _alone() -> bool:
    parallel_state.initialize_model_parallel()
    x = torch.randn(4, 4, requires_grad=True)
    names = [name for name, *_ in CASES] + ["all_to_all_sp2hp", "all_to_all_hp2sp"]
    group = parallel_state.get_tensor_model_parallel_group()
    return all(getattr(mappings, name)(x) is x for name in names) and mappings.all_to_all(group, x) is x


def test_one_rank_moves_nothing() -> None:
    assert run_gang(1, _alone) == [True]
