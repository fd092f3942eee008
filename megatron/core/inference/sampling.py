"""Draw the next token from logits (spec: inference, section 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.core.errors import InvariantError


def modify_logits_for_top_k_filtering(logits: Tensor, top_k: int) -> None:
    """Set everything below the k-th largest value of each row [b, v] to -inf, in place; ties at the threshold survive."""
    threshold = logits.topk(top_k).values[..., -1:]
    logits.masked_fill_(logits < threshold, float("-inf"))


def modify_logits_for_top_p_filtering(logits: Tensor, top_p: float) -> None:
    """Keep in each row [b, v] the most probable tokens up to and including the one that crosses `top_p`, in place."""
    ordered, order = logits.sort(descending=True)
    beyond = ordered.softmax(dim=-1).cumsum(dim=-1) > top_p
    beyond[:, 1:] = beyond[:, :-1].clone()
    beyond[:, 0] = False
    logits.masked_fill_(beyond.scatter(1, order, beyond), float("-inf"))


def sample(
    logits: Tensor,
    top_k: int = 0,
    top_p: float = 0.0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """One token id per row: fp32 logits [b, v] -> int64 [b].

    top_k 1 is greedy; otherwise at most one of top_k and top_p filters what is drawn from (InvariantError, a ValueError,
    for both, or out of range). Ids of the padded part of the vocabulary become `vocab_size - 1`.
    """
    if top_k > 0 and top_p > 0.0:
        raise InvariantError("top_k and top_p", "they exclude each other", "give one of them")
    if top_p > 1.0:
        raise InvariantError("top_p", f"{top_p} is not a probability", "give a value above 0 and at most 1")
    if logits.ndim != 2 or logits.dtype != torch.float32:
        raise InvariantError(
            "logits", f"tokens are drawn from float32 [b, v], not {logits.dtype} {list(logits.shape)}"
        )
    if top_k > logits.size(1) or (top_k > 1 and vocab_size is not None and top_k >= vocab_size):
        raise InvariantError(
            "top_k", f"{top_k} is not below the size of the vocabulary", "give a smaller one"
        )
    if top_k == 1:
        chosen = logits.argmax(dim=-1)
    else:
        logits = logits / temperature if temperature != 1.0 else logits.clone()
        if top_k > 1:
            modify_logits_for_top_k_filtering(logits, top_k)
        elif top_p > 0.0:
            modify_logits_for_top_p_filtering(logits, top_p)
        chosen = torch.multinomial(logits.softmax(dim=-1), num_samples=1).view(-1)
    return chosen if vocab_size is None else chosen.clamp(0, vocab_size - 1)
