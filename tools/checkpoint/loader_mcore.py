"""Read Megatron checkpoints: torch format in any layout and of any age, or torch_dist; no model is built."""

from __future__ import annotations

import argparse
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron.core.errors import FlagError
from tools.checkpoint import names
from tools.checkpoint.megatron_model import MegatronModel
from tools.checkpoint.options import WithoutEffect, positive
from tools.checkpoint.sources import DistributedSource, TorchSource, open_source, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this loader."""
    group = parser.add_argument_group(title="Megatron loader")
    group.add_argument("--true-vocab-size", type=positive, help="vocabulary size without padding rows")
    group.add_argument("--vocab-file", help="JSON vocabulary whose length is the size without padding rows")
    group.add_argument("--megatron-path", action=WithoutEffect, help="nothing is imported from elsewhere")
    group.add_argument("--position-embedding-type", action=WithoutEffect, help="the checkpoint says it")
    group.add_argument(
        "--loader-transformer-impl",
        action=WithoutEffect,
        choices=["local", "transformer_engine"],
        help="checkpoints of either are read",
    )


def load_checkpoint(queue: Any, args: Namespace) -> None:
    """Send the checkpoint at `args.load_dir`, one layer at a time."""
    source = open_source(args.load_dir, args.model_type)
    if args.vocab_file is not None and args.true_vocab_size is not None:
        print("--vocab-file has no effect beside --true-vocab-size", file=sys.stderr)
    md = metadata(source, args)
    queue.put(md)
    for message in names.messages(md):
        queue.put({"name": message.name, **whole(source, message)})
    queue.put("done")


def verification_model(args: Namespace) -> MegatronModel:
    """The model that was read, to compare with what was written."""
    source = open_source(args.load_dir, args.model_type)
    return MegatronModel(source, metadata(source, args))


def metadata(source: TorchSource | DistributedSource, args: Namespace) -> Namespace:
    """What a saver must know of the checkpoint."""
    saved = source.args
    true_size = getattr(args, "true_vocab_size", None)
    if true_size is None and getattr(args, "vocab_file", None) is not None:
        true_size = _entries(args.vocab_file)
    return Namespace(
        model_type=args.model_type,
        num_layers=saved.num_layers,
        hidden_size=saved.hidden_size,
        seq_length=saved.seq_length,
        num_attention_heads=saved.num_attention_heads,
        max_position_embeddings=saved.max_position_embeddings,
        tokenizer_type=saved.tokenizer_type,
        iteration=source.iteration,
        params_dtype=saved.params_dtype,
        bert_binary_head=getattr(saved, "bert_binary_head", True),
        output_layer=getattr(saved, "untie_embeddings_and_output_weights", False),
        position_embedding_type=saved.position_embedding_type,
        linear_bias=getattr(saved, "add_bias_linear", not getattr(saved, "disable_bias_linear", False)),
        norm_has_bias=getattr(saved, "normalization", "LayerNorm") == "LayerNorm",
        swiglu=getattr(saved, "swiglu", False),
        previous_tensor_parallel_size=saved.tensor_model_parallel_size,
        previous_pipeline_parallel_size=saved.pipeline_model_parallel_size,
        previous_expert_parallel_size=getattr(saved, "expert_model_parallel_size", None) or 1,
        num_experts=getattr(saved, "num_experts", None),
        true_vocab_size=true_size,
        make_vocab_size_divisible_by=getattr(saved, "make_vocab_size_divisible_by", None),
        checkpoint_args=saved,
        consumed_train_samples=getattr(saved, "consumed_train_samples", 0),
        consumed_valid_samples=getattr(saved, "consumed_valid_samples", 0),
        use_legacy_models=getattr(saved, "use_legacy_models", False),
    )


def _entries(vocab_file: str) -> int:
    """How many a JSON vocabulary has. FlagError if it cannot be read."""
    try:
        return len(json.loads(Path(vocab_file).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        fix = "check the path, or give the number itself as --true-vocab-size"
        raise FlagError(f"--vocab-file {vocab_file}", f"it is no JSON vocabulary ({error})", fix) from error
