"""One linear layer in fp8: its scales, its quantised operands, its three products.

With x [t, i], W [o, i] and dy [t, o] the products are y = x W^T, dx = dy W and dW = dy^T x. The matrix units multiply
fp8 only along the last dimension of both operands, so each operand is kept as it is for one product and transposed for
the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import device
from megatron.core.errors import ConfigError
from megatron.core.fp8.quantize import largest
from megatron.core.fp8.recipe import GRADIENT, INPUT, WEIGHT, Recipe, recipe_of
from megatron.core.fp8.weights import Fp8Weight
from megatron.core.kernels import registry
from megatron.core.process_groups_config import group_size

if TYPE_CHECKING:
    from megatron.core.model_parallel_config import ModelParallelConfig

#: Sides of fp8 matrices are multiples of this many bytes.
ALIGNMENT = 16


@dataclass
class Quantized:
    """An operand in fp8: rows [r, c], columns [c, r] (the transposed copy) where a product needs it, and 1 / scale."""

    rows: Tensor
    columns: Tensor | None
    inverse_scale: Tensor


class Fp8Operands:
    """The scales of one linear layer and what is done with them.

    Under delayed scaling `history` fp32 [3, n] holds the amax of input, weight and gradient, the step in progress first,
    and `scales` fp32 [3] what follows from it. Before the first update (`known` is False) each tensor is scaled by its
    own amax.
    """

    def __init__(self, recipe: Recipe, kind: str, dtype: torch.dtype) -> None:
        self.recipe = recipe
        spec = registry.Spec(kind, dtype)
        self._quantize = registry.select("fp8_quantize", spec)
        self._multiply = registry.select("fp8_gemm", spec)
        self._weight: Quantized | None = None
        self.kept_weight: Fp8Weight | None = None
        self.known = False
        if recipe.delayed:
            self.history = torch.zeros(3, recipe.history, device=device.current())
            self.scales = torch.ones(3, device=device.current())

    def quantize(self, role: int, matrix: Tensor, *, record: bool, columns: bool) -> Quantized:
        """matrix [r, c] as the operand `role`; `record` its amax for later steps, also with a transposed copy."""
        fmt = self.recipe.format(role)
        matrix = matrix.detach()
        amax = self.history[role, 0] if self.recipe.delayed and record else None
        scale = self.scale(role, lambda: largest(matrix))
        rows, transposed = self._quantize(matrix, scale, fmt, amax, columns)
        return Quantized(rows, transposed, scale.reciprocal())

    def scale(self, role: int, amax: Callable[[], Tensor]) -> Tensor:
        """The scale (fp32 scalar) of the operand `role` now; `amax` is asked for its magnitude if it matters."""
        if self.recipe.delayed and self.known:
            return self.scales[role]
        return self.recipe.scale(amax(), self.recipe.format(role))

    def keep_weight(self, weight: torch.nn.Parameter) -> None:
        """From now on the parameter holds fp8 numbers, which are not quantised again."""
        self.kept_weight = weight.fp8_weight = Fp8Weight(weight, self)  # type: ignore[attr-defined]

    def note_weight(self, amax: Tensor) -> None:
        """Enter the amax (fp32 scalar) of a kept weight for the step to come, if it is not known."""
        if self.recipe.delayed:
            newest = self.history[WEIGHT, 0]
            newest.copy_(torch.where(newest > 0, newest, amax))

    def forget_weight(self) -> None:
        """Take back the amax of a kept weight for the step to come: the weight was replaced."""
        if self.recipe.delayed:
            self.history[WEIGHT, 0].zero_()

    def weight(self, weight: Tensor, *, fresh: bool, training: bool) -> Quantized:
        """The weight [o, i], quantised once per step: `fresh` says that it has changed since."""
        if not training:
            return self._weight_operand(weight, record=False, columns=weight.requires_grad)
        if fresh or self._weight is None:
            self._weight = self._weight_operand(weight, record=True, columns=True)
        return self._weight

    def _weight_operand(self, weight: Tensor, *, record: bool, columns: bool) -> Quantized:
        if self.kept_weight is None:
            return self.quantize(WEIGHT, weight, record=record, columns=columns)
        rows = weight.detach()
        scale = self.kept_weight.scale
        return Quantized(rows, rows.t().contiguous() if columns else None, scale.reciprocal())

    def forward(self, x: Quantized, weight: Quantized, dtype: torch.dtype) -> Tensor:
        """x W^T: [t, o]."""
        return self._multiply(x.rows, weight.rows, x.inverse_scale, weight.inverse_scale, dtype)

    def input_gradient(self, grad: Quantized, weight: Quantized, dtype: torch.dtype) -> Tensor:
        """dy W: [t, i]."""
        return self._multiply(
            grad.rows, weight.columns, grad.inverse_scale, weight.inverse_scale, dtype, False
        )

    def weight_gradient(self, grad: Quantized, x: Quantized, dtype: torch.dtype) -> Tensor:
        """dy^T x: [o, i]."""
        return self._multiply(grad.columns, x.columns, grad.inverse_scale, x.inverse_scale, dtype, False)

    # Scales of later steps ----------------------------------------------------------------------------------------

    def state(self) -> Tensor | None:
        """What a checkpoint keeps: fp32 [3, n + 1] in host memory, history and scale; None before it means anything."""
        if not (self.recipe.delayed and self.known):
            return None
        return torch.cat((self.history, self.scales[:, None]), dim=1).cpu()

    def load_state(self, state: Tensor | None) -> None:
        """Continue from `state`; one of another history length is left, and scales begin anew."""
        if self.recipe.delayed and isinstance(state, Tensor) and state.shape == (3, self.recipe.history + 1):
            self.history.copy_(state[:, :-1])
            self.scales.copy_(state[:, -1])
            self.known = True


def choose(config: ModelParallelConfig, inputs: int, outputs: int) -> Fp8Operands | None:
    """The fp8 operands of a linear layer with this many local inputs and outputs, None where it is not in fp8.

    ConfigError for sizes that fp8 products cannot have.
    """
    recipe = recipe_of(config)
    if recipe is None:
        return None
    if inputs % ALIGNMENT or outputs % ALIGNMENT:
        raise ConfigError(
            "--fp8-format",
            f"a linear layer of {inputs} x {outputs} per rank does not divide into blocks of {ALIGNMENT}",
            f"make --hidden-size and --ffn-hidden-size multiples of {ALIGNMENT} x --tensor-model-parallel-size",
        )
    return Fp8Operands(recipe, device.kind(), config.params_dtype)


@torch.no_grad()
def update_scales(operands: Sequence[Fp8Operands], group: ProcessGroup | None) -> None:
    """At the end of a step: agree on each amax over `group`, derive the scales of the next step, move the history on.

    All ranks of the group must call, with as many layers. No amax is waited for.
    """
    delayed = [layer for layer in operands if layer.recipe.delayed]
    if not delayed:
        return
    recipe = delayed[0].recipe
    histories = torch.stack([layer.history for layer in delayed])  # [layers, 3, n]
    if group_size(group) > 1:
        newest = histories[..., 0].contiguous()
        dist.all_reduce(newest, op=dist.ReduceOp.MAX, group=group)
        histories[..., 0] = newest
    amax = histories.amax(dim=-1) if recipe.largest_of_history else histories[..., 0]
    scales = torch.stack(
        [recipe.scale(amax[:, role], recipe.format(role)) for role in (INPUT, WEIGHT, GRADIENT)], dim=1
    )
    # An operand that was not seen (or overflowed) keeps the scale it had.
    seen = (amax > 0) & amax.isfinite()
    scales = torch.where(seen, scales, torch.stack([layer.scales for layer in delayed]))
    histories = histories.roll(1, dims=-1)
    histories[..., 0] = 0.0
    torch._foreach_copy_([layer.history for layer in delayed], list(histories.unbind()))
    torch._foreach_copy_([layer.scales for layer in delayed], list(scales.unbind()))
    for layer in delayed:
        layer.known = True
