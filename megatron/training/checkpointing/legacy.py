"""Model weights under other names: the nested layout of the first Megatron generation, and renamed norms.

Weights of checkpoint versions 0, 1.0, 2.0 and 3.0 are turned into the names and the row order that today's
models have; values never change otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch

_EXTRA_STATE = re.compile(r"_extra_state\d*$")

# Applied in order to the dotted path of each tensor.
_NAME_RULES = [
    (r"^language_model\.", ""),
    (r"^(?:embedding\.)?(word|position|tokentype)_embeddings\.", r"embedding.\1_embeddings."),
    (r"^transformer\.", "encoder."),
    (r"\.attention\.", ".self_attention."),
    (r"^(encoder|decoder|lm_head)\.(.*?)layernorm", r"\1.\2norm"),
    (r"\.input_norm\.", ".input_layernorm."),
    (r"^(.*)\.post_inter_attention_norm\.", r"\1.pre_mlp_layernorm."),
    (r"\.final_norm\.", ".final_layernorm."),
    (r"\.inter_attention\.query\.", ".cross_attention.linear_q."),
    (r"\.inter_attention\.key_value\.", ".cross_attention.linear_kv."),
    (r"\.inter_attention\.dense\.", ".cross_attention.linear_proj."),
    (r"\.self_attention\.query_key_value\.", ".self_attention.linear_qkv."),
    (r"\.self_attention\.dense\.", ".self_attention.linear_proj."),
    (r"\.mlp\.local_experts\.", ".mlp.experts.local_experts."),
    (r"\.dense_h_to_4h\.", ".linear_fc1."),
    (r"\.dense_4h_to_h\.", ".linear_fc2."),
    (r"^word_embeddings_for_head\.", "output_layer."),
    (r"^lm_head\.norm\.", "lm_head.layer_norm."),
    (r"^lm_head\.bias$", "output_layer.bias"),
]

# The same norm in a layer built of plain modules and in one whose linear modules include the norm.
_NORM_NAMES = [
    (".input_layernorm.", ".self_attention.linear_qkv.layer_norm_"),
    (".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"),
    (".norm.", ".mixer.in_proj.layer_norm_"),
]


def is_nested_layout(weights: dict[str, Any]) -> bool:
    """Whether `weights` is the nested layout (`language_model`, or directly its parts)."""
    return any(isinstance(value, dict) for value in weights.values())


def adapt_weights(
    weights: dict[str, Any], wanted: Iterable[str], version: float, heads: int
) -> dict[str, Any]:
    """`weights` under the names that a model with the state-dict keys `wanted` expects.

    `heads` is the number of attention heads on this tensor-parallel rank, needed for `version` < 2.0 whose query,
    key and value rows come in another order. Of extra states the scales of fp8 layers are kept, which are plain numbers;
    another library's bytes are dropped, and absent ones are None. Names that match nothing are left for the model to
    report.
    """
    wanted = list(wanted)
    if is_nested_layout(weights):
        weights = _from_nested(weights, wanted)
        if version < 2.0:
            weights = {name: _reorder(name, value, version, heads) for name, value in weights.items()}
    adapted = {
        name: value for name, value in weights.items() if not _EXTRA_STATE.search(name) or _is_scales(value)
    }
    for name in wanted:
        if name in adapted:
            continue
        if _EXTRA_STATE.search(name):
            adapted[name] = None
        for plain, fused in _NORM_NAMES:
            for other in (name.replace(plain, fused), name.replace(fused, plain)):
                if name not in adapted and other != name and other in adapted:
                    adapted[name] = adapted.pop(other)
    return adapted


def _is_scales(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _from_nested(weights: dict[str, Any], wanted: list[str]) -> dict[str, Any]:
    own_stack = "encoder" if any(name.startswith("encoder.") for name in wanted) else "decoder"
    has_cross_attention = any("inter_attention" in name for name, _ in _flatten(weights))
    flat: dict[str, Any] = {}
    for name, value in _flatten(weights):
        for pattern, replacement in _NAME_RULES:
            name = re.sub(pattern, replacement, name)
        after_attention = "pre_mlp_layernorm"
        if has_cross_attention and name.startswith("decoder."):
            after_attention = "pre_cross_attn_layernorm"
        name = name.replace(".post_attention_norm.", f".{after_attention}.")
        if name.startswith("encoder."):
            name = own_stack + name[len("encoder") :]
        flat[name] = value
    if "output_layer.weight" in flat and "output_layer.weight" not in wanted:
        # A copy of the tied embedding that one-stage models do not have.
        del flat["output_layer.weight"]
    for name in wanted:
        # T5 registers some tensors under two names.
        alias = name.removeprefix("lm_head.") if name.startswith("lm_head.") else f"embedding.{name}"
        if name not in flat and alias in flat:
            flat[name] = flat[alias]
    return flat


def _flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat = []
    for key, value in tree.items():
        if isinstance(value, dict):
            flat += _flatten(value, f"{prefix}{key}.")
        else:
            flat.append((f"{prefix}{key}", value))
    return flat


def _reorder(name: str, value: Any, version: float, heads: int) -> Any:
    """Rows of fused projections into the order [heads, parts, head size] of versions 2.0 and later."""
    parts = 3 if ".linear_qkv." in name else 2 if ".linear_kv." in name else 0
    if not parts or not isinstance(value, torch.Tensor):
        return value
    rest = value.shape[1:]
    if version == 0:
        grouped = value.view(parts, heads, -1, *rest).transpose(0, 1)
    else:
        grouped = value.view(heads, -1, parts, *rest).transpose(1, 2)
    return grouped.reshape(value.shape)
