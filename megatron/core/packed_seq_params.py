"""Where the documents of a packed batch begin and end."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class PackedSeqParams:
    """Boundaries of documents laid end to end in one sequence of `t` tokens (format `thd`: [t, np, hn]).

    cu_seqlens_* are int32 [documents + 1]: offset of every document and, last, the total length.
    max_seqlen_* is the longest document in tokens.
    """

    qkv_format: str | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_kv: Tensor | None = None
    max_seqlen_q: Tensor | int | None = None
    max_seqlen_kv: Tensor | int | None = None
