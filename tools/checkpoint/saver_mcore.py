"""Write the torch format with today's names, for any tensor- and pipeline-parallel size; no model is built."""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron.core.dist_checkpointing import durable
from megatron.core.errors import CheckpointError, FlagError
from megatron.training.checkpointing.layout import Tracked, write_tracker
from megatron.training.checkpointing.state import portable_args
from tools.checkpoint import names
from tools.checkpoint.names import Entry

Weights = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this saver."""
    group = parser.add_argument_group(title="Megatron saver")
    group.add_argument("--megatron-path", help="accepted for older command lines; not needed")
    group.add_argument("--target-tensor-parallel-size", type=int, help="default: as in the source")
    group.add_argument("--target-pipeline-parallel-size", type=int, help="default: as in the source")
    group.add_argument("--saver-transformer-impl", default="local", choices=["local", "transformer_engine"])


def save_checkpoint(queue: Any, args: Namespace) -> None:
    """Write what the loader sends."""
    write(queue, args, lambda weights, md: weights)


def write(queue: Any, args: Namespace, rename: Callable[[Weights, Namespace], Weights]) -> None:
    """Receive a model, cut it for every rank, and publish it; `rename` gives the state dict its final form."""
    md = receive_metadata(queue)
    tp = args.target_tensor_parallel_size or md.previous_tensor_parallel_size or 1
    pp = args.target_pipeline_parallel_size or md.previous_pipeline_parallel_size or 1
    _check_sizes(md, tp, pp)
    stack = "encoder" if md.model_type == "BERT" else "decoder"
    root = Path(args.save_dir)
    tracked = Tracked(md.iteration) if md.iteration else Tracked(0, release=True)
    final = root / tracked.directory
    staged, checksums = durable.stage(final), {}
    saved_args = _arguments(md, args, tp, pp)

    embeddings = receive(queue, "embeddings", args.checking)
    saved_args.padded_vocab_size = _pad_vocabulary(embeddings, "word embeddings", md, tp)
    embedding_parts = _cut(embeddings, names.EMBEDDINGS, "", tp, args.checking)
    tied = [weights["embedding.word_embeddings.weight"] for weights in embedding_parts]
    for stage in range(pp):
        ranks: list[Weights] = [dict(embedding_parts[rank]) if stage == 0 else {} for rank in range(tp)]
        for local in range(md.num_layers // pp):
            layer = stage * (md.num_layers // pp) + local
            message = receive(queue, f"transformer layer {layer}", args.checking)
            _extend(ranks, _cut(message, names.LAYER, f"{stack}.layers.{local}.", tp, args.checking))
        if stage == pp - 1:
            _extend(
                ranks,
                _cut(
                    receive(queue, "final norm", args.checking),
                    names.FINAL_NORM,
                    f"{stack}.",
                    tp,
                    args.checking,
                ),
            )
            if md.output_layer:
                message = receive(queue, "output layer", args.checking)
                _pad_vocabulary(message, "weight", md, tp)
                _extend(ranks, _cut(message, names.OUTPUT_LAYER, "", tp, args.checking))
            elif pp > 1:
                # The last stage computes logits with its own copy of the tied embedding.
                _extend(ranks, [{"output_layer.weight": part} for part in tied])
            if md.model_type == "BERT":
                _bert_heads(queue, ranks, md, tp, args.checking)
        for rank, weights in enumerate(ranks):
            directory = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
            (staged / directory).mkdir()
            # Parts are views of whole tensors; only the part may reach the file.
            own = {name: value.clone() for name, value in weights.items()}
            state = {
                "args": saved_args,
                "checkpoint_version": 3.0,
                "iteration": md.iteration,
                "model": rename(own, md),
                "num_floating_point_operations_so_far": 0,
            }
            checksums[f"{directory}/model_optim_rng.pt"] = durable.save_file(
                state, staged / directory / "model_optim_rng.pt"
            )
    if receive_any(queue) != "done":
        raise CheckpointError(
            args.save_dir, "the loader sent more than the model has", "pass --no-checking to ignore it"
        )
    durable.write_manifest(staged, checksums)
    durable.publish(final)
    write_tracker(str(root), tracked)
    print(f"saved {final} (tensor parallel {tp}, pipeline parallel {pp})")


def receive_any(queue: Any) -> Any:
    """The next message. CheckpointError if the loader failed."""
    message = queue.get()
    if isinstance(message, str) and message == "exit":
        raise CheckpointError("conversion", "the loader stopped")
    return message


def receive_metadata(queue: Any) -> Namespace:
    """The namespace with which every conversion begins."""
    return receive_any(queue)


def receive(queue: Any, name: str, checking: bool) -> dict[str, Any]:
    """The message of that name, without its name."""
    message = receive_any(queue)
    found = message.pop("name") if isinstance(message, dict) else message
    if found != name and checking:
        raise CheckpointError("conversion", f"expected the message {name!r}, the loader sent {found!r}")
    return message


def _cut(
    message: dict[str, Any], entries: tuple[Entry, ...], prefix: str, tp: int, checking: bool
) -> list[Weights]:
    ranks: list[Weights] = [{} for _ in range(tp)]
    for entry in entries:
        parts = names.split(entry, message, tp)
        if parts is not None:
            for weights, part in zip(ranks, parts):
                weights[prefix + entry.name] = part
    if message and checking:
        why = f"the loader sent {', '.join(message)}, which this model has no place for"
        raise CheckpointError("conversion", why, "pass --no-checking to leave it out")
    return ranks


def _extend(ranks: list[Weights], more: list[Weights]) -> None:
    for weights, addition in zip(ranks, more):
        weights.update(addition)


def _bert_heads(queue: Any, ranks: list[Weights], md: Namespace, tp: int, checking: bool) -> None:
    pooler = receive(queue, "pooler", checking)
    head = receive(queue, "lm head", checking)
    _pad_vocabulary(head, "bias", md, tp)
    _extend(ranks, _cut(head, names.LM_HEAD, "", tp, checking))
    if md.bert_binary_head:
        _extend(ranks, _cut(receive(queue, "binary head", checking), names.BINARY_HEAD, "", tp, checking))
    _extend(ranks, _cut(pooler, names.POOLER, "", tp, checking))


def _pad_vocabulary(message: dict[str, Any], key: str, md: Namespace, tp: int) -> int:
    """Make the table as long as this many ranks need; rows are cut or the last one repeated. Returns its length."""
    if key not in message:
        return 0
    table = message[key]
    if md.true_vocab_size is None:
        if table.shape[0] % tp:
            why = f"{table.shape[0]} rows cannot be cut into {tp} parts"
            raise FlagError(
                "--target-tensor-parallel-size", why, "add --true-vocab-size so that the table is padded anew"
            )
        return table.shape[0]
    multiple = (md.make_vocab_size_divisible_by or 128) * tp
    size = -(-md.true_vocab_size // multiple) * multiple
    if size > table.shape[0]:
        filling = table[-1:].expand(size - table.shape[0], *table.shape[1:])
        message[key] = torch.cat([table, filling])
    else:
        message[key] = table[:size]
    return size


def _check_sizes(md: Namespace, tp: int, pp: int) -> None:
    groups = getattr(md.checkpoint_args, "num_query_groups", None)
    if not getattr(md.checkpoint_args, "group_query_attention", False):
        groups = md.num_attention_heads
    if md.num_attention_heads % tp or (groups and groups % tp):
        raise FlagError(
            "--target-tensor-parallel-size", f"{tp} does not divide the attention heads or query groups"
        )
    if md.num_layers % pp:
        raise FlagError("--target-pipeline-parallel-size", f"{pp} does not divide the {md.num_layers} layers")


def _arguments(md: Namespace, args: Namespace, tp: int, pp: int) -> Namespace:
    """The source's arguments with the target's layout."""
    saved = portable_args(md.checkpoint_args)
    changes = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": None,
        "num_layers_per_virtual_pipeline_stage": None,
        "expert_model_parallel_size": 1,
        "world_size": tp * pp,
        "data_parallel_size": 1,
        "sequence_parallel": getattr(saved, "sequence_parallel", False) and tp > 1,
        "ckpt_format": "torch",
        "use_dist_ckpt": False,
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
