"""GPT, BERT and T5 in plain torch: one process, explicit formulas, every option of the dense models.

A model is a function of a state dict (names as in the library's checkpoints) and a `Shape`; autograd gives
its gradients. Batch-first throughout: hidden states are [b, s, h].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """What the state dict does not tell."""

    layers: int
    heads: int
    groups: int
    head: int
    eps: float = 1e-5
    activation: Callable[[Tensor], Tensor] = F.gelu
    gated: bool = False
    rms: bool = False
    zero_centred: bool = False
    post_norm_residual: bool = False
    rotary_dim: int = 0
    rotary_interleaved: bool = False
    rotary_base: float = 10000.0
    interpolation: float = 1.0
    window: int | None = None  # keys a causal query sees besides its own


def norm(w: State, name: str, x: Tensor, shape: Shape, rms: bool | None = None) -> Tensor:
    """LayerNorm or RMS norm over the last dimension."""
    weight = w[f"{name}.weight"] + (1 if shape.zero_centred else 0)
    if shape.rms if rms is None else rms:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + shape.eps) * weight
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt((centred**2).mean(-1, keepdim=True) + shape.eps) * weight + w[f"{name}.bias"]


def linear(w: State, name: str, x: Tensor) -> Tensor:
    """x W^T, plus the bias if there is one."""
    y = x @ w[f"{name}.weight"].t()
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def rotate(x: Tensor, shape: Shape) -> Tensor:
    """x [b, s, n, d]: turn channel pairs by position * base^(-2i/rotary_dim), pair by pair as complex
    numbers.
    """
    if not shape.rotary_dim:
        return x
    d = shape.rotary_dim
    position = torch.arange(x.size(1), dtype=torch.float32) / shape.interpolation
    inverse = 1.0 / shape.rotary_base ** (torch.arange(0, d, 2, dtype=torch.float32) / d)
    angle = torch.outer(position, inverse)[None, :, None, :]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)  # the table is fp32 in every model
    real, imaginary = (
        (x[..., 0:d:2], x[..., 1:d:2]) if shape.rotary_interleaved else (x[..., : d // 2], x[..., d // 2 : d])
    )
    turned = (
        real * cos - imaginary * sin,
        real * sin + imaginary * cos,
    )
    joined = torch.stack(turned, -1).flatten(-2) if shape.rotary_interleaved else torch.cat(turned, -1)
    return torch.cat((joined, x[..., d:]), -1)


def attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
    """q [b, sq, n, d], k and v [b, sk, g, d], hidden bool [b, sq, sk] -> [b, sq, n * d]; a blind row is a
    plain mean.
    """
    k, v = (t.repeat_interleave(q.size(2) // k.size(2), dim=2) for t in (k, v))
    scores = torch.einsum("bqnd,bknd->bnqk", q, k) / math.sqrt(q.size(-1))
    if hidden is not None:
        scores = torch.where(hidden[:, None], torch.full_like(scores, -10000.0), scores)
    return torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), v).flatten(2)


def self_attention(w: State, name: str, x: Tensor, hidden: Tensor | None, shape: Shape) -> Tensor:
    """Projection packed by query group: its queries, its key, its value."""
    per_group = shape.heads // shape.groups
    mixed = linear(w, f"{name}.linear_qkv", x).unflatten(-1, (shape.groups, per_group + 2, shape.head))
    q = mixed[..., :per_group, :].flatten(2, 3)
    k, v = mixed[..., per_group, :], mixed[..., per_group + 1, :]
    if f"{name}.q_layernorm.weight" in w:
        q, k = norm(w, f"{name}.q_layernorm", q, shape), norm(w, f"{name}.k_layernorm", k, shape)
    return linear(w, f"{name}.linear_proj", attend(rotate(q, shape), rotate(k, shape), v, hidden))


def cross_attention(
    w: State, name: str, x: Tensor, memory: Tensor, hidden: Tensor | None, shape: Shape
) -> Tensor:
    """Queries of x, keys and values (packed by head) of memory."""
    q = linear(w, f"{name}.linear_q", x).unflatten(-1, (shape.heads, shape.head))
    k, v = linear(w, f"{name}.linear_kv", memory).unflatten(-1, (shape.heads, 2, shape.head)).unbind(-2)
    return linear(w, f"{name}.linear_proj", attend(q, k, v, hidden))


def mlp(w: State, name: str, x: Tensor, shape: Shape) -> Tensor:
    """Up, activation, down; gated: activation(first half) * second half."""
    up = linear(w, f"{name}.linear_fc1", x)
    if shape.gated:
        gate, value = up.chunk(2, -1)
        return linear(w, f"{name}.linear_fc2", shape.activation(gate) * value)
    return linear(w, f"{name}.linear_fc2", shape.activation(up))


def stack(
    w: State,
    name: str,
    x: Tensor,
    hidden: Tensor | None,
    shape: Shape,
    memory: Tensor | None = None,
    memory_hidden: Tensor | None = None,
) -> Tensor:
    """All layers and the final norm."""
    for i in range(shape.layers):
        layer = f"{name}.layers.{i}"
        normed = norm(w, f"{layer}.input_layernorm", x, shape)
        x = (normed if shape.post_norm_residual else x) + self_attention(
            w, f"{layer}.self_attention", normed, hidden, shape
        )
        if memory is not None:
            normed = norm(w, f"{layer}.pre_cross_attn_layernorm", x, shape)
            x = (normed if shape.post_norm_residual else x) + cross_attention(
                w, f"{layer}.cross_attention", normed, memory, memory_hidden, shape
            )
        normed = norm(w, f"{layer}.pre_mlp_layernorm", x, shape)
        x = (normed if shape.post_norm_residual else x) + mlp(w, f"{layer}.mlp", normed, shape)
    return norm(w, f"{name}.final_layernorm", x, shape)


def embed(w: State, ids: Tensor, types: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
    """Sum of the tables there are."""
    x = w["embedding.word_embeddings.weight"][ids]
    table = w.get("embedding.position_embeddings.weight")
    if table is not None:
        x = x + table[torch.arange(ids.size(1)).expand_as(ids) if positions is None else positions]
    return x if types is None else x + w["embedding.tokentype_embeddings.weight"][types]


def future(length: int, window: int | None = None) -> Tensor:
    """bool [1, length, length], True where the key comes later (or lies further back than the window)."""
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    return ((distance < 0) | (distance > (length if window is None else window)))[None]


def output(w: State, x: Tensor, name: str = "output_layer") -> Tensor:
    """Logits by the layer's own weight or the tied embedding."""
    weight = w.get(f"{name}.weight", w["embedding.word_embeddings.weight"])
    logits = x @ weight.t()
    return logits + w[f"{name}.bias"] if f"{name}.bias" in w else logits


def gpt(
    w: State, shape: Shape, ids: Tensor, hidden: Tensor | None = None, positions: Tensor | None = None
) -> Tensor:
    """ids [b, s], hidden bool [b, s, s] (default: the future) -> logits [b, s, v]."""
    hidden = future(ids.size(1), shape.window) if hidden is None else hidden
    return output(w, stack(w, "decoder", embed(w, ids, positions=positions), hidden, shape))


def bert(w: State, shape: Shape, ids: Tensor, types: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """ids, types, tokens (1 = no padding) [b, s] -> logits [b, s, v], sentence-order logits [b, 2]."""
    hidden = ~(tokens.bool()[:, :, None] & tokens.bool()[:, None, :])
    x = stack(w, "encoder", embed(w, ids, types), hidden, shape)
    binary = linear(w, "binary_head", torch.tanh(linear(w, "pooler.dense", x[:, 0])))
    return output(
        w, norm(w, "lm_head.layer_norm", F.gelu(linear(w, "lm_head.dense", x)), shape, rms=False)
    ), binary


def t5(
    w: State, shape: Shape, source: Tensor, target: Tensor, masks: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """source [b, s], target [b, t], masks (encoder, decoder, cross) bool [b, q, k] -> logits [b, t, v]."""
    memory = stack(w, "encoder", embed(w, source), masks[0], shape)
    x = stack(w, "decoder", embed(w, target), masks[1], shape, memory, masks[2])
    return output(w, x, "lm_head.output_layer")
