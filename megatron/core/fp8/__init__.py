"""Training with fp8 matrix products: number formats, scales, quantisation and products."""

from megatron.core.fp8.operands import Fp8Operands, Quantized, choose, update_scales
from megatron.core.fp8.recipe import Recipe, config_of_layer, in_high_precision, recipe_of
from megatron.core.fp8.weights import Fp8Weight

__all__ = [
    "Fp8Operands",
    "Fp8Weight",
    "Quantized",
    "Recipe",
    "choose",
    "config_of_layer",
    "in_high_precision",
    "recipe_of",
    "update_scales",
]
