"""Finetuning: epochs over a small labelled set, an accuracy after each (spec: tasks, section 6)."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from megatron.core import device, parallel_state
from megatron.core.enums import ModelType
from megatron.core.errors import DataError
from megatron.core.utils import get_model_config
from megatron.training import get_timers, report
from megatron.training.batch import get_fields_on_this_tp_rank
from megatron.training.checkpointing import load_checkpoint
from megatron.training.data import cyclic_iter
from megatron.training.global_vars import get_context
from megatron.training.losses import check_loss, in_full_precision
from megatron.training.progress import JobThroughput
from megatron.training.setup import get_model, setup_model_and_optimizer
from megatron.training.training import Run, print_datetime
from megatron.training.utils import (
    average_losses_across_data_parallel_group,
    print_rank_0,
    unwrap_model,
)
from tasks.eval_utils import Accuracy
from tasks.models import BertWithHead, lacks_head

LossAndReport = tuple[Tensor, dict[str, Tensor]]
ModelProvider = Callable[..., BertWithHead]
#: What a micro-batch of a labelled set consists of.
FIELDS = ("text", "types", "label", "padding_mask")


def process_batch(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tokens, types and padding mask [rows, s], labels [b]; samples of several sequences become several rows."""
    length = batch["text"].size(-1)
    tokens, types, padding_mask = (batch[name].view(-1, length) for name in ("text", "types", "padding_mask"))
    return tokens, types, batch["label"], padding_mask


def cross_entropy_loss_func(labels: Tensor, output_tensor: Tensor) -> LossAndReport:
    """Mean cross entropy of logits [b, n] against labels [b], and its data-parallel average for the log."""
    loss = cross_entropy(in_full_precision(output_tensor), labels)
    check_loss(loss, "lm loss")
    return loss, {"lm loss": average_losses_across_data_parallel_group([loss])[0]}


def finetune_step(
    data_iterator: Iterator[dict[str, Tensor]] | None, model: torch.nn.Module
) -> tuple[Tensor, Callable[[Tensor], LossAndReport]]:
    """One micro-batch: logits [b, n] on the last stage, hidden states [s/sp, rows, h] before it."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    tokens, types, labels, padding_mask = process_batch(get_fields_on_this_tp_rank(data_iterator, FIELDS))
    timers("batch-generator").stop()
    return model(tokens, padding_mask, types), partial(cross_entropy_loss_func, labels)


@dataclass
class EpochLoader:
    """The batches of this data-parallel rank, shuffled anew in each epoch; the same whenever an epoch is begun again."""

    dataset: Dataset
    batch_size: int
    num_workers: int
    keep_last: bool
    seed: int

    def batches(self, epoch: int) -> list[list[int]]:
        """The epoch's batches of sample numbers. A rank that would have less than another repeats samples."""
        sampler: DistributedSampler[Any] = DistributedSampler(
            self.dataset,
            num_replicas=parallel_state.get_data_parallel_world_size(),
            rank=parallel_state.get_data_parallel_rank(),
        )
        sampler.set_epoch(self.seed + epoch)
        order = list(sampler)
        ends = range(0, len(order) if self.keep_last else len(order) - self.batch_size + 1, self.batch_size)
        return [order[first : first + self.batch_size] for first in ends]

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.batches(0))

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[dict[str, Tensor]]:
        """The samples of an epoch, batch by batch, after the first `skip` batches."""
        yield from DataLoader(
            self.dataset, batch_sampler=self.batches(epoch)[skip:], num_workers=self.num_workers,
            pin_memory=device.available(), generator=torch.Generator(),
        )  # fmt: skip


@dataclass
class EpochRun(Run):
    """The training loop with an end to each epoch: a checkpoint, and what `end_of_epoch` has to say."""

    per_epoch: int = 0
    end_of_epoch: Accuracy | None = None

    def _save_and_decide_exit(self, iteration: int, throughput: JobThroughput) -> bool:
        args = self.ctx.args
        exiting = super()._save_and_decide_exit(iteration, throughput)
        if iteration % self.per_epoch or exiting:
            return exiting
        if args.save and not (args.save_interval and iteration % args.save_interval == 0):
            self._save_in_loop(iteration, throughput)
        if self.end_of_epoch is not None:
            self.ctx.timers("interval-time").stop()
            with self._gathered_parameters():
                self.end_of_epoch(self.model, iteration // self.per_epoch - 1)
            self.ctx.timers("interval-time").start(barrier=True)
        return exiting


def finetune(
    args: Namespace,
    train_valid_datasets_provider: Callable[[], tuple[Any, Any]],
    model_provider: ModelProvider,
    head: str,
    end_of_epoch_callback_provider: Callable[[int], Accuracy],
) -> None:
    """Train for `--epochs` and report accuracies, or with 0 epochs only report them.

    `head` names the model's last layer in checkpoints; the callback's provider gets the micro-batch size of the command
    line. All ranks must call.
    """
    timers = get_timers()
    if args.epochs == 0:
        _evaluate(args, model_provider, head, end_of_epoch_callback_provider)
        return
    timers("train/valid/test dataset/dataloader", log_level=0).start()
    train, valid = train_valid_datasets_provider()
    print_rank_0("building train and validation dataloaders ...")
    loaders = [
        EpochLoader(d, args.micro_batch_size, args.num_workers, args.keep_last, args.seed)
        for d in (train, valid)
    ]
    per_epoch = len(loaders[0])
    if not per_epoch or (args.eval_iters and not len(loaders[1])):
        why = f"{len(train)} training and {len(valid)} validation samples do not fill a batch on each replica"
        raise DataError("--train-data, --valid-data", why, "lower --micro-batch-size or add --keep-last")
    args.train_iters, args.train_samples = args.epochs * per_epoch, None
    timers("train/valid/test dataset/dataloader").stop()

    timers("callback function", log_level=0).start()
    end_of_epoch = end_of_epoch_callback_provider(args.micro_batch_size)
    timers("callback function").stop()
    # The model sees several sequences for each sample of some tasks; from here on batches are counted in them.
    multiplier = getattr(train, "sample_multiplier", 1)
    args.micro_batch_size *= multiplier
    args.global_batch_size *= multiplier
    args.do_train, args.do_valid, args.do_test = True, args.eval_iters > 0, False

    timers("model and optimizer", log_level=0).start()
    context: dict[str, Any] = {}
    model, optimizer, scheduler = _setup(model_provider, head, context, args)
    timers("model and optimizer").stop()
    report.print_run_report(get_context(), model, scheduler)
    print_rank_0("done with setups ...")
    timers.log(["train/valid/test dataset/dataloader", "callback function", "model and optimizer"])
    print_rank_0("training ...")
    reads = parallel_state.get_tensor_model_parallel_rank() == 0
    run = EpochRun(
        forward_step_func=finetune_step,
        model=model,
        optimizer=optimizer,
        opt_param_scheduler=scheduler,
        train_data_iterator=_training_batches(loaders[0], args) if reads else None,
        valid_data_iterator=cyclic_iter(_Again(loaders[1])) if reads else None,
        test_data_iterator=None,
        process_non_loss_data_func=None,
        config=get_model_config(model[0]),
        checkpointing_context=context,
        ctx=get_context(),
        start_time=time.time(),
        per_epoch=per_epoch,
        end_of_epoch=end_of_epoch,
    )
    if args.iteration < args.train_iters:
        run.train()
    print_datetime("after training is done")
    print_rank_0("done :-)")


def _training_batches(loader: EpochLoader, args: Namespace) -> Iterator[dict[str, Tensor]]:
    """The batches of all epochs from where the run was stopped."""
    begun, skip = divmod(args.iteration, len(loader))
    for epoch in range(begun, args.epochs):
        print_rank_0(f"working on epoch {epoch + 1} ...")
        yield from loader.epoch(epoch, skip if epoch == begun else 0)


@dataclass
class _Again:
    """The validation set in one order, as often as it is asked for."""

    loader: EpochLoader

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.loader.epoch(0)


def _setup(
    model_provider: ModelProvider, head: str, context: dict[str, Any], args: Namespace
) -> tuple[list[torch.nn.Module], Any, Any]:
    """Model, optimizer and schedule with what --load holds; at iteration 0 with the weights of --pretrained-checkpoint."""
    pretrained, args.pretrained_checkpoint = args.pretrained_checkpoint, None
    new = lacks_head(args.load, head)
    model, optimizer, scheduler = setup_model_and_optimizer(
        partial(_provide, model_provider, new), ModelType.encoder_or_decoder, checkpointing_context=context
    )
    args.pretrained_checkpoint = pretrained
    _expect_head(model, True)
    if args.iteration == 0 and pretrained is not None:
        load_pretrained(model, pretrained, head, args)
        optimizer.reload_model_params()
    return model, optimizer, scheduler


def load_pretrained(model: list[torch.nn.Module], directory: str, head: str, args: Namespace) -> None:
    """Take the weights, and nothing else, of the checkpoint in `directory`; all ranks must call."""
    own = {
        name: getattr(args, name) for name in ("load", "finetune", "exit_on_missing_checkpoint", "ckpt_step")
    }
    _expect_head(model, not lacks_head(directory, head))
    args.load, args.finetune, args.exit_on_missing_checkpoint, args.ckpt_step = directory, True, True, None
    load_checkpoint(model, None, None, args=args)
    for name, value in own.items():
        setattr(args, name, value)
    _expect_head(model, True)


def _provide(model_provider: ModelProvider, head_is_new: bool, **stage: Any) -> BertWithHead:
    model = model_provider(**stage)
    model.head_is_new = head_is_new
    return model


def _expect_head(model: list[torch.nn.Module], expected: bool) -> None:
    for plain in unwrap_model(model):
        assert isinstance(plain, BertWithHead), "the tasks finetune models with a head"
        plain.head_is_new = not expected


def _evaluate(
    args: Namespace, model_provider: ModelProvider, head: str, callback_provider: Callable[[int], Accuracy]
) -> None:
    """Accuracies and predictions of the model in --load."""
    print_rank_0("evaluation only mode, setting epoch to -1")
    accuracy = callback_provider(args.micro_batch_size)
    new = lacks_head(args.load, head)
    model = get_model(
        partial(_provide, model_provider, new), ModelType.encoder_or_decoder, wrap_with_ddp=False
    )
    args.no_load_optim = args.no_load_rng = args.exit_on_missing_checkpoint = True
    load_checkpoint(model, None, None, args=args)
    accuracy(model, -1, output_predictions=True)
    print_rank_0("done :-)")
