"""Context parallelism by exchange: give sequence, take heads, and attend to the whole sequence (arXiv:2309.14509).

Two all-to-alls per direction replace the ring. Any whole-sequence attention can run between them; the number of
heads limits the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core import parallel_state
from megatron.core.collectives import all_gather_single
from megatron.core.context_parallel.split import divide_up, join
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import group_size
from megatron.core.tensor_parallel.mappings import all_to_all


def sequence_to_heads(x: Tensor, group: ProcessGroup) -> Tensor:
    """[s/cp, b, n, d], the tokens split.py gives this rank -> [s, b, n/cp, d], all tokens in order."""
    blocks = torch.stack(x.chunk(group.size(), dim=2))
    return join(all_to_all(group, blocks), dim=0)


def heads_to_sequence(x: Tensor, group: ProcessGroup) -> Tensor:
    """The opposite of `sequence_to_heads`: [s, b, n/cp, d] -> [s/cp, b, n, d]."""
    blocks = all_to_all(group, divide_up(x, 0, group.size()))
    return torch.cat(blocks.unbind(0), dim=2)


def all_to_all_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    attend: Callable[..., Tensor],
    causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    packed: PackedSeqParams | None = None,
    window: tuple[int, int] | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """The contract of fusions/core_attention.py over a sequence divided among `group` (None = context-parallel).

    attend: the whole-sequence attention to run. Shapes and mask as in `ring_attention`; packed holds the document
    offsets of the whole row. All ranks must call. ValueError if the ranks do not divide the heads. Key heads fewer
    than ranks are repeated as often as needed.
    """
    group = parallel_state.resolve(None).cp if group is None else group
    options: dict[str, Any] = {
        "causal": causal,
        "scale": scale,
        "dropout_p": dropout_p,
        "packed": packed,
        "window": window,
    }
    size = group_size(group)
    if group is None or size == 1:
        return attend(q, k, v, mask, **options)
    copies = size // math.gcd(size, k.shape[2])
    if q.shape[2] % size or q.shape[2] % (k.shape[2] * copies):
        raise ValueError(
            f"all-to-all context parallelism divides the attention heads of a tensor-parallel rank ({q.shape[2]} "
            f"with {k.shape[2]} key heads) among {size} ranks; use --context-parallel-algo ring or fewer ranks"
        )
    if copies > 1:
        k, v = (t.repeat_interleave(copies, dim=2) for t in (k, v))
    if mask is not None and mask.dim() >= 2 and mask.shape[-2] > 1:
        mask = _all_rows(mask, group)
    context = attend(*(sequence_to_heads(t, group) for t in (q, k, v)), mask, **options)
    heads = context.view(*context.shape[:2], q.shape[2] // size, -1)
    return heads_to_sequence(heads, group).flatten(2)


def _all_rows(mask: Tensor, group: ProcessGroup) -> Tensor:
    """bool [.., s/cp, s] -> [.., s, s] in sequence order."""
    shards = mask.new_empty((group.size(), *mask.shape), dtype=torch.uint8)
    all_gather_single(shards, mask.to(torch.uint8).contiguous().unsqueeze(0), group=group)
    return join(shards, dim=mask.dim() - 2).to(torch.bool)
