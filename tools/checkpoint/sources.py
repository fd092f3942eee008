"""Megatron checkpoints as whole tensors: torch format in any layout and of any age, or torch_dist; memory-mapped."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from megatron.core.dist_checkpointing import check_is_distributed_checkpoint, durable
from megatron.core.dist_checkpointing.core import COMMON_FNAME
from megatron.core.dist_checkpointing.safe_load import load_file
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.resharding import Box
from megatron.core.errors import CheckpointError
from megatron.training.checkpointing.experts import expert_tensors
from megatron.training.checkpointing.layout import read_tracker
from megatron.training.checkpointing.legacy import adapt_weights, is_nested_layout
from tools.checkpoint import names
from tools.checkpoint.names import Entry, Message

# What a conversion cannot do without.
_REQUIRED = (
    "num_layers hidden_size seq_length num_attention_heads max_position_embeddings position_embedding_type "
    "tokenizer_type params_dtype tensor_model_parallel_size pipeline_model_parallel_size"
)

# The same norms in modules that include them; and expert layers, which have no norm of their own to fuse.
FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


def open_source(directory: str, model_type: str) -> TorchSource | DistributedSource:
    """The checkpoint that the tracker of `directory` names, or a checkpoint directory itself."""
    path = Path(directory)
    if not check_is_distributed_checkpoint(path) and not any(path.glob("mp_rank_*")):
        path /= read_tracker(directory).directory
    if check_is_distributed_checkpoint(path):
        return DistributedSource(path)
    return TorchSource(path, model_type)


def _arguments(state: Any, path: Path) -> Namespace:
    """The run's arguments in a file. CheckpointError if it says too little, as those of version 0 do."""
    if not isinstance(state, dict):
        raise CheckpointError(str(path), "its first file holds no checkpoint", "name a checkpoint directory")
    saved = state.get("args", Namespace())
    missing = [name for name in _REQUIRED.split() if not hasattr(saved, name)]
    if missing:
        why = f"its arguments lack {', '.join(missing)}"
        raise CheckpointError(str(path), why, "load it into a run with --finetune and save it anew")
    return saved


def _refuse_hybrids(path: Path, keys: Iterable[str]) -> None:
    """CheckpointError for a model with Mamba layers, of which the messages know nothing."""
    if any(".mixer.in_proj." in key for key in keys):
        fix = "tools/checkpoint/hybrid_conversion.py cuts its torch format anew; every layout loads its torch_dist format"
        raise CheckpointError(str(path), "it is a hybrid model's, with Mamba layers", fix)


class TorchSource:
    """The rank files of a torch-format checkpoint, memory-mapped."""

    def __init__(self, path: Path, model_type: str) -> None:
        self.path, self._model_type = path, model_type
        durable.verify(path)
        files = {file.parent.name: file for file in sorted(path.glob("mp_rank_*/model_optim_rng.pt"))}
        if not files:
            raise CheckpointError(
                str(path), "it has no mp_rank_*/model_optim_rng.pt", "name a checkpoint directory"
            )
        states = {name: load_file(file) for name, file in files.items()}
        first = next(iter(states.values()))
        self.args = _arguments(first, path)
        _refuse_hybrids(path, (key for state in states.values() for key in state.get("model", ())))
        self.iteration = first.get("iteration", 0)
        self._stages: list[list[list[dict[str, Any]]]] = []  # [stage or chunk][tensor rank][expert rank]
        self._layers: dict[str, list[tuple[int, int]]] = {"encoder": [], "decoder": []}
        self._collect(states, first.get("checkpoint_version", 0))

    def _size(self, name: str) -> int:
        return getattr(self.args, name, None) or 1

    def _collect(self, states: dict[str, dict[str, Any]], version: float) -> None:
        tp = self._size("tensor_model_parallel_size")
        ep = self._size("expert_model_parallel_size")
        stages = self._size("pipeline_model_parallel_size")
        if self._model_type == "T5":
            # The size counts the decoder's stages; the encoder's precede them.
            stages = len({name.split("_")[3:4][0] if name.count("_") > 2 else "" for name in states})
        chunks = self._size("virtual_pipeline_model_parallel_size")
        for chunk in range(chunks):
            for stage in range(stages):
                ranks = []
                for tensor_rank in range(tp):
                    experts = []
                    for expert_rank in range(ep):
                        name = f"mp_rank_{tensor_rank:02d}" + (f"_{stage:03d}" if stages > 1 else "")
                        name += f"_{expert_rank:03d}" if ep > 1 else ""
                        if name not in states:
                            raise CheckpointError(
                                str(self.path / name), "the file of this rank is missing", "restore it"
                            )
                        weights = states[name]["model" if chunks == 1 else f"model{chunk}"]
                        experts.append(self._named(weights, version, tp))
                    ranks.append(experts)
                self._stages.append(ranks)
        for number, ranks in enumerate(self._stages):
            for stack, layers in self._layers.items():
                found = {int(n.split(".")[2]) for n in ranks[0][0] if n.startswith(f"{stack}.layers.")}
                layers += [(number, layer) for layer in sorted(found)]

    def _named(self, weights: dict[str, Any], version: float, tp: int) -> dict[str, Any]:
        """Today's names with separate norms."""
        if is_nested_layout(weights):
            # What the names of the result depend on: which stack there is, and how the head is registered.
            wanted = {
                "GPT": ["output_layer.weight"],
                "BERT": ["output_layer.weight", "encoder.final_layernorm.weight"],
                "T5": ["encoder.final_layernorm.weight", "lm_head.output_layer.bias"],
            }[self._model_type]
            weights = adapt_weights(weights, wanted, version, self.args.num_attention_heads // tp)
        named = {}
        for name, value in weights.items():
            for fused, plain in FUSED_NORMS.items():
                name = name.replace(fused, plain)
            if isinstance(value, torch.Tensor):
                named[name] = value
        return named

    def parts(self, message: Message, entry: Entry) -> list[torch.Tensor] | None:
        """The tensor-parallel parts of a tensor, or None if there is no such tensor."""
        name = message.prefix + entry.name
        candidates = self._stages
        if message.layer is not None:
            layers = self._layers[message.stack]
            if not layers:
                why = f"it has no {message.stack} layers, so it is no {self._model_type} model"
                raise CheckpointError(str(self.path), why, "give another --model-type")
            if message.layer >= len(layers):
                why = f"it has {len(layers)} {message.stack} layers, its arguments say more"
                raise CheckpointError(str(self.path), why, "restore the missing files")
            stage, local = layers[message.layer]
            name = name.replace(".layers.", f".layers.{local}.")
            candidates = [self._stages[stage]]
        elif message.name in ("final norm", "lm head", "output layer", "encoder final norm"):
            # A stage that ends another stack may hold an unused copy; the last one is the real one.
            candidates = self._stages[::-1]
        for ranks in candidates:
            if name in ranks[0][0]:
                return [experts[0][name] for experts in ranks]
            if ".mlp.linear_fc" in name:
                parts = [_experts(experts, name, self.args) for experts in ranks]
                if all(part is not None for part in parts):
                    return parts  # type: ignore[return-value]
        return None


def _experts(ranks: list[dict[str, Any]], name: str, saved: Namespace) -> torch.Tensor | None:
    """The experts' copies of a tensor, over expert-parallel ranks, as [experts, out, in]."""
    prefix, leaf = name.split(".mlp.")
    local = (getattr(saved, "num_experts", None) or 0) // len(ranks)
    found = [expert_tensors(weights, f"{prefix}.mlp.experts.", leaf, local)[1] for weights in ranks]
    return torch.stack([*chain.from_iterable(found)]) if all(found) else None


class DistributedSource:
    """A distributed checkpoint; every tensor is whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        durable.verify(path)
        common = load_file(path / COMMON_FNAME)
        self.args, self.iteration = _arguments(common, path), common.get("iteration", 0)
        self._stored = get_default_load_sharded_strategy(str(path)).open(path)
        _refuse_hybrids(path, self._stored.keys())

    def parts(self, message: Message, entry: Entry) -> list[torch.Tensor] | None:
        """The tensor as a single part, or None if there is no such tensor."""
        name = message.prefix + entry.name
        candidates = [name, name.replace(".mlp.", ".mlp.experts.experts.")]
        candidates += [name.replace(plain, fused) for fused, plain in FUSED_NORMS.items()]
        key = next((key for key in candidates if key in self._stored), None)
        if key is None:
            return None
        shape = self._stored.shape(key)
        box = Box((0,) * len(shape), shape)
        if message.layer is not None:
            box = Box((message.layer, *box.offset[1:]), (1, *shape[1:]))
        whole = torch.empty(box.shape, dtype=self._stored.dtype(key))
        self._stored.read_box(key, box, whole)
        return [whole if message.layer is None else whole[0]]


def whole(source: TorchSource | DistributedSource, message: Message) -> dict[str, torch.Tensor]:
    """The tensors of a message, merged over tensor-parallel ranks."""
    gated = bool(getattr(source.args, "swiglu", False))
    tensors: dict[str, torch.Tensor] = {}
    for entry in message.entries:
        parts = source.parts(message, entry)
        if parts is not None:
            tensors.update(names.merge(entry, parts, gated))
    return tensors
