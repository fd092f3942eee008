"""flash-attn (2 or 3) behind the core-attention signature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from megatron.core.fusions.core_attention import AttentionSpec, Window
from megatron.core.kernels.registry import HALF, Needs, register
from megatron.core.packed_seq_params import PackedSeqParams


def _refusal(spec: AttentionSpec, widest: int) -> str | None:
    if spec.dtype not in HALF:
        return "takes fp16 or bf16 (add --bf16)"
    if spec.context_parallel > 1:
        return "sees one context-parallel shard only"
    if spec.masked:
        return "takes no mask tensor"
    if spec.layer_scaling:
        return "knows no query-key layer scaling"
    if spec.head_dim > widest or spec.head_dim % 8:
        return f"takes head sizes that are multiples of 8 up to {widest}, not {spec.head_dim}"
    return None


def _accepts_2(spec: AttentionSpec) -> str | None:
    return _refusal(spec, 256)


def _accepts_3(spec: AttentionSpec) -> str | None:
    return "has no dropout" if spec.dropout else _refusal(spec, 256)


def _provider(
    batched: Callable[..., Any], varlen: Callable[..., Any], has_dropout: bool
) -> Callable[..., Tensor]:
    """Wrap one version's two entry points into the contract of `core_attention`."""

    def flash(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        *,
        causal: bool,
        scale: float,
        dropout_p: float = 0.0,
        packed: PackedSeqParams | None = None,
        window: Window | None = None,
    ) -> Tensor:
        """q [sq, b, np, hn], k and v [sk, b, ng, hn] -> [sq, b, np*hn]."""
        if mask is not None:
            raise ValueError("flash-attn takes no mask tensor; use causal, packed or window")
        options: dict[str, Any] = {
            "softmax_scale": scale,
            "causal": causal,
            "window_size": window or (-1, -1),
        }
        if has_dropout:
            options["dropout_p"] = dropout_p
        if packed is None:
            out = batched(*(t.transpose(0, 1) for t in (q, k, v)), **options)
            out = (out[0] if isinstance(out, tuple) else out).transpose(0, 1)
        else:
            cu_k = packed.cu_seqlens_q if packed.cu_seqlens_kv is None else packed.cu_seqlens_kv
            longest_q = packed.max_seqlen_q if packed.max_seqlen_q is not None else q.shape[0]
            longest_k = packed.max_seqlen_kv if packed.max_seqlen_kv is not None else k.shape[0]
            out = varlen(
                *(t.squeeze(1) for t in (q, k, v)),
                cu_seqlens_q=packed.cu_seqlens_q,
                cu_seqlens_k=cu_k,
                max_seqlen_q=int(longest_q),
                max_seqlen_k=int(longest_k),
                **options,
            )
            out = (out[0] if isinstance(out, tuple) else out).unsqueeze(1)
        return out.reshape(q.shape[0], q.shape[1], -1)

    return flash


@register(
    "core_attention",
    "flash_attn",
    rank=30,
    needs=Needs(cuda=True, capability=(8, 0), packages={"flash_attn": "2.1"}),
    accepts=_accepts_2,
)
def _load_2() -> Any:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    return _provider(flash_attn_func, flash_attn_varlen_func, has_dropout=True)


@register(
    "core_attention",
    "flash_attn_3",
    rank=40,
    needs=Needs(cuda=True, capability=(9, 0), packages={"flash_attn_interface": "0"}),
    accepts=_accepts_3,
)
def _load_3() -> Any:
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func

    return _provider(flash_attn_func, flash_attn_varlen_func, has_dropout=False)
