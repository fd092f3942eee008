"""One table: the messages of a conversion, what each carries, its name in a model's state dict, and how it is cut.

Messages are those of the conversion protocol (see convert.py): whole tensors on the CPU, layers numbered globally.
T5 adds to it `encoder layer <n>` and `encoder final norm` before the decoder's `transformer layer <n>`.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Entry:
    """A tensor: its key in the message, its state-dict name, the axis cut over tensor-parallel ranks (None: whole).

    `aliases` are other names under which a model registers the same tensor.
    """

    key: str
    name: str
    cut: int | None = None
    gated: bool = False
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Message:
    """A message: its name, its entries, and for layers the stack (`encoder` or `decoder`) and the number in it."""

    name: str
    entries: tuple[Entry, ...]
    stack: str = ""
    layer: int | None = None

    @property
    def prefix(self) -> str:
        """What precedes the entries' names; layers without their number."""
        if not self.stack:
            return ""
        return f"{self.stack}." if self.layer is None else f"{self.stack}.layers."


def _pair(
    key: str, name: str, weight_cut: int | None = None, bias_cut: int | None = None
) -> tuple[Entry, Entry]:
    separator = " " if key else ""
    return (
        Entry(f"{key}{separator}weight", f"{name}.weight", weight_cut),
        Entry(f"{key}{separator}bias", f"{name}.bias", bias_cut),
    )


EMBEDDINGS = (
    Entry("word embeddings", "embedding.word_embeddings.weight", 0),
    Entry("position embeddings", "embedding.position_embeddings.weight"),
    Entry("tokentype embeddings", "embedding.tokentype_embeddings.weight"),
)
_ATTENTION = (
    *_pair("input norm", "input_layernorm"),
    *_pair("dense", "self_attention.linear_proj", 1),
    *_pair("qkv", "self_attention.linear_qkv", 0, 0),
    *_pair("q norm", "self_attention.q_layernorm"),
    *_pair("k norm", "self_attention.k_layernorm"),
)
_CROSS_ATTENTION = (
    *_pair("cross norm", "pre_cross_attn_layernorm"),
    *_pair("cross dense", "cross_attention.linear_proj", 1),
    *_pair("cross q", "cross_attention.linear_q", 0, 0),
    *_pair("cross kv", "cross_attention.linear_kv", 0, 0),
)
_MLP = (
    *_pair("post norm", "pre_mlp_layernorm"),
    Entry("router weight", "mlp.router.weight"),
    Entry("mlp l0 weight", "mlp.linear_fc1.weight", 0, gated=True),
    Entry("mlp l0 bias", "mlp.linear_fc1.bias", 0, gated=True),
    *_pair("mlp l1", "mlp.linear_fc2", 1),
)
LAYER = (*_ATTENTION, *_MLP)
CROSS_LAYER = (*_ATTENTION, *_CROSS_ATTENTION, *_MLP)
FINAL_NORM = _pair("", "final_layernorm")
OUTPUT_LAYER = (Entry("weight", "output_layer.weight", 0),)
POOLER = _pair("", "pooler.dense")
LM_HEAD = (
    *_pair("dense", "lm_head.dense"),
    *_pair("norm", "lm_head.layer_norm"),
    Entry("bias", "output_layer.bias", 0),
)
BINARY_HEAD = _pair("", "binary_head")

# T5 registers these under two names each; its head is a module of its own.
T5_EMBEDDINGS = (
    EMBEDDINGS[0],
    Entry(
        "position embeddings", "embedding.position_embeddings.weight", aliases=("position_embeddings.weight",)
    ),
)
T5_OUTPUT_LAYER = (Entry("weight", "lm_head.output_layer.weight", 0, aliases=("output_layer.weight",)),)
T5_LM_HEAD = (Entry("bias", "lm_head.output_layer.bias", 0, aliases=("output_layer.bias",)),)


def decoder_depth(saved: Namespace) -> int:
    """Layers of the (only, or T5's second) stack."""
    return getattr(saved, "decoder_num_layers", None) or saved.num_layers


def encoder_depth(saved: Namespace) -> int:
    """Layers of T5's first stack."""
    return getattr(saved, "encoder_num_layers", None) or saved.num_layers


def messages(md: Namespace) -> Iterator[Message]:
    """All messages of a model after the metadata `md`, in order."""
    t5, saved = md.model_type == "T5", md.checkpoint_args
    yield Message("embeddings", T5_EMBEDDINGS if t5 else EMBEDDINGS)
    if t5:
        for layer in range(encoder_depth(saved)):
            yield Message(f"encoder layer {layer}", LAYER, "encoder", layer)
        yield Message("encoder final norm", FINAL_NORM, "encoder")
    stack = "encoder" if md.model_type == "BERT" else "decoder"
    for layer in range(decoder_depth(saved) if t5 else md.num_layers):
        yield Message(f"transformer layer {layer}", CROSS_LAYER if t5 else LAYER, stack, layer)
    yield Message("final norm", FINAL_NORM, stack)
    if md.output_layer:
        yield Message("output layer", T5_OUTPUT_LAYER if t5 else OUTPUT_LAYER)
    if t5 and not md.output_layer:
        yield Message("lm head", T5_LM_HEAD)
    if md.model_type == "BERT":
        yield Message("pooler", POOLER)
        yield Message("lm head", LM_HEAD)
        if md.bert_binary_head:
            yield Message("binary head", BINARY_HEAD)


def merge(entry: Entry, parts: list[torch.Tensor], gated: bool) -> dict[str, torch.Tensor]:
    """The message keys and whole tensors that the ranks' parts of `entry` make.

    A gated projection is two matrices, `<key> W` (gate) and `<key> V` (up); each rank holds a part of both. Parts of
    experts have a leading axis for them.
    """
    experts = 1 if parts[0].dim() == 3 else 0
    if entry.gated and gated:
        halves = [part.chunk(2, dim=experts) for part in parts]
        return {
            f"{entry.key} {name}": torch.cat([half[i] for half in halves], dim=experts)
            for i, name in enumerate("WV")
        }
    if entry.cut is None or len(parts) == 1:
        return {entry.key: parts[0]}
    return {entry.key: torch.cat(parts, dim=entry.cut + experts)}


def split(entry: Entry, message: dict[str, torch.Tensor], parts: int) -> list[torch.Tensor] | None:
    """Take `entry` out of the message and cut it for `parts` ranks; None if the message does not have it."""
    if entry.gated and f"{entry.key} W" in message:
        gate, up = (message.pop(f"{entry.key} {name}") for name in "WV")
        experts = 1 if gate.dim() == 3 else 0
        pairs = zip(gate.chunk(parts, dim=experts), up.chunk(parts, dim=experts))
        return [torch.cat(pair, dim=experts) for pair in pairs]
    if entry.key not in message:
        return None
    whole = message.pop(entry.key)
    experts = 1 if whole.dim() == 3 else 0
    return [whole] * parts if entry.cut is None else list(whole.chunk(parts, dim=entry.cut + experts))
