"""Weights that live in fp8 (`--fp8-param-gather`): rounded where they are updated, sent to the other replicas as bytes.

Without it a weight is kept in bf16 and rounded at the start of every step. With it the owner of a piece rounds the same
bf16 values by the same scale and the fp8 numbers are what is gathered and kept, so products, losses and gradients are
those of a run without it, bit for bit, for half the bytes on the wire and two bytes less memory per weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import parallel_state
from megatron.core.fp8.quantize import largest, quantize
from megatron.core.fp8.recipe import WEIGHT
from megatron.core.process_groups_config import group_size

if TYPE_CHECKING:
    from megatron.core.fp8.operands import Fp8Operands


class Fp8Weight:
    """What the fp8 numbers of a parameter stand for: `numbers / scale`, in the precision it had before (`dtype`).

    `scale` is an fp32 scalar on the device, equal on all replicas. `given` holds values that were assigned whole
    until the optimizer has had them: rounding would take from its copy what the copy is there to keep.
    """

    def __init__(self, param: torch.nn.Parameter, operands: Fp8Operands) -> None:
        values = param.detach()
        self.param = param
        self.operands = operands
        self.dtype = values.dtype
        self.scale = torch.ones((), device=values.device)
        self.given: Tensor | None = None
        param.data = torch.empty_like(values, dtype=operands.recipe.format(WEIGHT))
        self.assign(values)

    def values(self) -> Tensor:
        """The weight [o, i] in its former precision; without what fp8 rounds away, unless it was just assigned."""
        if self.given is not None:
            return self.given
        return (self.param.detach().float() / self.scale).to(self.dtype)

    def as_record(self) -> Tensor:
        """`values()` for a state dict; `stands_for` leads the optimizer's checkpoints back to the parameter."""
        record = self.values().view_as(self.param)
        record.stands_for = self.param  # type: ignore[attr-defined]
        return record

    def assign(self, values: Tensor) -> None:
        """Take whole new values [o, i], equal on all replicas."""
        self.operands.forget_weight()
        self.restore(values)

    @torch.no_grad()
    def restore(self, values: Tensor) -> None:
        """Take values from a checkpoint, whose amax before they were rounded is known if its scales were."""
        self.given = values.detach().to(self.param.device, self.dtype)
        self.expect(largest(self.given))
        self.round(slice(None), self.given)

    def expect(self, amax: Tensor) -> None:
        """Fix the scale for values up to `amax` (fp32 scalar)."""
        self.operands.note_weight(amax)
        self.scale.copy_(self.operands.scale(WEIGHT, lambda: amax))

    def round(self, part: slice, values: Tensor) -> None:
        """Write `values` over a part of the flattened weight."""
        numbers, _ = quantize(values, self.scale, self.param.dtype)
        self.param.detach().view(-1)[part].copy_(numbers.view(-1))


class Update(NamedTuple):
    """New values of a part of a flattened weight, 1-D and of any precision."""

    weight: Fp8Weight
    part: slice
    values: Tensor


def of(param: Tensor) -> Fp8Weight | None:
    """What a parameter's fp8 numbers stand for; None for one that is kept in higher precision."""
    return getattr(param, "fp8_weight", None)


def values_of(param: Tensor) -> Tensor:
    """A parameter's values, detached: itself, or what its fp8 numbers stand for."""
    weight = of(param)
    return param.detach() if weight is None else weight.values()


def dtype_of(param: Tensor) -> torch.dtype:
    """The precision of a parameter's values, which is not that of fp8 numbers."""
    weight = of(param)
    return param.dtype if weight is None else weight.dtype


@torch.no_grad()
def update(weights: Sequence[Fp8Weight], updates: Sequence[Update], group: ProcessGroup | None) -> None:
    """Round this rank's updates of `weights`, all of one recipe, to scales that the replicas in `group` agree on.

    All replicas must call with the same weights in the same order; together they update each one whole. The amax of
    delayed scales is agreed over tensor ranks as well, as that of all operands is.
    """
    if not weights:
        return
    if weights[0].operands.recipe.delayed:
        group = parallel_state.resolve(None).tp_dp_cp
    mine = {new.weight: largest(new.values.to(new.weight.dtype)) for new in updates}
    nothing = torch.zeros_like(weights[0].scale)
    amax = torch.stack([mine.get(weight, nothing) for weight in weights])
    if group_size(group) > 1:
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)
    for weight, own in zip(weights, amax.unbind()):
        weight.expect(own)
        weight.given = None
    for new in updates:
        new.weight.round(new.part, new.values.to(new.weight.dtype))
