"""Which numbers fp8 training uses and where it applies: plain values, no tensors of a model.

fp8 has two formats (Micikevicius et al., arXiv:2209.05433): e4m3 with 3 bits of mantissa and a largest value of 448, and
e5m2 with 2 bits and 57344. A tensor is multiplied by a scale that brings its largest magnitude (amax) near that value.
`tensorwise` scaling takes the amax of the tensor at hand; `delayed` scaling that of earlier steps, which spares a pass
over the tensor.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

#: Operands of the three products of a linear layer, in the order of its scales.
INPUT, WEIGHT, GRADIENT = range(3)


@dataclass(frozen=True)
class Recipe:
    """How the operands of linear layers become fp8.

    forward, backward: formats of inputs and weights, and of gradients. delayed: scales from `history` earlier steps,
    by the last (`most_recent`) or the largest (`max`) amax. margin: powers of two kept free below the largest value.
    wgrad: whether weight gradients are fp8 products too.
    """

    forward: torch.dtype = torch.float8_e4m3fn
    backward: torch.dtype = torch.float8_e5m2
    delayed: bool = True
    history: int = 1
    largest_of_history: bool = False
    margin: int = 0
    wgrad: bool = True

    def format(self, role: int) -> torch.dtype:
        """The format of an operand by its role."""
        return self.backward if role == GRADIENT else self.forward

    def scale(self, amax: Tensor, fmt: torch.dtype) -> Tensor:
        """Factors that bring magnitudes up to `amax` (fp32, any shape) into `fmt`; 1 where amax says nothing.

        A power of two would be exact; like Transformer Engine's, the factor uses the whole range instead.
        """
        top = torch.finfo(fmt).max * 2.0**-self.margin
        scale = (top / amax).clamp(max=torch.finfo(torch.float32).max)
        return torch.where((amax > 0) & amax.isfinite(), scale, 1.0)


def recipe_of(config: ModelParallelConfig | TransformerConfig) -> Recipe | None:
    """The recipe that a configuration asks for, None without fp8 (which only a transformer's has)."""
    if getattr(config, "fp8", None) is None:
        return None
    config = cast("TransformerConfig", config)
    return Recipe(
        backward=torch.float8_e5m2 if config.fp8 == "hybrid" else torch.float8_e4m3fn,
        delayed=config.fp8_recipe == "delayed",
        history=config.fp8_amax_history_len,
        largest_of_history=config.fp8_amax_compute_algo == "max",
        margin=config.fp8_margin,
        wgrad=config.fp8_wgrad,
    )


def in_high_precision(config: TransformerConfig) -> TransformerConfig:
    """The configuration for a part that stays out of fp8: output layers, first and last layers."""
    if config.fp8 is None:
        return config
    plain = copy.copy(config)
    plain.fp8 = None
    return plain


def config_of_layer(config: TransformerConfig, index: int) -> TransformerConfig:
    """The configuration of layer `index` (0-based, over the whole model) under `first_last_layers_bf16`."""
    first, last = config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16
    at_the_ends = index < first or index >= config.num_layers - last
    return in_high_precision(config) if config.first_last_layers_bf16 and at_the_ends else config
