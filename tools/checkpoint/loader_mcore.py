"""Read Megatron checkpoints: torch format in any layout and of any age, or torch_dist; no model is built."""

from __future__ import annotations

import argparse
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from tools.checkpoint import names
from tools.checkpoint.megatron_model import MegatronModel
from tools.checkpoint.sources import DistributedSource, TorchSource, open_source, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this loader."""
    group = parser.add_argument_group(title="Megatron loader")
    group.add_argument("--true-vocab-size", type=int, help="vocabulary size without padding rows")
    group.add_argument("--vocab-file", help="JSON vocabulary whose length is the size without padding rows")
    group.add_argument("--megatron-path", help="accepted for older command lines; not needed")
    group.add_argument(
        "--position-embedding-type", default="learned_absolute", help="for files that do not say"
    )
    group.add_argument(
        "--loader-transformer-impl", choices=["local", "transformer_engine"], help="either is read"
    )


def load_checkpoint(queue: Any, args: Namespace) -> None:
    """Send the checkpoint at `args.load_dir`, one layer at a time."""
    source = open_source(args.load_dir, args.model_type)
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
        true_size = len(json.loads(Path(args.vocab_file).read_text()))
    positions = getattr(args, "position_embedding_type", "learned_absolute")
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
        position_embedding_type=getattr(saved, "position_embedding_type", positions),
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
