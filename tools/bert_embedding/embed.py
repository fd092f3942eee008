"""A text's vector is the mean of the last hidden states of its tokens, [CLS] and [SEP] excluded."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron.core import device
from megatron.core.errors import FlagError
from megatron.training.checkpointing import load_checkpoint
from megatron.training.global_vars import get_args, get_tokenizer
from megatron.training.setup import get_model
from megatron.training.utils import unwrap_model
from pretrain_bert import model_provider

END_OF_DOCUMENT = "<|endoftext|>"
HUGGINGFACE_MODEL = "bert-large-cased"

Vectors = NDArray[np.float32]


class TextDataset(Protocol):
    """Samples that hold a `text` each."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class BertEmbedder:
    """Embeds texts, `batch_size` at a time in their order, cut to `max_bert_seq_length` tokens.

    `embedder_type` is "megatron", the model of --load, or "huggingface", bert-large-cased or the directory given as
    `huggingface_model`. `warmup` embeds a text first, so that a first call takes no longer than others.
    FlagError for a command line without --output-bert-embeddings, or with tensor or pipeline parallelism.
    """

    def __init__(
        self,
        batch_size: int,
        max_bert_seq_length: int,
        embedder_type: str,
        warmup: bool = True,
        *,
        huggingface_model: str = HUGGINGFACE_MODEL,
    ) -> None:
        args = get_args()
        if not args.output_bert_embeddings:
            raise FlagError("--output-bert-embeddings", "a BERT for embeddings is told so", "add it")
        if args.tensor_model_parallel_size != 1 or args.pipeline_model_parallel_size != 1:
            raise FlagError(
                "--tensor-model-parallel-size, --pipeline-model-parallel-size",
                "embeddings are computed by whole models", "drop both; several processes share the blocks instead",
            )  # fmt: skip
        if batch_size < 1 or max_bert_seq_length < 3:
            raise ValueError(f"no text fits a batch of {batch_size} x {max_bert_seq_length} tokens")
        self.batch_size = batch_size
        if embedder_type == "huggingface":
            self._embed, self.hidden_size = huggingface_bert(huggingface_model, max_bert_seq_length)
        elif embedder_type == "megatron":
            self._embed, self.hidden_size = megatron_bert(args, max_bert_seq_length), args.hidden_size
        else:
            raise ValueError(f"embedder_type {embedder_type!r} is neither 'megatron' nor 'huggingface'")
        if warmup:
            self.embed_text("the first call is the slowest")

    def embed_text(self, text: str) -> Vectors:
        """The vector of one text [h]."""
        return self._embed([text])[0]

    def embed_text_dataset(self, text_dataset: TextDataset) -> Vectors:
        """The vectors of all texts [n, h], in their order."""
        parts = [np.empty((0, self.hidden_size), np.float32)]
        parts += [self._embed(texts) for texts in batches(text_dataset, self.batch_size)]
        return np.concatenate(parts)


def batches(dataset: TextDataset, size: int) -> Iterator[list[str]]:
    """The texts of a data set, `size` at a time."""
    for first in range(0, len(dataset), size):
        yield [dataset[index]["text"] for index in range(first, min(first + size, len(dataset)))]


def token_row(text: str, tokenizer: Any, max_length: int) -> list[int]:
    """[CLS], the text's tokens as far as they fit, [SEP]; a text without any has one [PAD] between."""
    tokens = tokenizer.tokenize(text.replace(END_OF_DOCUMENT, ""))[: max_length - 2]
    return [tokenizer.cls, *(tokens or [tokenizer.pad]), tokenizer.sep]


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Tokens and mask (1 = token) [b, longest]."""
    tokens = torch.full((len(rows), max(map(len, rows))), pad)
    mask = torch.zeros_like(tokens)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return tokens.to(device.current()), mask.to(device.current())


def megatron_bert(args: Namespace, max_length: int) -> Callable[[list[str]], Vectors]:
    """Texts -> vectors [n, h] by the model of --load."""
    if args.load is None:
        raise FlagError("--load", "there is no model to embed with", "add --load DIR")
    if max_length > args.max_position_embeddings:
        raise FlagError(
            "--max-position-embeddings", f"texts of {max_length} tokens exceed its {args.max_position_embeddings}",
            "cut texts shorter",
        )  # fmt: skip
    args.no_load_optim = args.no_load_rng = args.exit_on_missing_checkpoint = True
    model = get_model(model_provider, wrap_with_ddp=False)
    load_checkpoint(model, None, None, args=args)
    # The same weights as in pretraining: only what the last stage returns is another thing.
    unwrap_model(model[0]).return_embeddings = True
    model[0].eval()
    tokenizer = get_tokenizer()

    @torch.no_grad()
    def embed(texts: list[str]) -> Vectors:
        tokens, mask = padded([token_row(text, tokenizer, max_length) for text in texts], tokenizer.pad)
        types = torch.zeros_like(tokens) if args.bert_binary_head else None
        return model[0](tokens, mask, types).float().cpu().numpy()

    return embed


def huggingface_bert(name: str, max_length: int) -> tuple[Callable[[list[str]], Vectors], int]:
    """(texts -> vectors [n, h] by a BERT of transformers, h). A text without tokens has the vector 0."""
    try:
        from transformers import AutoTokenizer, BertModel
    except ImportError as error:
        raise FlagError(
            "--bert-embedder-type", "huggingface needs transformers", "pip install transformers"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = BertModel.from_pretrained(name, add_pooling_layer=False)
    except (OSError, ValueError) as error:
        raise FlagError(
            "--bert-embedder-type", f"{name} is not on this machine and cannot be fetched, or is no BERT ({error})",
            "put it into the cache of transformers first",
        ) from error  # fmt: skip
    model = model.to(device.current()).eval()

    @torch.no_grad()
    def embed(texts: list[str]) -> Vectors:
        plain = [text.replace(END_OF_DOCUMENT, "") for text in texts]
        rows = tokenizer(plain, truncation=True, max_length=max_length)["input_ids"]
        tokens, mask = padded(rows, tokenizer.pad_token_id)
        hidden = model(input_ids=tokens, attention_mask=mask).last_hidden_state.float()  # [b, s, h]
        position = torch.arange(tokens.size(1), device=tokens.device)
        inner = ((position >= 1) & (position < mask.sum(1, keepdim=True) - 1)).unsqueeze(-1)
        return ((hidden * inner).sum(1) / inner.sum(1).clamp(min=1)).cpu().numpy()

    return embed, model.config.hidden_size
