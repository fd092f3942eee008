"""Write the first generation's nested layout, in the names that transformers' Megatron converters read."""

from __future__ import annotations

import argparse
import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import durable
from megatron.core.errors import CheckpointError
from tools.checkpoint import saver_mcore
from tools.checkpoint.hf_families import family_of_model
from tools.checkpoint.megatron_model import MegatronModel
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
    """Options of this saver: those of the mcore one, and one for converters under torch 2.6 and later."""
    saver_mcore.add_arguments(parser)
    parser.add_argument(
        "--without-args",
        action="store_true",
        help="write no arguments, which other programs' torch.load refuses by default since torch 2.6; "
        "hf_config.json says what transformers' converters need (--config_file)",
    )


def save_checkpoint(queue: Any, args: Namespace) -> None:
    """Write what the loader sends, and hf_config.json beside it for models that transformers' converters know.

    Those converters take the sizes from the arguments, but some settings, such as the epsilon of norms, only from there.
    """
    config: dict[str, Any] = {}

    def content(weights: Weights, saved: Namespace, md: Namespace) -> dict[str, Any]:
        if args.tokenizer_dir is not None:
            # How transformers' converters are told of a tokenizer.
            saved.tokenizer_type = "PretrainedFromHF"
            saved.tokenizer_name_or_path = str((Path(args.save_dir) / "tokenizer").absolute())
        state = saver_mcore.file_content(to_nested(weights, md), saved, md)
        try:
            config.update(family_of_model(md, None).config(md, saved, None))
        except CheckpointError:
            if args.without_args:
                raise
        if args.without_args:
            del state["args"]
        return state

    final = saver_mcore.write(queue, args, content)
    if config:
        durable.write_text(final / "hf_config.json", json.dumps(config, indent=2))


def verification_model(args: Namespace) -> MegatronModel | None:
    """The model that was written; None if its file says nothing about its architecture."""
    return None if args.without_args else saver_mcore.verification_model(args)


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
