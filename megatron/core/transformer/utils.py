"""Small helpers of the transformer layer: activations by name, masks, and the default checkpoint description."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.activations import openai_gelu
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel.placement import (
    make_sharded_object_for_checkpoint,
    make_sharded_tensors_for_checkpoint,
)

__all__ = [
    "attention_mask_func",
    "derived",
    "erf_gelu",
    "gelu_impl",
    "get_default_causal_mask",
    "get_linear_layer",
    "make_sharded_object_for_checkpoint",
    "make_sharded_tensors_for_checkpoint",
    "openai_gelu",
    "sharded_state_dict_default",
]


T = TypeVar("T")


def derived(value: T | None) -> T:
    """A configuration field that may be left open and is filled in when the configuration is made."""
    assert value is not None, "the configuration was not completed; build it with TransformerConfig(...)"
    return value


def get_linear_layer(
    rows: int, columns: int, init_method: Callable[[Tensor], Any] | None, perform_initialization: bool = True
) -> torch.nn.Linear:
    """A plain linear layer [*, rows] -> [*, columns], not split over ranks, with a zero bias."""
    layer = torch.nn.Linear(rows, columns)
    if perform_initialization:
        derived(init_method)(layer.weight)
    with torch.no_grad():
        layer.bias.zero_()
    return layer


@functools.lru_cache(maxsize=32)
def get_default_causal_mask(sq: int) -> Tensor:
    """[sq, sq] bool, True above the diagonal (= may not be seen). One copy per length."""
    return torch.triu(torch.ones(sq, sq, dtype=torch.bool), diagonal=1)


def attention_mask_func(attention_scores: Tensor, attention_mask: Tensor) -> Tensor:
    """Overwrite scores [b, np, sq, sk] with -10000 where the mask is True (in place).

    A finite value, so that a row with nothing to see becomes uniform instead of NaN.
    """
    attention_scores.masked_fill_(attention_mask, -10000.0)
    return attention_scores


def gelu_impl(x: Tensor) -> Tensor:
    """GELU by the tanh approximation of Hendrycks & Gimpel (arXiv:1606.08415)."""
    return openai_gelu(x)


def erf_gelu(x: Tensor) -> Tensor:
    """GELU by its definition x * Phi(x)."""
    return F.gelu(x)


def sharded_state_dict_default(
    module: torch.nn.Module, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
) -> ShardedStateDict:
    """The module's own `sharded_state_dict`, or its state dict described as replicated over tensor
    parallel ranks.
    """
    own = getattr(module, "sharded_state_dict", None)
    if own is not None:
        return own(prefix=prefix, sharded_offsets=sharded_offsets, metadata=metadata)
    state = module.state_dict(prefix="", keep_vars=True)
    return make_sharded_tensors_for_checkpoint(state, prefix, {}, sharded_offsets)
