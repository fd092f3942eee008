"""Read Megatron checkpoints: torch format in any layout and of any age, or torch_dist; no model is built."""

from __future__ import annotations

import argparse
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from megatron.core.dist_checkpointing import check_is_distributed_checkpoint, durable
from megatron.core.dist_checkpointing.core import COMMON_FNAME
from megatron.core.dist_checkpointing.safe_load import load_file
from megatron.core.dist_checkpointing.strategies.resharding import Box
from megatron.core.dist_checkpointing.strategies.torch import StoredTensors
from megatron.core.errors import CheckpointError
from megatron.training.checkpointing.layout import read_tracker
from megatron.training.checkpointing.legacy import adapt_weights, is_nested_layout
from tools.checkpoint import names
from tools.checkpoint.names import Entry

_REQUIRED = (
    "num_layers hidden_size seq_length num_attention_heads max_position_embeddings position_embedding_type "
    "tokenizer_type params_dtype tensor_model_parallel_size pipeline_model_parallel_size"
)


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
    source = _open(args.load_dir)
    saved = source.args
    missing = [name for name in _REQUIRED.split() if not hasattr(saved, name)]
    if missing:
        why = f"its arguments lack {', '.join(missing)}"
        raise CheckpointError(str(source.path), why, "load it into a run with --finetune and save it anew")
    queue.put(_metadata(source, args))
    gated = bool(getattr(saved, "swiglu", False))

    def send(name: str, entries: tuple[Entry, ...], prefix: str = "", layer: int | None = None) -> None:
        message: dict[str, Any] = {"name": name}
        for entry in entries:
            parts = source.parts(prefix + entry.name, layer)
            if parts is not None:
                message.update(names.merge(entry, parts, gated))
        queue.put(message)

    stack = source.stack
    send("embeddings", names.EMBEDDINGS)
    for layer in range(saved.num_layers):
        if source.parts(f"{stack}.layers.mlp.router.weight", layer) is not None:
            why = "expert layers are not converted"
            raise CheckpointError(
                str(source.path), why, "use --ckpt-convert-format torch_dist, which holds experts whole"
            )
        send(f"transformer layer {layer}", names.LAYER, f"{stack}.layers.", layer)
    send("final norm", names.FINAL_NORM, f"{stack}.")
    if saved.untie_embeddings_and_output_weights:
        send("output layer", names.OUTPUT_LAYER)
    if args.model_type == "BERT":
        send("pooler", names.POOLER)
        send("lm head", names.LM_HEAD)
        if getattr(saved, "bert_binary_head", True):
            send("binary head", names.BINARY_HEAD)
    queue.put("done")


class TorchSource:
    """The rank files of a torch-format checkpoint, memory-mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        durable.verify(path)
        files = {file.parent.name: file for file in sorted(path.glob("mp_rank_*/model_optim_rng.pt"))}
        if not files:
            raise CheckpointError(
                str(path), "it has no mp_rank_*/model_optim_rng.pt", "name a checkpoint directory"
            )
        states = {name: load_file(file) for name, file in files.items()}
        first = next(iter(states.values()))
        self.iteration = first.get("iteration", 0)
        self.args = first.get("args", Namespace())
        if any(len(name.split("_")) > 4 for name in files):
            raise CheckpointError(str(path), "expert-parallel files are not converted", "use torch_dist")
        self._stages: list[list[dict[str, Any]]] = []  # [stage or chunk in layer order][tensor rank]
        self._layers: list[tuple[int, int]] = []  # global layer -> (stage, local layer)
        self._collect(states, first.get("checkpoint_version", 0))

    def _collect(self, states: dict[str, dict[str, Any]], version: float) -> None:
        tp = self.args.tensor_model_parallel_size
        pp = self.args.pipeline_model_parallel_size
        chunks = getattr(self.args, "virtual_pipeline_model_parallel_size", None) or 1
        for chunk in range(chunks):
            for stage in range(pp):
                ranks = []
                for tensor_rank in range(tp):
                    name = f"mp_rank_{tensor_rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
                    if name not in states:
                        raise CheckpointError(
                            str(self.path / name), "the file of this rank is missing", "restore it"
                        )
                    weights = states[name]["model" if chunks == 1 else f"model{chunk}"]
                    ranks.append(self._named(weights, version, tp))
                self._stages.append(ranks)
        self.stack = (
            "encoder" if any(n.startswith("encoder.") for r in self._stages for n in r[0]) else "decoder"
        )
        for number, ranks in enumerate(self._stages):
            local = {int(n.split(".")[2]) for n in ranks[0] if n.startswith(f"{self.stack}.layers.")}
            self._layers += [(number, layer) for layer in sorted(local)]

    def _named(self, weights: dict[str, Any], version: float, tp: int) -> dict[str, Any]:
        """Today's names with separate norms."""
        heads = self.args.num_attention_heads // tp
        wanted = []
        if is_nested_layout(weights):
            wanted = ["output_layer.weight"]
            if "lm_head" in weights:
                wanted.append("encoder.final_layernorm.weight")
            weights = adapt_weights(weights, wanted, version, heads)
        norms = {
            "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
            "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
        }
        named = {}
        for name, value in weights.items():
            for fused, plain in norms.items():
                name = name.replace(fused, plain)
            if isinstance(value, torch.Tensor):
                named[name] = value
        return named

    def parts(self, name: str, layer: int | None = None) -> list[torch.Tensor] | None:
        """The tensor-parallel parts of a tensor (of a layer), or None if there is no such tensor."""
        if layer is not None:
            stage, local = self._layers[layer]
            name = name.replace(".layers.", f".layers.{local}.")
            candidates = [self._stages[stage]]
        else:
            # The first stage's copy of a tied embedding is the original.
            candidates = self._stages
        for ranks in candidates:
            if name in ranks[0]:
                return [weights[name] for weights in ranks]
        return None


class DistributedSource:
    """A torch_dist checkpoint; every tensor is whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        durable.verify(path)
        common = load_file(path / COMMON_FNAME)
        self.iteration, self.args = common.get("iteration", 0), common.get("args", Namespace())
        self._stored = StoredTensors(path)
        self.stack = "encoder" if any(k.startswith("encoder.") for k in self._stored.keys()) else "decoder"  # noqa: SIM118

    def parts(self, name: str, layer: int | None = None) -> list[torch.Tensor] | None:
        """The tensor (of a layer) as a single part, or None if there is no such tensor."""
        fused = name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
        fused = fused.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
        key = next((key for key in (name, fused) if key in self._stored), None)
        if key is None:
            return None
        shape = self._stored.shape(key)
        box = Box((0,) * len(shape), shape)
        if layer is not None:
            box = Box((layer, *box.offset[1:]), (1, *shape[1:]))
        whole = torch.empty(box.shape, dtype=self._stored.dtype(key))
        self._stored.read_box(key, box, whole)
        return [whole if layer is None else whole[0]]


def _open(directory: str) -> TorchSource | DistributedSource:
    path = Path(directory) / read_tracker(directory).directory
    return DistributedSource(path) if check_is_distributed_checkpoint(path) else TorchSource(path)


def _metadata(source: TorchSource | DistributedSource, args: Namespace) -> Namespace:
    saved = source.args
    true_size = args.true_vocab_size
    if true_size is None and args.vocab_file is not None:
        true_size = len(json.loads(Path(args.vocab_file).read_text()))
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
        output_layer=saved.untie_embeddings_and_output_weights,
        position_embedding_type=getattr(saved, "position_embedding_type", args.position_embedding_type),
        linear_bias=getattr(saved, "add_bias_linear", True),
        norm_has_bias=getattr(saved, "normalization", "LayerNorm") == "LayerNorm",
        swiglu=getattr(saved, "swiglu", False),
        previous_tensor_parallel_size=saved.tensor_model_parallel_size,
        previous_pipeline_parallel_size=saved.pipeline_model_parallel_size,
        true_vocab_size=true_size,
        make_vocab_size_divisible_by=getattr(saved, "make_vocab_size_divisible_by", None),
        checkpoint_args=saved,
        consumed_train_samples=getattr(saved, "consumed_train_samples", 0),
        consumed_valid_samples=getattr(saved, "consumed_valid_samples", 0),
        use_legacy_models=getattr(saved, "use_legacy_models", False),
    )
