"""Training with fp8 matrix products: number formats, scales, quantisation and products."""

from megatron.core.fp8.operands import Fp8Operands, Quantized, choose, update_scales
from megatron.core.fp8.recipe import Recipe, config_of_layer, in_high_precision, recipe_of

__all__ = [
    "Fp8Operands",
    "Quantized",
    "Recipe",
    "choose",
    "config_of_layer",
    "in_high_precision",
    "recipe_of",
    "update_scales",
]
