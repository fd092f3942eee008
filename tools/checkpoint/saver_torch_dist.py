"""Write the distributed format, which a run of any layout loads; tensor by tensor, by one process."""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from megatron.core.dist_checkpointing import durable
from megatron.core.dist_checkpointing.core import COMMON_FNAME, CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.filesystem_async import Item, write_item
from megatron.core.dist_checkpointing.strategies.torch import Described, write_index
from megatron.training.checkpointing.layout import Tracked, write_tracker
from tools.checkpoint import names, saver_mcore
from tools.checkpoint.names import Entry, Message
from tools.checkpoint.receiving import leftover, pad_vocabulary, receive, receive_end, receive_metadata
from tools.checkpoint.saver_mcore import target_arguments, target_sizes, verification_model
from tools.checkpoint.sources import FUSED_NORMS

__all__ = ["add_arguments", "save_checkpoint", "verification_model"]

_DATA_FILE = "__0_0.distcp"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this saver: the sizes only shape the recorded arguments and the vocabulary's padding."""
    saver_mcore.add_arguments(parser)


def save_checkpoint(queue: Any, args: Namespace) -> None:
    """Write what the loader sends."""
    md = receive_metadata(queue)
    if md.model_type == "T5":
        md.previous_pipeline_parallel_size = 1
    sizes = target_sizes(md, args)
    saved = target_arguments(md, args, sizes, "torch_dist")
    root = Path(args.save_dir)
    # The format knows no releases; iteration 1 of a run without optimizer state is one.
    tracked = Tracked(md.iteration or 1)
    final = root / tracked.directory
    staged = durable.stage(final)
    writer = _Writer(staged, md)
    for message in names.messages(md):
        tensors = receive(queue, message.name, args.checking)
        size = pad_vocabulary(tensors, message.name, md, sizes.tp)
        if message.name == "embeddings":
            saved.padded_vocab_size = size
        for entry in message.entries:
            parts = names.split(entry, tensors, 1)
            if parts is not None:
                writer.add(message, entry, parts[0])
        leftover(tensors, args.checking)
    receive_end(queue, args.save_dir)
    common = {
        "args": saved,
        "checkpoint_version": 3.0,
        "iteration": tracked.iteration,
        "num_floating_point_operations_so_far": 0,
    }
    writer.finish(common)
    durable.publish(final)
    write_tracker(str(root), tracked)
    print(f"saved {final} (any layout)")


class _Writer:
    """The data file and the index of a checkpoint in the making."""

    def __init__(self, directory: Path, md: Namespace) -> None:
        self._directory, self._md = directory, md
        self._described: list[Described] = []
        self._written: list[Any] = []
        with durable.naming_path(directory / _DATA_FILE, "writing"):
            self._file = durable.ChecksumWriter(directory / _DATA_FILE)

    def _depth(self, stack: str) -> int:
        saved = self._md.checkpoint_args
        if self._md.model_type != "T5":
            return self._md.num_layers
        return names.encoder_depth(saved) if stack == "encoder" else names.decoder_depth(saved)

    def add(self, message: Message, entry: Entry, tensor: torch.Tensor) -> None:
        """Write a tensor under its key (layers are slices of one tensor) and, for linear modules, what v0.9 expects."""
        name = entry.name
        for fused, plain in FUSED_NORMS.items():
            if message.layer is not None:
                name = name.replace(plain, fused)
        experts = tensor.dim() == 3
        if experts:
            name = name.replace("mlp.", "mlp.experts.experts.")
        for one in (name, *entry.aliases):
            self._add(message, message.prefix + one, tensor, tensor.shape[0] if experts else 0)

    def _add(self, message: Message, key: str, tensor: torch.Tensor, experts: int) -> None:
        shape, offset, global_shape = tuple(tensor.shape), (0,) * tensor.dim(), tuple(tensor.shape)
        if message.layer is not None:
            depth = self._depth(message.stack)
            shape, offset, global_shape = (1, *shape), (message.layer, *offset), (depth, *shape)
        self._write(
            Item(key, offset, tensor.reshape(shape)),
            Described(key, offset, shape, global_shape, None, tensor.dtype),
        )
        module, _, leaf = key.rpartition(".")
        if leaf == "weight" and module.split(".")[-1].startswith("linear_"):
            for expert in range(experts) if experts else (None,):
                place = "" if expert is None else f".{expert}"
                size = "" if expert is None else f".{experts}"
                self._empty_state(
                    f"{module}._extra_state/shard_{message.layer}{place}_{self._depth(message.stack)}{size}"
                )
        elif leaf == "bias" and module.split(".")[-1] == "output_layer":
            self._empty_state(f"{module}._extra_state/shard_0_1")

    def _empty_state(self, key: str) -> None:
        """Parallel linear modules of v0.9 ask for a state that holds nothing."""
        self._write(Item(key, None, [None]), Described(key, None))

    def _write(self, item: Item, described: Described) -> None:
        with durable.naming_path(self._directory / _DATA_FILE, "writing"):
            self._written.append(write_item(self._file, item, _DATA_FILE))
        self._described.append(described)

    def finish(self, common: dict[str, Any]) -> None:
        """Write index, common part, checksums and, last, what declares the checkpoint complete."""
        with durable.naming_path(self._directory / _DATA_FILE, "writing"):
            self._file.close()
        checksums = {
            COMMON_FNAME: durable.save_file(common, self._directory / COMMON_FNAME),
            _DATA_FILE: self._file.checksum(),
        }
        write_index(self._directory, self._described, self._written, checksums)
        save_config(CheckpointingConfig("torch_dist"), self._directory)
