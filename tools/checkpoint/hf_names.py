"""HuggingFace's names and packings of the families that are converted both ways."""

from __future__ import annotations

import torch

LLAMA_FAMILY = ("llama", "mistral", "qwen2")

# message key -> name below model.layers.<n>.
LLAMA_LAYER = {
    "input norm weight": "input_layernorm.weight",
    "post norm weight": "post_attention_layernorm.weight",
    "dense weight": "self_attn.o_proj.weight",
    "mlp l0 weight W": "mlp.gate_proj.weight",
    "mlp l0 weight V": "mlp.up_proj.weight",
    "mlp l1 weight": "mlp.down_proj.weight",
}
# message key -> (name below transformer.h.<n>., whether HuggingFace stores it transposed)
GPT2_LAYER = {
    "input norm weight": ("ln_1.weight", False),
    "input norm bias": ("ln_1.bias", False),
    "post norm weight": ("ln_2.weight", False),
    "post norm bias": ("ln_2.bias", False),
    "dense weight": ("attn.c_proj.weight", True),
    "dense bias": ("attn.c_proj.bias", False),
    "mlp l0 weight": ("mlp.c_fc.weight", True),
    "mlp l0 bias": ("mlp.c_fc.bias", False),
    "mlp l1 weight": ("mlp.c_proj.weight", True),
    "mlp l1 bias": ("mlp.c_proj.bias", False),
}


def pack_qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: int) -> torch.Tensor:
    """Rows of separate projections, grouped: per query group its query heads, one key head, one value head."""
    rest = q.shape[1:]
    return torch.cat([part.reshape(groups, -1, *rest) for part in (q, k, v)], dim=1).reshape(-1, *rest)


def unpack_qkv(
    qkv: torch.Tensor, groups: int, head_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inverse of `pack_qkv`."""
    rest = qkv.shape[1:]
    grouped = qkv.reshape(groups, -1, *rest)
    queries = grouped.shape[1] - 2 * head_size
    q, k, v = grouped.split([queries, head_size, head_size], dim=1)
    return q.reshape(-1, *rest), k.reshape(-1, *rest), v.reshape(-1, *rest)
