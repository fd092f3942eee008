"""Write a HuggingFace directory of the family that the model belongs to: config.json and safetensors, in shards."""

from __future__ import annotations

import argparse
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from megatron.core.dist_checkpointing import durable
from megatron.core.errors import FlagError
from tools.checkpoint import names
from tools.checkpoint.hf_families import family_of_model
from tools.checkpoint.hf_model import HuggingFaceModel
from tools.checkpoint.hf_rules import Heads
from tools.checkpoint.loader_hf import Weights
from tools.checkpoint.options import positive
from tools.checkpoint.receiving import leftover, receive, receive_end, receive_metadata
from tools.checkpoint.streamed import SafetensorsFile

# Where the tokenizer belongs.
TOKENIZER_BESIDE_MODEL = True

_TABLES = {"embeddings": "word embeddings", "output layer": "weight", "lm head": "bias"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this saver."""
    group = parser.add_argument_group(title="HuggingFace saver")
    group.add_argument(
        "--max-shard-megabytes", type=positive, default=5000, help="size of one safetensors file"
    )
    group.add_argument(
        "--hf-model-type", help="llama, mistral or qwen2, where a model fits several; default: by its biases"
    )
    group.add_argument(
        "--hidden-act", choices=["gelu"], help="write exact GELU for a model trained with the fused tanh form"
    )


class ShardWriter:
    """Writes tensors as they come, beginning a new file when one is full."""

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self.directory, self._limit = directory, limit_bytes
        self._shards: list[SafetensorsFile] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor."""
        if not self._shards or not self._shards[-1].has_room(name, tensor, self._limit):
            if self._shards:
                self._shards[-1].finish()
            self._shards.append(SafetensorsFile(self.directory / f"part-{len(self._shards)}"))
        self._shards[-1].add(name, tensor)
        self.total_bytes += tensor.nbytes

    def finish(self) -> None:
        """Complete the last shard, give all their final names, and write the index if there are several."""
        self._shards[-1].finish()
        count = len(self._shards)
        if count == 1:
            self._shards[0].path.rename(self.directory / "model.safetensors")
            return
        where = {}
        for number, shard in enumerate(self._shards):
            name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            shard.path.rename(self.directory / name)
            where.update(dict.fromkeys(shard.names(), name))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": where}
        durable.write_text(self.directory / "model.safetensors.index.json", json.dumps(index, indent=1))


def save_checkpoint(queue: Any, args: Namespace) -> None:
    """Write what the loader sends; what no family can represent is refused by name."""
    md = receive_metadata(queue)
    saved = md.checkpoint_args
    if args.hidden_act is not None:
        if getattr(saved, "swiglu", False):
            raise FlagError("--hidden-act", "the model has SwiGLU, not GELU", "leave it out")
        saved.bias_gelu_fusion = False
    family = family_of_model(md, args.hf_model_type)
    if getattr(saved, "ffn_hidden_size", None) is None:
        saved.ffn_hidden_size = 4 * md.hidden_size
    rows = md.true_vocab_size
    if rows is not None:
        saved.padded_vocab_size = rows
    config = family.config(md, saved, args.hf_model_type)
    heads = Heads.of(saved)
    final = Path(args.save_dir)
    staged = durable.stage(final)
    writer = ShardWriter(staged, args.max_shard_megabytes * 2**20)
    for message in names.messages(md):
        tensors = receive(queue, message.name, args.checking)
        kind = message.name if message.layer is None else message.name.rpartition(" ")[0]
        if rows is not None and _TABLES.get(kind) in tensors:
            tensors[_TABLES[kind]] = tensors[_TABLES[kind]][:rows]
        if getattr(saved, "apply_layernorm_1p", False):
            _add_one(kind, tensors)
        family.before_write(kind, tensors, saved)
        prefix, rules = family.rules[kind]
        for rule in rules:
            for name, tensor in rule.write(tensors, prefix.format(message.layer), heads).items():
                writer.add(name, tensor)
        leftover(tensors, args.checking)
    receive_end(queue, args.save_dir)
    writer.finish()
    durable.write_text(staged / "config.json", json.dumps(config, indent=2))
    durable.publish(final)
    print(f"saved {final} ({config['model_type']}, {writer.total_bytes / 2**20:.1f} MiB)")


def verification_model(args: Namespace) -> HuggingFaceModel:
    """The model that was written, to compare with what was read."""
    directory = Path(args.save_dir)
    model = HuggingFaceModel(directory, args.model_type, Weights(directory).get)
    if args.hidden_act is not None:
        model.source_overrides = {"bias_gelu_fusion": False}
    return model


def _add_one(kind: str, tensors: dict[str, torch.Tensor]) -> None:
    """Norm weights that are stored as their distance from one."""
    for key in tensors:
        if key.endswith("norm weight") or (key == "weight" and kind.endswith("final norm")):
            tensors[key] = tensors[key] + 1
