"""Norm, scaling and optimizer updates over a list of tensors in one launch.

A table of chunks (tensor index, offset) maps programs to pieces of tensors, a second table holds the
addresses. Both are small int64 tensors; the chunk table depends on the sizes alone and is kept between
calls.
"""

# mypy: allow-untyped-defs
# (arguments of kernels are pointers and numbers of Triton's own language)

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 4096

TL_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@functools.lru_cache(maxsize=64)
def _chunks(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    rows = [(i, first, size) for i, size in enumerate(sizes) for first in range(0, size, CHUNK)]
    return torch.tensor(rows, dtype=torch.int64, device=device).reshape(-1, 3)


def _addresses(lists: Sequence[Sequence[Tensor]], device: torch.device) -> Tensor:
    """int64 [lists, tensors]: where each tensor starts."""
    table = torch.tensor([[t.data_ptr() for t in tensors] for tensors in lists], dtype=torch.int64)
    return table.to(device, non_blocking=True)


def _plan(*lists: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(chunk table [programs, 3], addresses [lists, tensors]); ValueError unless all are contiguous and
    alike in size.
    """
    sizes = tuple(t.numel() for t in lists[0])
    for tensors in lists:
        if tuple(t.numel() for t in tensors) != sizes:
            raise ValueError("the lists of tensors differ in length or sizes")
        if any(not t.is_contiguous() or t.dtype != tensors[0].dtype for t in tensors):
            raise ValueError("every list must hold contiguous tensors of one dtype")
    device = lists[0][0].device
    return _chunks(sizes, device), _addresses(lists, device)


@triton.jit
def piece(addresses, row, tensor, tensors, DTYPE: tl.constexpr):
    return tl.load(addresses + row * tensors + tensor).to(tl.pointer_type(DTYPE))


@triton.jit
def l2_kernel(chunks, addresses, out, tensors, DTYPE: tl.constexpr, CHUNK: tl.constexpr):
    program = tl.program_id(0)
    tensor, first, size = (
        tl.load(chunks + 3 * program),
        tl.load(chunks + 3 * program + 1),
        tl.load(chunks + 3 * program + 2),
    )
    at = first + tl.arange(0, CHUNK)
    value = tl.load(piece(addresses, 0, tensor, tensors, DTYPE) + at, mask=at < size, other=0.0).to(
        tl.float32
    )
    tl.store(out + program, tl.sum(value * value, 0))


@triton.jit
def scale_kernel(
    chunks,
    addresses,
    factor_in,
    bad,
    tensors,
    SOURCE: tl.constexpr,
    TARGET: tl.constexpr,
    CHUNK: tl.constexpr,
):
    program = tl.program_id(0)
    tensor, first, size = (
        tl.load(chunks + 3 * program),
        tl.load(chunks + 3 * program + 1),
        tl.load(chunks + 3 * program + 2),
    )
    at = first + tl.arange(0, CHUNK)
    inside = at < size
    value = tl.load(piece(addresses, 0, tensor, tensors, SOURCE) + at, mask=inside, other=0.0).to(tl.float32)
    value *= tl.load(factor_in)
    tl.store(piece(addresses, 1, tensor, tensors, TARGET) + at, value.to(TARGET), mask=inside)
    # finite numbers times zero are zero, everything else is NaN
    tl.store(bad + program, tl.where(tl.sum(value * 0.0, 0) == 0.0, 0.0, 1.0))


@triton.jit
def adam_kernel(
    chunks, addresses, tensors, lr, beta1, beta2, eps, decay, correction1, correction2,
    PARAM: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, DECOUPLED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tensor, first, size = (
        tl.load(chunks + 3 * program),
        tl.load(chunks + 3 * program + 1),
        tl.load(chunks + 3 * program + 2),
    )
    at = first + tl.arange(0, CHUNK)
    inside = at < size
    p_at = piece(addresses, 0, tensor, tensors, PARAM) + at
    m_at = piece(addresses, 2, tensor, tensors, STATE) + at
    v_at = piece(addresses, 3, tensor, tensors, STATE) + at
    param = tl.load(p_at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(piece(addresses, 1, tensor, tensors, GRAD) + at, mask=inside, other=0.0).to(tl.float32)
    if DECOUPLED:
        param *= 1.0 - lr * decay
    else:
        grad += decay * param
    first_moment = beta1 * tl.load(m_at, mask=inside, other=0.0).to(tl.float32) + (1.0 - beta1) * grad
    second_moment = beta2 * tl.load(v_at, mask=inside, other=0.0).to(tl.float32) + (1.0 - beta2) * grad * grad
    param -= lr * (first_moment / correction1) / (tl.sqrt(second_moment / correction2) + eps)
    tl.store(p_at, param.to(PARAM), mask=inside)
    tl.store(m_at, first_moment.to(STATE), mask=inside)
    tl.store(v_at, second_moment.to(STATE), mask=inside)


@triton.jit
def sgd_kernel(
    chunks, addresses, tensors, lr, momentum, decay,
    PARAM: tl.constexpr, GRAD: tl.constexpr, MOMENTUM: tl.constexpr, FIRST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tensor, first, size = (
        tl.load(chunks + 3 * program),
        tl.load(chunks + 3 * program + 1),
        tl.load(chunks + 3 * program + 2),
    )
    at = first + tl.arange(0, CHUNK)
    inside = at < size
    p_at = piece(addresses, 0, tensor, tensors, PARAM) + at
    param = tl.load(p_at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(piece(addresses, 1, tensor, tensors, GRAD) + at, mask=inside, other=0.0).to(tl.float32)
    grad += decay * param
    if MOMENTUM:
        m_at = piece(addresses, 2, tensor, tensors, PARAM) + at
        if not FIRST:
            grad += momentum * tl.load(m_at, mask=inside, other=0.0).to(tl.float32)
        tl.store(m_at, grad.to(PARAM), mask=inside)
    tl.store(p_at, (param - lr * grad).to(PARAM), mask=inside)


def l2_norm(tensors: Sequence[Tensor]) -> Tensor:
    """fp32 scalar: square root of the sum of squares over all tensors (one dtype), in a fixed order,
    without a host sync.
    """
    if not tensors:
        return torch.zeros((), dtype=torch.float32)
    chunks, addresses = _plan(tensors)
    parts = torch.zeros(len(chunks), dtype=torch.float32, device=chunks.device)
    if len(chunks):
        l2_kernel[(len(chunks),)](
            chunks, addresses, parts, len(tensors), DTYPE=TL_DTYPE[tensors[0].dtype], CHUNK=CHUNK, num_warps=8
        )
    return parts.sum().sqrt_()


def scale(sources: Sequence[Tensor], targets: Sequence[Tensor], factor: float | Tensor) -> Tensor:
    """targets[i] = sources[i] * factor; returns a fp32 scalar, 1 if any product was not finite else 0."""
    if not sources:
        return torch.zeros((), dtype=torch.float32)
    chunks, addresses = _plan(sources, targets)
    bad = torch.zeros(len(chunks) + 1, dtype=torch.float32, device=chunks.device)
    by = factor.float() if isinstance(factor, Tensor) else torch.full((), factor, device=chunks.device)
    if len(chunks):
        scale_kernel[(len(chunks),)](
            chunks, addresses, by, bad, len(sources),
            SOURCE=TL_DTYPE[sources[0].dtype], TARGET=TL_DTYPE[targets[0].dtype], CHUNK=CHUNK, num_warps=8,
        )  # fmt: skip
    return bad.amax()


def adam(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool = True,
    bias_correction: bool = True,
) -> None:
    """One Adam(W) update in place; each list holds contiguous tensors of one dtype. `step` counts from 1."""
    if not params:
        return
    chunks, addresses = _plan(params, grads, exp_avgs, exp_avg_sqs)
    corrections = (1.0 - betas[0] ** step, 1.0 - betas[1] ** step) if bias_correction else (1.0, 1.0)
    if len(chunks):
        adam_kernel[(len(chunks),)](
            chunks, addresses, len(params), lr, *betas, eps, weight_decay, *corrections,
            PARAM=TL_DTYPE[params[0].dtype], GRAD=TL_DTYPE[grads[0].dtype], STATE=TL_DTYPE[exp_avgs[0].dtype],
            DECOUPLED=decoupled, CHUNK=CHUNK, num_warps=8,
        )  # fmt: skip


def sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    first_step: bool,
) -> None:
    """One SGD update in place; decay is added to the gradient, momentum buffers start as the first
    gradient.
    """
    if not params:
        return
    chunks, addresses = _plan(params, grads, momenta if momentum else params)
    if len(chunks):
        sgd_kernel[(len(chunks),)](
            chunks, addresses, len(params), lr, momentum, weight_decay,
            PARAM=TL_DTYPE[params[0].dtype], GRAD=TL_DTYPE[grads[0].dtype], MOMENTUM=momentum != 0.0,
            FIRST=first_step, CHUNK=CHUNK, num_warps=8,
        )  # fmt: skip
