"""Draw the next token from logits (spec: inference, section 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron.core.errors import InvariantError

#: Divided by less than this, logits may leave the range of float32; what is drawn is the most probable token already.
_COLDEST = 1e-6


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


def check_sampling(top_k: int, top_p: float, temperature: float, vocab_size: int) -> None:
    """InvariantError, a ValueError, where no token can be drawn like this from a vocabulary of this size."""
    if top_k > 0 and top_p > 0.0:
        raise InvariantError("top_k and top_p", "they exclude each other", "give one of them")
    if not 0.0 <= top_p <= 1.0:
        raise InvariantError("top_p", f"{top_p} is not a probability", "give a value above 0 and at most 1")
    if top_k < 0 or (top_k > 1 and top_k >= vocab_size):
        raise InvariantError(
            "top_k", f"{top_k} is not below the size of the vocabulary, {vocab_size}", "give a smaller one"
        )
    if top_k != 1 and not temperature > 0.0:
        raise InvariantError("temperature", f"{temperature} is not above 0", "use top_k 1 for greedy choices")


def sample(
    logits: Tensor,
    top_k: int = 0,
    top_p: float = 0.0,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """One token id per row: fp32 logits [b, v] -> int64 [b].

    top_k 1 is greedy; otherwise at most one of top_k and top_p filters what is drawn from (InvariantError, a ValueError,
    for both, or out of range). Ids from `vocab_size` on, the padding of the vocabulary, are never drawn.
    """
    # Parameters first: they contradict each other whatever the logits are.
    check_sampling(top_k, top_p, temperature, logits.size(-1) + 1 if vocab_size is None else vocab_size)
    if logits.ndim != 2 or logits.dtype != torch.float32:
        raise InvariantError(
            "logits", f"tokens are drawn from float32 [b, v], not {logits.dtype} {list(logits.shape)}"
        )
    if vocab_size is not None:
        logits = without_padding(logits, vocab_size)
    if top_k == 1:
        return logits.argmax(dim=-1)
    logits = logits / max(temperature, _COLDEST) if temperature != 1.0 else logits.clone()
    if top_k > 1:
        modify_logits_for_top_k_filtering(logits, top_k)
    elif top_p > 0.0:
        modify_logits_for_top_p_filtering(logits, top_p)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1).view(-1)


def without_padding(scores: Tensor, vocab_size: int) -> Tensor:
    """Scores [..., v] with -inf in place of those of ids that the vocabulary does not have."""
    if vocab_size >= scores.size(-1):
        return scores
    real = torch.arange(scores.size(-1), device=scores.device) < vocab_size
    return scores.masked_fill(~real, float("-inf"))


def log_probs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """Natural logarithms of the probabilities that logits [b, n, v] give to tokens [b, n] -> [b, n].

    The padding of the vocabulary takes part in the softmax, as it does in training.
    """
    return logits.log_softmax(-1).gather(2, tokens.unsqueeze(2)).squeeze(2)


def top_log_probs(logits: Tensor, count: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The most probable tokens under logits [..., v]: their log-probabilities and ids, each [..., count], in that order.

    InvariantError for more than the vocabulary has.
    """
    if count > min(vocab_size, logits.size(-1)):
        raise InvariantError("top_n_logprobs", f"{count} is more than the vocabulary's {vocab_size}")
    best = without_padding(logits.log_softmax(-1), vocab_size).topk(count)
    return best.values, best.indices
