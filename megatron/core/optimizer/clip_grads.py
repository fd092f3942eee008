"""The global gradient norm, clipping by it, and the count of zeros, over tensors spread across ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import device
from megatron.core.tensor_parallel.placement import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

_IN_CACHE = 1 << 18
"""Numbers that are widened at a time: 2 MB of float64, what stays in a cache between two operations."""


def all_reduce(value: Tensor, op: dist.ReduceOp.RedOpType, group: ProcessGroup | None) -> None:
    """Reduce in place over the group, None being the whole world; a lone process has nothing to reduce."""
    if dist.is_initialized() and dist.get_world_size(group) > 1:
        dist.all_reduce(value, op=op, group=group)


def counts_once(param: Tensor) -> bool:
    """Whether this rank is the one that accounts for the parameter in norms and counts.

    False for the second copy of a tied weight and for copies on tensor-parallel ranks above 0.
    """
    return param_is_not_shared(param) and param_is_not_tensor_parallel_duplicate(param)


def _as_list(tensors: Iterable[Tensor] | Tensor) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of squared elements over this rank's tensors, a float64 scalar on the tensors' device.

    Accumulated in float64, so that the result does not depend on how the elements are spread over tensors and ranks
    (up to 1e-13, on a CPU to the last digit or two) and every layout clips by the same factor.
    """
    filled = [tensor for tensor in tensors if tensor.numel()]
    if not filled:
        return torch.zeros((), dtype=torch.float64, device=device.current())
    if all(tensor.device.type == "cpu" for tensor in filled):
        return _sum_of_squares_in_cache(filled)
    norms: list[Tensor] = []
    for _, same in groupby(filled, key=lambda tensor: tensor.dtype):
        norms += torch._foreach_norm(list(same), 2.0, dtype=torch.float64)
    return torch.stack(norms).square_().sum()


def _sum_of_squares_in_cache(tensors: Sequence[Tensor]) -> Tensor:
    """The same in pieces that are widened in a core's cache: main memory is read once, and nothing written to it."""
    wide = torch.empty(min(_IN_CACHE, max(tensor.numel() for tensor in tensors)), dtype=torch.float64)
    sums: list[Tensor] = []
    for tensor in tensors:
        for piece in tensor.detach().reshape(-1).split(_IN_CACHE):
            sums.append(wide[: piece.numel()].copy_(piece).square_().sum())
    return torch.stack(sums).sum()


def grad_norm_tensor(
    grads_for_norm: Iterable[Tensor] | Tensor,
    norm_type: float = 2,
    model_parallel_group: ProcessGroup | None = None,
) -> Tensor:
    """As `get_grad_norm_fp32`, but a float64 scalar on the device, without waiting for it."""
    grads = _as_list(grads_for_norm)
    if float(norm_type) == float("inf"):
        largest = [grad.abs().amax().double() for grad in grads if grad.numel()]
        norm = torch.stack(largest).amax() if largest else sum_of_squares([])
        all_reduce(norm, dist.ReduceOp.MAX, model_parallel_group)
        return norm
    if float(norm_type) == 2.0:
        total = sum_of_squares(grads)
    else:
        total = sum_of_squares([])
        for grad in grads:
            total = total + torch.linalg.vector_norm(grad, norm_type, dtype=torch.float64) ** norm_type
    all_reduce(total, dist.ReduceOp.SUM, model_parallel_group)
    return total ** (1.0 / norm_type)


def get_grad_norm_fp32(
    grads_for_norm: Iterable[Tensor] | Tensor,
    norm_type: float = 2,
    model_parallel_group: ProcessGroup | None = None,
) -> float:
    """The p-norm of gradients spread over `model_parallel_group` (None: the whole world), all ranks of which must call.

    `norm_type` may be inf. Each element must be passed by one rank only.
    """
    return grad_norm_tensor(grads_for_norm, norm_type, model_parallel_group).item()


def clip_grad_by_total_norm_fp32(
    parameters: Iterable[Tensor] | Tensor, max_norm: float, total_norm: float | Tensor
) -> None:
    """Scale the gradients of `parameters` by max_norm / (total_norm + 1e-6) in place, if that is below 1.

    A `total_norm` that is still on its way to an accelerator's tensor is not waited for.
    """
    grads = [param.grad for param in _as_list(parameters) if param.grad is not None]
    if not grads:
        return
    coefficient: float | Tensor = max_norm / (total_norm + 1.0e-6)
    if isinstance(coefficient, Tensor):
        if coefficient.device.type != "cpu":
            torch._foreach_mul_(grads, coefficient.clamp(max=1.0).to(grads[0].dtype))
            return
        coefficient = coefficient.item()
    if coefficient < 1.0:
        torch._foreach_mul_(grads, coefficient)


def count_zeros_fp32(
    parameters: Iterable[Tensor] | Tensor, model_parallel_group: ProcessGroup | None
) -> float:
    """How many gradient elements are exactly zero over the group (None: the world), all ranks of which must call."""
    total = torch.zeros((), dtype=torch.float64, device=device.current())
    for param in _as_list(parameters):
        if param.grad is not None and counts_once(param):
            total += param.grad.numel() - torch.count_nonzero(param.grad)
    all_reduce(total, dist.ReduceOp.SUM, model_parallel_group)
    return total.item()
