"""From prompts to a batch of ids on every rank, and back to text (spec: inference, sections 3 and 10)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron.core import device
from megatron.inference.text_generation.communication import (
    broadcast_int_list,
    broadcast_tensor,
    prepare_on_rank,
)
from megatron.training import get_args, get_tokenizer

#: Tokenizers whose segments are the pieces as their vocabulary has them.
_WITH_PIECES = (
    "SentencePieceTokenizer", "GPTSentencePieceTokenizer", "HuggingFaceTokenizer", "Llama2Tokenizer",
)  # fmt: skip


def end_of_document(tokenizer: Any) -> int:
    """The id that ends documents, begins them and fills rows up; AttributeError if the tokenizer has none."""
    for name in ("eod", "eos_id"):
        try:
            return int(getattr(tokenizer, name))
        except (AttributeError, NotImplementedError):
            continue
    raise AttributeError(f"{type(tokenizer).__name__} has neither eod nor eos_id, which generation needs")


def usable_vocab_size(tokenizer: Any) -> int:
    """Ids below this may be generated: the tokenizer's, and the one that ends documents where that lies beyond."""
    return max(int(tokenizer.vocab_size), end_of_document(tokenizer) + 1)


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The ids of a piece of text, without what the tokenizer puts before every text."""
    ids, before = list(tokenizer.tokenize(text)), []
    if len(ids) > 1:
        before = list(tokenizer.tokenize(""))
    return ids[len(before) :] if ids[: len(before)] == before else ids


def tokenize_prompts(
    prompts: Sequence[str | Sequence[int]] | None = None,
    tokens_to_generate: int | None = None,
    add_BOS: bool | None = None,
    rank: int = 0,
) -> tuple[Tensor, Tensor]:
    """Prompts of one global rank, texts or ids -> on every rank ids int64 [b, s] and lengths of the prompts int64 [b].

    s is the longest prompt and `tokens_to_generate`; rows are filled up with the end-of-document id, which `add_BOS` also
    puts before each prompt. Of more tokens than fit the model only so many are kept as are too many. All ranks must call;
    ValueError on all of them for prompts that cannot be tokenized.
    """

    def prepare() -> tuple[Tensor, Tensor]:
        assert prompts is not None and tokens_to_generate is not None, f"rank {rank} must pass the request"
        return _batch(prompts, tokens_to_generate, bool(add_BOS))

    prepared = prepare_on_rank(prepare, rank)
    tokens, lengths = (None, None) if prepared is None else prepared
    size = broadcast_int_list(2, None if tokens is None else list(tokens.shape), rank).tolist()
    return (
        broadcast_tensor(size, torch.int64, tokens, rank),
        broadcast_tensor(size[0], torch.int64, lengths, rank),
    )


def _batch(
    prompts: Sequence[str | Sequence[int]], tokens_to_generate: int, add_bos: bool
) -> tuple[Tensor, Tensor]:
    if not prompts or tokens_to_generate < 0:
        raise ValueError(f"{len(prompts)} prompts and {tokens_to_generate} tokens to generate are no request")
    tokenizer = get_tokenizer()
    end = end_of_document(tokenizer)
    texts = [tokenizer.tokenize(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    rows = [[end] * add_bos + list(ids) for ids in texts]
    known = usable_vocab_size(tokenizer)
    for prompt, row in zip(prompts, rows):
        if not row:
            raise ValueError(f"the prompt {prompt!r} has no tokens: set add_BOS to begin a document")
        if not 0 <= min(row) <= max(row) < known:
            raise ValueError(
                f"the prompt {prompt[:40]!r} has ids outside of the vocabulary, 0 to {known - 1}"
            )
    # Beyond this limit a request is refused (or, with beams, cut); there is no need for memory to see it.
    room = min(tokens_to_generate, get_args().max_position_embeddings)
    tokens = torch.full((len(rows), max(map(len, rows)) + room), end, dtype=torch.long)
    for into, row in zip(tokens, rows):
        into[: len(row)] = torch.tensor(row)
    lengths = torch.tensor([len(row) for row in rows])
    return tokens.to(device.current()), lengths.to(device.current())


def detokenize_generations(
    tokens_gpu_tensor: Tensor, lengths_gpu_tensor: Tensor, detokenize_segments: bool
) -> tuple[list[list[int]], list[str], list[list[str]]]:
    """Ids [b, s] and lengths [b] -> the rows of ids, uncut, and of each row's length its text and its text token by token.

    The segments are an empty list unless `detokenize_segments`.
    """
    tokenizer = get_tokenizer()
    pieces = getattr(get_args(), "tokenizer_type", None) in _WITH_PIECES
    rows = tokens_gpu_tensor.tolist()
    cut = [row[:length] for row, length in zip(rows, lengths_gpu_tensor.tolist())]
    texts = [tokenizer.detokenize(row) for row in cut]
    segments: list[list[str]] = []
    if detokenize_segments:
        segments = [
            [tokenizer.decoder[token] if pieces else tokenizer.detokenize([token]) for token in row]
            for row in cut
        ]
    return rows, texts, segments
