"""Evaluate a GPT as it is: perplexity on WIKITEXT103, accuracy on LAMBADA (spec: tasks, sections 8 and 9)."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import device, parallel_state, tensor_parallel
from megatron.core.enums import ModelType
from megatron.training import get_tokenizer
from megatron.training.batch import get_fields_on_this_tp_rank, get_ltor_masks_and_position_ids
from megatron.training.checkpointing import load_checkpoint
from megatron.training.setup import get_model
from megatron.training.utils import print_rank_0, print_rank_last
from pretrain_gpt import model_provider
from tasks.eval_utils import reader, run_forward, shares_of
from tasks.zeroshot_gpt.datasets import LMDataset, build_dataset


def main(args: Namespace) -> None:
    """Evaluate the model in --load (without it, one that knows nothing) as the command line says."""
    model = get_model(model_provider, ModelType.encoder_or_decoder, wrap_with_ddp=False)
    if args.load is not None:
        args.no_load_optim = args.no_load_rng = args.exit_on_missing_checkpoint = True
        load_checkpoint(model, None, None, args=args)
    dataset = build_dataset(args.task, args, get_tokenizer())
    total = evaluate(dataset, model, "accuracy" if args.task == "LAMBADA" else "loss", args)
    for line in results(args.task, total, dataset):
        print_rank_last(line)
    print_rank_0("done :-)")


def evaluate(dataset: Any, model: list[torch.nn.Module], metric: str, args: Namespace) -> float:
    """The sum of a metric, `loss` or `accuracy`, over a data set; on the ranks of the last stage."""
    for chunk in model:
        chunk.eval()
    batches, counted = shares_of(dataset, args.micro_batch_size)
    iterator = reader(dataset, batches, args.num_workers)
    total = torch.zeros((), dtype=torch.float64, device=device.current())
    for iteration, (indices, samples) in enumerate(zip(batches, counted)):
        if iteration % args.log_interval == 0:
            print_rank_0(f"> working on iteration: {iteration}")
        result = run_forward(
            partial(forward_step, metric, samples, args), iterator, model, len(indices), args
        )
        if result is not None:
            total += result
    if parallel_state.is_pipeline_last_stage():
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return total.item()


def forward_step(
    metric: str, counted: int, args: Namespace, data_iterator: Any, model: torch.nn.Module
) -> tuple[Tensor, Callable[..., Any]]:
    """Losses [b, s] or logits [b, s, v/tp] of a batch, and the metric's sum over its first `counted` samples."""
    tokens, labels, attention_mask, position_ids, loss_mask = process_batch(data_iterator, args)
    if metric == "loss":
        output = model(tokens, position_ids, attention_mask, labels=labels)
    else:
        output = model(tokens, position_ids, attention_mask)

    def summed(output: Tensor, non_loss_data: bool = True) -> Tensor:
        mask = loss_mask[:counted]
        if metric == "loss":
            return (output[:counted].float() * mask).sum()
        logits = tensor_parallel.gather_from_tensor_model_parallel_region(output[:counted])
        right = (logits.argmax(-1) == labels[:counted]) | (mask == 0)
        return right.all(dim=1).sum()

    return output, summed


def process_batch(
    data_iterator: Any, args: Namespace
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """tokens, labels [b, s], attention mask or None (look left), position ids, mask of the predictions that count."""
    batch = get_fields_on_this_tp_rank(data_iterator, ("text", "pad_mask"))
    tokens, labels = batch["text"][:, :-1].contiguous(), batch["text"][:, 1:].contiguous()
    attention_mask, loss_mask, position_ids = get_ltor_masks_and_position_ids(
        tokens,
        get_tokenizer().eod,
        args.reset_position_ids,
        args.reset_attention_mask,
        args.eod_mask_loss,
    )
    # What "look left" says needs no mask.
    mask = attention_mask if args.reset_attention_mask else None
    return tokens, labels, mask, position_ids, batch["pad_mask"] * loss_mask


def results(task: str, total: float, dataset: Any) -> list[str]:
    """v0.9's report of the sum over a data set, between lines of dashes."""
    text = f" validation results on {task} | "
    if isinstance(dataset, LMDataset):
        predicted = dataset.num_tokenized_tokens - 1
        average = total / predicted
        ratio = predicted / (dataset.num_original_tokens - 1)
        text += (
            f"avg loss: {average:.4E} | ppl: {math.exp(min(20, average)):.4E} |"
            f" adjusted ppl: {math.exp(min(20, average * ratio)):.4E} | token ratio: {ratio} |"
        )
    else:
        text += (
            f"number correct: {total:.4E} | total examples: {len(dataset):.4E} |"
            f" avg accuracy: {total / len(dataset):.4E}"
        )
    dashes = "-" * (len(text) + 1)
    return [dashes, text, dashes]
