"""Write the first generation's nested layout, in the names that transformers' Megatron converters read."""

from __future__ import annotations

import argparse
import re
from argparse import Namespace
from typing import Any

from tools.checkpoint import saver_mcore
from tools.checkpoint.saver_mcore import Weights

# The order matters to readers: all layers, then the final norm.
_LAYER_RULES = [
    (r"\.pre_mlp_layernorm\.", ".post_attention_layernorm."),
    (r"\.self_attention\.linear_qkv\.", ".self_attention.query_key_value."),
    (r"\.self_attention\.linear_proj\.", ".self_attention.dense."),
    (r"\.mlp\.linear_fc1\.", ".mlp.dense_h_to_4h."),
    (r"\.mlp\.linear_fc2\.", ".mlp.dense_4h_to_h."),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this saver: those of the mcore one."""
    saver_mcore.add_arguments(parser)


def save_checkpoint(queue: Any, args: Namespace) -> None:
    """Write what the loader sends."""
    saver_mcore.write(queue, args, to_nested)


def to_nested(weights: Weights, md: Namespace) -> Weights:
    """The nested state dict of a rank, from today's names; tensors are the same."""
    language_model: dict[str, Any] = {}
    model: dict[str, Any] = {"language_model": language_model}
    stack = "encoder" if md.model_type == "BERT" else "decoder"
    for name, value in weights.items():
        top, _, rest = name.partition(".")
        if top == "embedding":
            table, _, leaf = rest.partition(".")
            language_model.setdefault("embedding", {}).setdefault(table, {})[leaf] = value
        elif top == stack:
            rest = f".{rest}"
            for pattern, replacement in _LAYER_RULES:
                rest = re.sub(pattern, replacement, rest)
            language_model.setdefault("encoder", {})[rest[1:]] = value
        elif top == "pooler":
            language_model.setdefault("pooler", {})[rest] = value
        elif name == "output_layer.bias":
            model.setdefault("lm_head", {})["bias"] = value
        elif top == "output_layer":
            if md.output_layer:
                language_model["output_layer"] = {"weight": value}
            else:
                model["word_embeddings_for_head"] = {"weight": value}
        else:
            model.setdefault(top, {})[rest.replace("layer_norm.", "layernorm.")] = value
    return model
