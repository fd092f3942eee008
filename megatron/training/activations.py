"""Activation functions under the path scripts know; they live in core."""

from megatron.core.activations import quick_gelu, squared_relu

__all__ = ["quick_gelu", "squared_relu"]
