"""One table: what each message of a conversion carries, its name in a model's state dict, and how it is cut.

Messages are those of the conversion protocol (see convert.py): whole tensors on the CPU, layers numbered globally.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Entry:
    """A tensor: its key in the message, its state-dict name, the axis cut over tensor-parallel ranks (None: whole)."""

    key: str
    name: str
    cut: int | None = None
    gated: bool = False


EMBEDDINGS = (
    Entry("word embeddings", "embedding.word_embeddings.weight", 0),
    Entry("position embeddings", "embedding.position_embeddings.weight"),
    Entry("tokentype embeddings", "embedding.tokentype_embeddings.weight"),
)
LAYER = (
    Entry("input norm weight", "input_layernorm.weight"),
    Entry("input norm bias", "input_layernorm.bias"),
    Entry("dense weight", "self_attention.linear_proj.weight", 1),
    Entry("dense bias", "self_attention.linear_proj.bias"),
    Entry("qkv weight", "self_attention.linear_qkv.weight", 0),
    Entry("qkv bias", "self_attention.linear_qkv.bias", 0),
    Entry("q norm weight", "self_attention.q_layernorm.weight"),
    Entry("q norm bias", "self_attention.q_layernorm.bias"),
    Entry("k norm weight", "self_attention.k_layernorm.weight"),
    Entry("k norm bias", "self_attention.k_layernorm.bias"),
    Entry("post norm weight", "pre_mlp_layernorm.weight"),
    Entry("post norm bias", "pre_mlp_layernorm.bias"),
    Entry("mlp l0 weight", "mlp.linear_fc1.weight", 0, gated=True),
    Entry("mlp l0 bias", "mlp.linear_fc1.bias", 0, gated=True),
    Entry("mlp l1 weight", "mlp.linear_fc2.weight", 1),
    Entry("mlp l1 bias", "mlp.linear_fc2.bias"),
)
FINAL_NORM = (Entry("weight", "final_layernorm.weight"), Entry("bias", "final_layernorm.bias"))
OUTPUT_LAYER = (Entry("weight", "output_layer.weight", 0),)
POOLER = (Entry("weight", "pooler.dense.weight"), Entry("bias", "pooler.dense.bias"))
LM_HEAD = (
    Entry("dense weight", "lm_head.dense.weight"),
    Entry("dense bias", "lm_head.dense.bias"),
    Entry("norm weight", "lm_head.layer_norm.weight"),
    Entry("norm bias", "lm_head.layer_norm.bias"),
    Entry("bias", "output_layer.bias", 0),
)
BINARY_HEAD = (Entry("weight", "binary_head.weight"), Entry("bias", "binary_head.bias"))


def merge(entry: Entry, parts: list[torch.Tensor], gated: bool) -> dict[str, torch.Tensor]:
    """The message keys and whole tensors that the ranks' parts of `entry` make.

    A gated projection is two matrices, `<key> W` (gate) and `<key> V` (up); each rank holds a part of both.
    """
    if entry.gated and gated:
        halves = [part.chunk(2) for part in parts]
        return {f"{entry.key} {name}": torch.cat([half[i] for half in halves]) for i, name in enumerate("WV")}
    if entry.cut is None:
        return {entry.key: parts[0]}
    return {entry.key: parts[0] if len(parts) == 1 else torch.cat(parts, dim=entry.cut)}


def split(entry: Entry, message: dict[str, torch.Tensor], parts: int) -> list[torch.Tensor] | None:
    """Take `entry` out of the message and cut it for `parts` ranks; None if the message does not have it."""
    if entry.gated and f"{entry.key} W" in message:
        gates, ups = (message.pop(f"{entry.key} {name}").chunk(parts) for name in "WV")
        return [torch.cat(pair) for pair in zip(gates, ups)]
    if entry.key not in message:
        return None
    whole = message.pop(entry.key)
    return [whole] * parts if entry.cut is None else list(whole.chunk(parts, dim=entry.cut))
