"""Write the torch format with today's names, for any tensor-, pipeline- and expert-parallel size; no model is built."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.core.dist_checkpointing import durable
from megatron.core.errors import FlagError
from megatron.training.checkpointing.layout import Tracked, write_tracker
from megatron.training.checkpointing.state import portable_args
from tools.checkpoint import loader_mcore, names
from tools.checkpoint.megatron_model import MegatronModel
from tools.checkpoint.names import Entry, Message
from tools.checkpoint.options import WithoutEffect, positive
from tools.checkpoint.receiving import leftover, pad_vocabulary, receive, receive_end, receive_metadata
from tools.checkpoint.sources import open_source
from tools.checkpoint.streamed import Stored, TorchFile

Weights = dict[str, Any]

# The order of a model's modules in its state dict.
_SECTIONS = [
    "embedding",
    "position_embeddings",
    "encoder",
    "decoder",
    "lm_head",
    "output_layer",
    "binary_head",
    "pooler",
]


@dataclass(frozen=True)
class Sizes:
    """Tensor-, pipeline- and expert-parallel sizes of the target."""

    tp: int
    pp: int
    ep: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this saver."""
    group = parser.add_argument_group(title="Megatron saver")
    group.add_argument("--megatron-path", action=WithoutEffect, help="nothing is imported from elsewhere")
    group.add_argument("--target-tensor-parallel-size", type=positive, help="default: as in the source")
    group.add_argument("--target-pipeline-parallel-size", type=positive, help="default: as in the source")
    group.add_argument(
        "--target-expert-parallel-size", type=positive, default=1, help="for models with experts"
    )
    group.add_argument(
        "--saver-transformer-impl",
        action=WithoutEffect,
        choices=["local", "transformer_engine"],
        help="what is written loads into layers of either",
    )


def save_checkpoint(queue: Any, args: Namespace) -> None:
    """Write what the loader sends."""
    write(queue, args, file_content)


def verification_model(args: Namespace) -> MegatronModel:
    """The model that was written, to compare with what was read."""
    source = open_source(args.save_dir, args.model_type)
    only_the_kind = Namespace(model_type=args.model_type)
    return MegatronModel(source, loader_mcore.metadata(source, only_the_kind))


def target_sizes(md: Namespace, args: Namespace) -> Sizes:
    """The sizes asked for, or the source's; FlagError if the model cannot be cut so."""
    tp = args.target_tensor_parallel_size or md.previous_tensor_parallel_size or 1
    pp = args.target_pipeline_parallel_size or md.previous_pipeline_parallel_size or 1
    ep = args.target_expert_parallel_size or 1
    groups = md.num_attention_heads
    if getattr(md.checkpoint_args, "group_query_attention", False):
        groups = md.checkpoint_args.num_query_groups
    if md.num_attention_heads % tp or groups % tp:
        raise FlagError(
            "--target-tensor-parallel-size",
            f"{tp} does not divide the {md.num_attention_heads} attention heads or the {groups} query groups",
            "choose a size that divides both",
        )
    if md.num_layers % pp:
        why = f"{pp} does not divide the {md.num_layers} layers"
        raise FlagError("--target-pipeline-parallel-size", why, "choose a size that does")
    if md.model_type == "T5" and pp > 1:
        raise FlagError(
            "--target-pipeline-parallel-size",
            "T5 is written for one stage",
            "use --saver torch_dist for any layout",
        )
    experts = getattr(md, "num_experts", None) or 1
    if experts % ep:
        why = (
            f"{ep} does not divide the {experts} experts"
            if experts > 1
            else "the model has no experts to divide"
        )
        raise FlagError("--target-expert-parallel-size", why, "choose a size that does, or leave it out")
    return Sizes(tp, pp, ep)


def write(queue: Any, args: Namespace, content: Callable[[Weights, Namespace, Namespace], Any]) -> Path:
    """Receive a model, cut it for every rank, and publish it; returns the checkpoint's directory.

    `content(weights, saved arguments, metadata)` makes what a rank's file holds of its weights.
    """
    md = receive_metadata(queue)
    sizes = target_sizes(md, args)
    root = Path(args.save_dir)
    tracked = Tracked(md.iteration) if md.iteration else Tracked(0, release=True)
    final = root / tracked.directory
    staged = durable.stage(final)
    checksums: dict[str, durable.Checksum] = {}
    saved_args = target_arguments(md, args, sizes)
    per_stage = md.num_layers // sizes.pp
    stage = _Stage(staged, 0, 0, sizes)
    tied: dict[str, Any] = {}

    def close() -> None:
        for name, checksum in stage.finish(lambda weights: content(weights, saved_args, md)):
            checksums[name] = checksum

    for message in names.messages(md):
        if sizes.pp > 1 and message.layer and message.layer % per_stage == 0:
            close()
            stage = _Stage(staged, stage.number + 1, message.layer, sizes)
        tensors = receive(queue, message.name, args.checking)
        size = pad_vocabulary(tensors, message.name, md, sizes.tp)
        if message.name == "embeddings":
            saved_args.padded_vocab_size = size
            if sizes.pp > 1 and not md.output_layer:
                # The last stage computes logits with its own copy of the tied embedding.
                tied = {"weight": tensors["word embeddings"]}
        stage.add(message, tensors)
        leftover(tensors, args.checking)
        if message.name == "final norm" and tied:
            stage.add(Message("output layer", names.OUTPUT_LAYER), tied)
    receive_end(queue, args.save_dir)
    close()
    durable.write_manifest(staged, checksums)
    durable.publish(final)
    write_tracker(str(root), tracked)
    cut = f"tensor parallel {sizes.tp}, pipeline parallel {sizes.pp}"
    print(f"saved {final} ({cut}{f', expert parallel {sizes.ep}' if sizes.ep > 1 else ''})")
    return final


class _Stage:
    """The files of a pipeline stage, written as tensors come."""

    def __init__(self, root: Path, number: int, first_layer: int, sizes: Sizes) -> None:
        self.number, self._first_layer, self._sizes = number, first_layer, sizes
        self._files: dict[tuple[int, int], tuple[str, TorchFile, Weights]] = {}
        for tensor_rank in range(sizes.tp):
            for expert_rank in range(sizes.ep):
                name = f"mp_rank_{tensor_rank:02d}" + (f"_{number:03d}" if sizes.pp > 1 else "")
                name += f"_{expert_rank:03d}" if sizes.ep > 1 else ""
                (root / name).mkdir()
                path = f"{name}/model_optim_rng.pt"
                self._files[tensor_rank, expert_rank] = (path, TorchFile(root / path), {})

    def add(self, message: Message, tensors: dict[str, Any]) -> None:
        """Cut the tensors of a message and write the parts; takes them out of `tensors`."""
        prefix = message.prefix
        if message.layer is not None:
            prefix = f"{message.stack}.layers.{message.layer - self._first_layer}."
        for entry in message.entries:
            parts = names.split(entry, tensors, self._sizes.tp)
            if parts is None:
                continue
            for (tensor_rank, expert_rank), (_, file, weights) in self._files.items():
                part = parts[tensor_rank]
                if part.dim() == 3:
                    self._add_experts(file, weights, prefix, entry, part, expert_rank)
                    continue
                stored = file.add(part)
                for name in (entry.name, *entry.aliases):
                    weights[prefix + name] = stored

    def _add_experts(
        self,
        file: TorchFile,
        weights: Weights,
        prefix: str,
        entry: Entry,
        part: torch.Tensor,
        expert_rank: int,
    ) -> None:
        for local, expert in enumerate(part.chunk(self._sizes.ep)[expert_rank]):
            name = entry.name.replace("mlp.", f"mlp.experts.local_experts.{local}.")
            weights[prefix + name] = file.add(expert)

    def finish(self, content: Callable[[Weights], Any]) -> list[tuple[str, durable.Checksum]]:
        """Complete the files; `content` makes what a file holds of its weights. Returns names and checksums."""
        return [
            (path, file.finish(content(dict(sorted(weights.items(), key=_section)))))
            for path, file, weights in self._files.values()
        ]


def _section(item: tuple[str, Stored]) -> int:
    return _SECTIONS.index(item[0].split(".")[0])


def file_content(model: Weights, saved_args: Namespace, md: Namespace) -> dict[str, Any]:
    """What a rank's file holds."""
    return {
        "args": saved_args,
        "checkpoint_version": 3.0,
        "iteration": md.iteration,
        "model": model,
        "num_floating_point_operations_so_far": 0,
    }


def target_arguments(md: Namespace, args: Namespace, sizes: Sizes, ckpt_format: str = "torch") -> Namespace:
    """The source's arguments with the target's layout."""
    saved = portable_args(md.checkpoint_args)
    changes = {
        "tensor_model_parallel_size": sizes.tp,
        "pipeline_model_parallel_size": sizes.pp,
        "virtual_pipeline_model_parallel_size": None,
        "num_layers_per_virtual_pipeline_stage": None,
        "expert_model_parallel_size": sizes.ep,
        "encoder_tensor_model_parallel_size": 0,
        "encoder_pipeline_model_parallel_size": 0,
        "world_size": sizes.tp * sizes.pp * sizes.ep,
        "data_parallel_size": 1,
        "sequence_parallel": getattr(saved, "sequence_parallel", False) and sizes.tp > 1,
        "moe_grouped_gemm": False,
        "ckpt_format": ckpt_format,
        "use_dist_ckpt": ckpt_format != "torch",
        "use_legacy_models": False,
        "no_save_optim": True,
        "no_save_rng": True,
        "use_distributed_optimizer": False,
        "save": args.save_dir,
        "load": None,
        "data_path": None,
    }
    vars(saved).update(changes)
    return saved
