"""The linear function of parallel layers with fp8 products: `tensor_parallel.linear` with other GEMMs.

Communication stays in the precision of the activations and overlaps as it does there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import fp8
from megatron.core.collectives import reduce_scatter_single
from megatron.core.fp8.operands import Fp8Operands, Quantized
from megatron.core.fp8.recipe import GRADIENT, INPUT
from megatron.core.fusions.grad_accumulation import choose as choose_wgrad_accumulation
from megatron.core.process_groups_config import group_size
from megatron.core.tensor_parallel.linear import Accumulate, _gather_start, _tensor_parallel_group


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


class _Fp8Linear(torch.autograd.Function):
    """y = x W^T + b; arguments as in `fp8_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        operands: Fp8Operands,
        fresh: bool,
        training: bool,
        sequence_parallel: bool,
        allreduce_dgrad: bool,
        group: ProcessGroup | None,
        accumulate: Accumulate | None,
    ) -> Tensor:
        """input [s, b, i] ([s/tp, b, i] with sequence_parallel), weight [o, i], bias [o] -> [s, b, o]."""
        ctx.gathers = sequence_parallel and group_size(group) > 1
        ctx.reduces = allreduce_dgrad and group_size(group) > 1
        whole = input
        if ctx.gathers:
            assert group is not None, "gathering needs a group"
            whole, work = _gather_start(input, group)
            work.wait()
        # What is gathered again for the weight gradient, or not wanted in fp8, is kept as it came.
        keeps_columns = operands.recipe.wgrad and not ctx.gathers and any(ctx.needs_input_grad)
        x = operands.quantize(INPUT, _flat(whole), record=training, columns=keeps_columns)
        w = operands.weight(weight, fresh=fresh, training=training)
        output = operands.forward(x, w, input.dtype)
        if bias is not None:
            output += bias
        ctx.save_for_backward(
            x.columns if keeps_columns else input, x.inverse_scale, weight, w.rows, w.columns, w.inverse_scale
        )
        ctx.operands, ctx.group, ctx.accumulate = operands, group, accumulate
        ctx.keeps_columns, ctx.has_bias, ctx.training = keeps_columns, bias is not None, training
        ctx.shape, ctx.dtype = input.shape, input.dtype
        return output.view(*whole.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """grad_output [s, b, o] -> gradients of input, weight (or into main_grad) and bias."""
        kept, x_inverse, weight, w_rows, w_columns, w_inverse = ctx.saved_tensors
        operands: Fp8Operands = ctx.operands
        wants_weight = ctx.needs_input_grad[1]
        in_fp8 = operands.recipe.wgrad and wants_weight
        whole, gathering = kept, None
        if ctx.gathers and wants_weight:
            whole, gathering = _gather_start(kept, ctx.group)
        flat_grad = _flat(grad_output)
        grad = operands.quantize(GRADIENT, flat_grad, record=ctx.training, columns=in_fp8)
        w = Quantized(w_rows, w_columns, w_inverse)
        grad_input = operands.input_gradient(grad, w, ctx.dtype)
        grad_input = grad_input.view(*grad_output.shape[:-1], -1)
        if gathering is not None:
            gathering.wait()

        sending = None
        if ctx.reduces:
            sending = dist.all_reduce(grad_input, group=ctx.group, async_op=True)
        elif ctx.gathers:
            partial, grad_input = grad_input, grad_input.new_empty(ctx.shape)
            sending = reduce_scatter_single(grad_input, partial, group=ctx.group, async_op=True)

        grad_weight = grad_bias = None
        if in_fp8:
            x = Quantized(kept, kept, x_inverse)
            if ctx.gathers:
                x = operands.quantize(INPUT, _flat(whole), record=False, columns=True)
            target = weight.main_grad if ctx.accumulate is not None else None
            product = operands.weight_gradient(grad, x, ctx.dtype if target is None else target.dtype)
            if target is None:
                grad_weight = product.to(fp8.weights.dtype_of(weight))
            else:
                target.add_(product)
                weight.grad_added_to_main_grad = True
        elif wants_weight and ctx.accumulate is not None:
            ctx.accumulate(_flat(whole), flat_grad, weight.main_grad)
            weight.grad_added_to_main_grad = True
        elif wants_weight:
            grad_weight = flat_grad.t().matmul(_flat(whole))
        if grad_weight is not None and operands.kept_weight is not None:
            # Autograd would round it to fp8, which is what the parameter's numbers are.
            weight.main_grad.add_(grad_weight)
            weight.grad_added_to_main_grad = True
            grad_weight = None
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = flat_grad.sum(dim=0)
        if sending is not None:
            sending.wait()
        return (grad_input, grad_weight, grad_bias, *[None] * 7)


def fp8_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    operands: Fp8Operands,
    *,
    fresh: bool,
    training: bool,
    gradient_accumulation_fusion: bool,
    sequence_parallel: bool,
    allreduce_dgrad: bool,
    group: ProcessGroup | None = None,
    accumulate: Accumulate | None = None,
) -> Tensor:
    """input x weight^T + bias in fp8: [s, b, i] ([s/tp, b, i] with sequence_parallel) x [o, i] -> [s, b, o].

    fresh: the weight has changed since it was last quantised. training: note magnitudes for later steps. The rest is as
    in `linear_with_grad_accumulation_and_async_allreduce`. s x b (of the whole sequence) must be a multiple of 16 where
    the products run on matrix units.
    """
    if not (gradient_accumulation_fusion and hasattr(weight, "main_grad")):
        accumulate = None
    elif accumulate is None:
        accumulate = choose_wgrad_accumulation(input.device.type, input.dtype)
    return _Fp8Linear.apply(
        input,
        weight,
        bias,
        operands,
        fresh,
        training,
        sequence_parallel,
        allreduce_dgrad,
        _tensor_parallel_group(group),
        accumulate,
    )
