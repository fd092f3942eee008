"""The linear function of parallel layers: its gradient communication runs while its GEMMs do.

With gradient accumulation fusion a weight's gradient goes straight into its main_grad: autograd gets none for it (hooks
of the parameter run all the same) and `grad_added_to_main_grad` tells the data-parallel wrapper.

Backward of y = x W^T needs dx = dy W and dW = dy^T x. Tensor parallelism must sum dx over the ranks, sequence
parallelism must gather x again and reduce-scatter dx. Both transfers overlap with the GEMM that does not need their
result. (On the accelerator that takes CUDA_DEVICE_MAX_CONNECTIONS=1, so that the transfer is queued first.) How the GEMM
that does need it can overlap as well is in `overlap.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import parallel_state
from megatron.core.collectives import all_gather_single, reduce_scatter_single
from megatron.core.fusions.grad_accumulation import choose as choose_wgrad_accumulation
from megatron.core.fusions.linear import linear, uses_onednn
from megatron.core.process_groups_config import group_size
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.overlap import BULK, Overlap, gather_and_multiply, multiply_and_scatter

#: (input [t, i], grad_output [t, o], main_grad [o, i]): main_grad += grad_output^T input.
Accumulate = Callable[[Tensor, Tensor, Tensor], None]


def _tensor_parallel_group(group: ProcessGroup | None) -> ProcessGroup | None:
    return parallel_state.resolve(None).tp if group is None else group


def _gather_start(input: Tensor, group: ProcessGroup) -> tuple[Tensor, dist.Work]:
    """Begin to join all ranks' tokens in the scratch pool: ([s, ..], handle to wait for)."""
    shape = (input.shape[0] * group.size(), *input.shape[1:])
    whole = parallel_state.get_global_memory_buffer().get_tensor(shape, input.dtype, "mpu")
    work = all_gather_single(whole, input.contiguous(), group=group, async_op=True)
    assert work is not None, "an asynchronous collective returns a handle"
    return whole, work


def prepare_input_tensors_for_wgrad_compute(
    grad_output: Tensor, all_gathered_input: Tensor
) -> tuple[Tensor, Tensor]:
    """Both operands of the weight-gradient GEMM as contiguous matrices: [s, b, o], [s, b, i] -> [t, o], [t, i]."""
    return (
        grad_output.contiguous().view(-1, grad_output.shape[-1]),
        all_gathered_input.contiguous().view(-1, all_gathered_input.shape[-1]),
    )


class LinearWithFrozenWeight(torch.autograd.Function):
    """y = x W^T + b where W and b get no gradient, so x need not be kept."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        group: ProcessGroup | None = None,
    ) -> Tensor:
        """input [.., i], weight [o, i], bias [o] -> [.., o]."""
        ctx.save_for_backward(weight)
        ctx.group = _tensor_parallel_group(group) if allreduce_dgrad else None
        return linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """grad_output [.., o] -> gradient of the input [.., i], summed over the group if asked for."""
        (weight,) = ctx.saved_tensors
        grad_input = linear(grad_output, weight.t())
        if group_size(ctx.group) > 1:
            dist.all_reduce(grad_input, group=ctx.group)
        return grad_input, None, None, None, None


class LinearWithGradAccumulationAndAsyncCommunication(torch.autograd.Function):
    """y = x W^T + b with overlapped gradient communication; arguments as in the function below."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        grad_output_buffer: list[Tensor] | None,
        wgrad_deferral_limit: int | None,
        group: ProcessGroup | None = None,
        accumulate: Accumulate | None = None,
        overlap: Overlap = BULK,
    ) -> Tensor:
        """input [s, b, i] ([s/tp, b, i] with sequence_parallel), weight [o, i], bias [o] -> [s, b, o]."""
        group = _tensor_parallel_group(group)
        ctx.save_for_backward(input, weight)
        ctx.has_bias, ctx.group, ctx.overlap = bias is not None, group, overlap
        ctx.gathers = sequence_parallel and group_size(group) > 1
        ctx.reduces = allreduce_dgrad and group_size(group) > 1
        ctx.accumulate = None
        if gradient_accumulation_fusion and hasattr(weight, "main_grad"):
            ctx.accumulate = accumulate or choose_wgrad_accumulation(input.device.type, input.dtype)
        ctx.grad_output_buffer = grad_output_buffer
        ctx.wgrad_deferral_limit = wgrad_deferral_limit or 0
        if ctx.gathers:
            assert group is not None, "gathering needs a group"
            if overlap.gathers:
                return gather_and_multiply(input, weight, bias, group)[1]
            input, work = _gather_start(input, group)
            work.wait()
        return linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """grad_output [s, b, o] -> gradients of input, weight (or into main_grad) and bias."""
        input, weight = ctx.saved_tensors
        deferred = _defer(ctx, grad_output)
        wants_weight = ctx.needs_input_grad[1] and not deferred
        overlap: Overlap = ctx.overlap

        gathered, gathering = input, None
        if ctx.gathers and wants_weight:
            gathered, gathering = _gather_start(input, ctx.group)
            if not overlap.bulk_dgrad:
                gathering.wait()
        piecewise = ctx.gathers and overlap.scatters_dgrad
        if piecewise:
            grad_input = multiply_and_scatter(grad_output, weight.t(), ctx.group)
        else:
            grad_input = linear(grad_output, weight.t())
        if gathering is not None:
            gathering.wait()

        sending = None
        if ctx.reduces:
            sending = dist.all_reduce(grad_input, group=ctx.group, async_op=True)
        elif ctx.gathers and not piecewise:
            partial, grad_input = grad_input, torch.empty_like(input)
            sending = reduce_scatter_single(grad_input, partial, group=ctx.group, async_op=True)
            if not overlap.bulk_wgrad:
                sending.wait()

        grad_weight = grad_bias = None
        if wants_weight:
            grad_weight = _weight_gradient(grad_output, gathered, weight, ctx.accumulate)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad_output.reshape(-1, grad_output.shape[-1]).sum(dim=0)
        if sending is not None:
            sending.wait()
        return (grad_input, grad_weight, grad_bias, *[None] * 8)


def _weight_gradient(
    grad_output: Tensor, input: Tensor, weight: Tensor, accumulate: Accumulate | None
) -> Tensor | None:
    """grad_output [s, b, o]^T input [s, b, i]: returned, or added into the weight's main_grad."""
    flat_grad, flat_input = prepare_input_tensors_for_wgrad_compute(grad_output, input)
    if accumulate is None:
        return flat_grad.t().matmul(flat_input)
    accumulate(flat_input, flat_grad, weight.main_grad)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return None


class _LinearScattered(torch.autograd.Function):
    """The product of a row-parallel layer, summed and scattered piece by piece; its gradient is gathered likewise."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, group: ProcessGroup, accumulate: Accumulate | None
    ) -> Tensor:
        """input [s, b, i/tp], weight [o, i/tp] -> [s/tp, b, o]."""
        ctx.save_for_backward(input, weight)
        ctx.group, ctx.accumulate = group, accumulate
        return multiply_and_scatter(input, weight, group)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """grad_output [s/tp, b, o] -> gradients of input and weight (or into main_grad)."""
        input, weight = ctx.saved_tensors
        whole, grad_input = gather_and_multiply(grad_output, weight.t(), None, ctx.group)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(whole, input, weight, ctx.accumulate)
        return grad_input, grad_weight, None, None


def linear_scattered_to_sequence_parallel_region(
    input: Tensor,
    weight: Tensor,
    gradient_accumulation_fusion: bool,
    group: ProcessGroup,
    accumulate: Accumulate | None = None,
) -> Tensor:
    """input x weight^T, summed over the group, this rank's tokens of it: [s, b, i/tp] x [o, i/tp] -> [s/tp, b, o].

    The transfers overlap with the product. All ranks of the group must call, here and in the backward pass.
    """
    if not (gradient_accumulation_fusion and hasattr(weight, "main_grad")):
        accumulate = None
    elif accumulate is None:
        accumulate = choose_wgrad_accumulation(input.device.type, input.dtype)
    return _LinearScattered.apply(input, weight, group, accumulate)


def _defer(ctx: Any, grad_output: Tensor) -> bool:
    """Put the weight gradient off until `drain_embedding_wgrad_compute`, as long as the limit allows."""
    buffer, limit = ctx.grad_output_buffer, ctx.wgrad_deferral_limit
    if buffer is None or (limit and len(buffer) >= limit):
        return False
    buffer.append(grad_output)
    return True


def linear_with_frozen_weight(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gradient_accumulation_fusion: bool,
    async_grad_allreduce: bool,
    sequence_parallel: bool,
    grad_output_buffer: None = None,
    wgrad_deferral_limit: None = None,
    allreduce_dgrad: bool | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """`linear_with_grad_accumulation_and_async_allreduce` for a weight that is not trained: x is not kept.

    async_grad_allreduce is the old name of allreduce_dgrad and counts where the latter is not given.
    """
    assert grad_output_buffer is None, "grad_output_buffer kwarg is only supported with a trained weight"
    assert wgrad_deferral_limit is None, "wgrad_deferral_limit kwarg is only supported with a trained weight"
    if sequence_parallel:
        input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=group)
    reduces = async_grad_allreduce if allreduce_dgrad is None else allreduce_dgrad
    return LinearWithFrozenWeight.apply(input, weight, bias, reduces, group)


def linear_with_grad_accumulation_and_async_allreduce(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gradient_accumulation_fusion: bool,
    sequence_parallel: bool,
    allreduce_dgrad: bool,
    async_grad_allreduce: bool | None = None,
    grad_output_buffer: list[Tensor] | None = None,
    wgrad_deferral_limit: int | None = 0,
    group: ProcessGroup | None = None,
    accumulate: Accumulate | None = None,
    overlap: Overlap = BULK,
) -> Tensor:
    """input x weight^T + bias: [s, b, i] ([s/tp, b, i] with sequence_parallel) x [o, i] -> [s, b, o].

    gradient_accumulation_fusion: add the weight gradient into `weight.main_grad` inside its GEMM.
    sequence_parallel: gather the input's tokens first, reduce-scatter its gradient.
    allreduce_dgrad: sum the input's gradient over the group (not together with sequence_parallel).
    grad_output_buffer, wgrad_deferral_limit: collect up to so many (0 = all) output gradients and leave the weight
    gradient to `drain_embedding_wgrad_compute`. accumulate: the fused function, chosen here if None. overlap: how
    sequence parallelism's transfers run beside the products.
    """
    if async_grad_allreduce is not None:
        warnings.warn("async_grad_allreduce is not used any more; allreduce_dgrad decides", stacklevel=2)
    kind = input.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        input, weight = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    alone = group_size(_tensor_parallel_group(group)) == 1
    fuses = gradient_accumulation_fusion and hasattr(weight, "main_grad")
    if alone and not fuses and grad_output_buffer is None and not uses_onednn(input, weight):
        return F.linear(input, weight, bias)  # torch's own node: nothing to overlap or to accumulate
    return LinearWithGradAccumulationAndAsyncCommunication.apply(
        input,
        weight,
        bias,
        gradient_accumulation_fusion,
        allreduce_dgrad,
        sequence_parallel,
        grad_output_buffer,
        wgrad_deferral_limit,
        group,
        accumulate,
        overlap,
    )


def drain_embedding_wgrad_compute(
    config: Any,
    embedding_activation_buffer: list[Tensor],
    grad_output_buffer: list[Tensor],
    weight: Tensor,
    group: ProcessGroup | None = None,
) -> None:
    """Compute the weight gradients of the output layer that were put off, in order, into `weight.main_grad`.

    The two lists, activations [s(/tp), b, i] and output gradients [s, b, o], must pair up; both are emptied. With
    sequence parallelism the next activation is gathered while the current GEMM runs. All ranks of the
    tensor-parallel group must call.
    """
    assert len(embedding_activation_buffer) == len(grad_output_buffer), (
        f"{len(embedding_activation_buffer)} activations and {len(grad_output_buffer)} output gradients were "
        "collected; every forward pass needs its backward pass before the drain"
    )
    group = _tensor_parallel_group(group)
    gathers = config.sequence_parallel and group_size(group) > 1
    target = weight.main_grad if hasattr(weight, "main_grad") else _own_grad(weight)
    accumulate = choose_wgrad_accumulation(weight.device.type, weight.dtype)

    def fetch(index: int) -> tuple[Tensor, dist.Work | None]:
        activation = embedding_activation_buffer[index]
        if not gathers:
            return activation, None
        assert group is not None, "gathering needs a group"
        shape = (activation.shape[0] * group.size(), *activation.shape[1:])
        pool = parallel_state.get_global_memory_buffer()  # two buffers: one read, one being filled
        whole = pool.get_tensor(shape, activation.dtype, f"wgrad-{index % 2}")
        return whole, all_gather_single(whole, activation, group=group, async_op=True)

    pending = fetch(0) if grad_output_buffer else None
    for index, grad_output in enumerate(grad_output_buffer):
        assert pending is not None, "an activation is fetched for every output gradient"
        activation, work = pending
        if work is not None:
            work.wait()
        pending = fetch(index + 1) if index + 1 < len(grad_output_buffer) else None
        flat_grad, flat_input = prepare_input_tensors_for_wgrad_compute(grad_output, activation)
        accumulate(flat_input, flat_grad, target)
    embedding_activation_buffer.clear()
    grad_output_buffer.clear()


def _own_grad(weight: Tensor) -> Tensor:
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad
