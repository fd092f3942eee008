"""A micro-batch on its way to the model: tensor-parallel broadcast, context-parallel cut, left-to-right masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import device, parallel_state, tensor_parallel
from megatron.core.context_parallel import split
from megatron.core.datasets.packing import document_attention_mask, document_position_ids
from megatron.training.context import TrainContext
from megatron.training.global_vars import get_context

_DTYPES = {"loss_mask": torch.float32, "attention_mask": torch.bool}
_FIRST_STAGE = ("tokens", "attention_mask", "position_ids")
_LAST_STAGE = ("labels", "loss_mask", "attention_mask")
_MIDDLE_STAGE = ("attention_mask",)
_ALL = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")


def get_batch_on_this_tp_rank(
    data_iterator: Any, *, ctx: TrainContext | None = None
) -> dict[str, Tensor | None]:
    """The next GPT micro-batch on every tensor-parallel rank; the first one reads, the others receive.

    tokens, labels, position_ids int64 [b, s], loss_mask float32 [b, s], attention_mask bool [b, 1, s, s], or None where it
    would only say "look left". With `--reset-attention-mask` and a dataset that makes no masks it is made here, from the
    tokens. Stages get what they need: the first no labels, the last no tokens, those between the mask alone. All ranks of
    the group call.
    """
    ctx = ctx or get_context()
    args, documents_apart = ctx.args, makes_attention_mask(ctx.args)
    first = parallel_state.is_pipeline_first_stage()
    last = parallel_state.is_pipeline_last_stage()
    wanted = _ALL if first and last else _FIRST_STAGE if first else _LAST_STAGE if last else _MIDDLE_STAGE
    batch: dict[str, Tensor | None] = dict.fromkeys(_ALL)
    reads = parallel_state.get_tensor_model_parallel_rank() == 0
    if reads:
        data = next(data_iterator)
        for key in wanted:
            value = data.get(key)
            if value is None or (key == "attention_mask" and not documents_apart and _is_causal(value)):
                continue
            batch[key] = value.to(device.current(), dtype=_DTYPES.get(key, torch.int64), non_blocking=True)
        if documents_apart and batch["attention_mask"] is None:
            tokens = data["tokens"].to(device.current(), non_blocking=True)
            batch["attention_mask"] = document_attention_mask(tokens, ctx.tokenizer.eod)[:, None]
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return batch
    source = parallel_state.get_tensor_model_parallel_src_rank()
    group = parallel_state.get_tensor_model_parallel_group()
    shape = (args.micro_batch_size, args.seq_length)
    for key in wanted:
        if key == "attention_mask":
            if not documents_apart:
                continue
            size: tuple[int, ...] = (args.micro_batch_size, 1, args.seq_length, args.seq_length)
        else:
            size = shape
        tensor = batch[key]
        if tensor is None:
            tensor = torch.empty(size, dtype=_DTYPES.get(key, torch.int64), device=device.current())
        dist.broadcast(tensor, source, group=group)
        batch[key] = tensor
    return batch


def get_fields_on_this_tp_rank(data_iterator: Any, keys: Sequence[str]) -> dict[str, Tensor]:
    """These int64 fields of the next micro-batch on every tensor-parallel rank; the first one reads, the others receive.

    For BERT and T5, whose stages all need the padding and therefore all read. All ranks of the group call.
    """
    reads = parallel_state.get_tensor_model_parallel_rank() == 0
    return tensor_parallel.broadcast_data(keys, next(data_iterator) if reads else None, torch.int64)


def makes_attention_mask(args: Any) -> bool:
    """Whether micro-batches carry an attention mask: only where it says more than "look left"."""
    return bool(args.reset_attention_mask)


def _is_causal(mask: Tensor) -> bool:
    """Whether mask bool [b or 1, 1, s, s] only hides what comes later, as attention does without one, and faster."""
    length = mask.shape[-1]
    return bool((mask == ~torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()).all())


def get_batch_on_this_cp_rank(batch: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """This context-parallel rank's share of a micro-batch: chunks r and 2*cp-1-r of the sequence.

    [b, s] -> [b, s/cp]; attention_mask [b, 1, s, s] -> [b, 1, s/cp, s].
    """
    size = parallel_state.get_context_parallel_world_size()
    if size == 1:
        return batch
    rank = parallel_state.get_context_parallel_rank()
    return {
        key: value if value is None else split.take(value, 1 if key != "attention_mask" else 2, size, rank)
        for key, value in batch.items()
    }


def get_ltor_masks_and_position_ids(
    data: Tensor,
    eod_token: int,
    reset_position_ids: bool,
    reset_attention_mask: bool,
    eod_mask_loss: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Masks and positions for left-to-right models over tokens [b, s] (spec: data).

    Returns attention_mask bool [b or 1, 1, s, s] (True: may not look), loss_mask float32 [b, s], position_ids int64 [b, s].
    With the resets, what follows an end-of-document token starts a new document.
    """
    batch, length = data.shape
    loss_mask = torch.ones(data.shape, dtype=torch.float32, device=data.device)
    if eod_mask_loss:
        loss_mask[data == eod_token] = 0.0
    if reset_attention_mask:
        attention_mask = document_attention_mask(data, eod_token)
    else:
        attention_mask = ~torch.ones(1, length, length, dtype=torch.bool, device=data.device).tril()
    if reset_position_ids:
        position_ids = document_position_ids(data, eod_token)
    else:
        position_ids = torch.arange(length, device=data.device).expand(batch, length).clone()
    return attention_mask[:, None], loss_mask, position_ids
