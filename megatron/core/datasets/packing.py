"""Several documents in one sequence: what the end-of-document tokens say about positions and visibility.

A document ends with its end-of-document token. All functions work on the last dimension of `tokens` and on any
device, so a batch can be cut into documents where it is needed instead of carrying [s, s] masks through loaders.
"""

from __future__ import annotations

import torch
from torch import Tensor


def document_ids(tokens: Tensor, eod_token: int) -> Tensor:
    """Number, within its sequence, of the document that each token belongs to: int64, the shape of `tokens`."""
    ends = (tokens == eod_token).to(torch.int64)
    return ends.cumsum(dim=-1) - ends


def document_position_ids(tokens: Tensor, eod_token: int) -> Tensor:
    """Position of each token in its own document: int64, the shape of `tokens`."""
    positions = torch.arange(tokens.shape[-1], device=tokens.device).expand(tokens.shape)
    starts = torch.zeros_like(positions)
    starts[..., 1:] = torch.where(tokens[..., :-1] == eod_token, positions[..., 1:], 0)
    return positions - starts.cummax(dim=-1).values


def document_attention_mask(tokens: Tensor, eod_token: int) -> Tensor:
    """Causal mask within documents: tokens [..., s] -> bool [..., s, s], True where attention is forbidden."""
    ids = document_ids(tokens, eod_token)
    return ~(ids.unsqueeze(-1) == ids.unsqueeze(-2)).tril()


def document_cu_seqlens(tokens: Tensor, eod_token: int) -> Tensor:
    """Where documents begin in the flattened batch, and its end: tokens [b, s] -> int32 [documents + 1].

    The form that variable-length attention kernels take. Every sequence begins a document of its own.
    """
    begins = torch.ones_like(tokens, dtype=torch.bool)
    begins[..., 1:] = tokens[..., :-1] == eod_token
    starts = begins.reshape(-1).nonzero().reshape(-1)
    end = torch.tensor([tokens.numel()], device=tokens.device)
    return torch.cat([starts, end]).to(torch.int32)
