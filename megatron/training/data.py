"""Datasets, loaders and iterators of a run."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from megatron.core import device, parallel_state
from megatron.training import report
from megatron.training.context import TrainContext
from megatron.training.data_samplers import build_pretraining_data_loader
from megatron.training.global_vars import get_context
from megatron.training.utils import print_rank_0

DatasetsProvider = Callable[..., Any]


def get_train_valid_test_num_samples(*, ctx: TrainContext | None = None) -> tuple[int, int, int]:
    """How many samples training, validation and test will draw (spec: training, section 5)."""
    args = (ctx or get_context()).args
    train = args.train_samples or args.train_iters * args.global_batch_size
    evaluations = args.train_iters // args.eval_interval + 1 if args.eval_interval else 1
    valid = evaluations * args.eval_iters * args.global_batch_size
    return train, valid, args.eval_iters * args.global_batch_size


def build_train_valid_test_datasets(provider: DatasetsProvider, *, ctx: TrainContext | None = None) -> Any:
    """Print the targets and call the provider."""
    sizes = get_train_valid_test_num_samples(ctx=ctx)
    print_rank_0(" > datasets target sizes (minimum size):")
    for name, size in zip(("train", "validation", "test"), sizes):
        print_rank_0(f"    {name + ':':<12}{size}")
    splits = provider(sizes)
    for line in report.datasets(splits):
        print_rank_0(line)
    return splits


def build_train_valid_test_data_loaders(
    provider: DatasetsProvider, *, ctx: TrainContext | None = None
) -> tuple[Any, Any, Any]:
    """Loaders for the three splits at their positions; sets `args.do_train`, `do_valid`, `do_test`. All ranks call."""
    ctx = ctx or get_context()
    args = ctx.args
    print_rank_0("> building train, validation, and test datasets ...")
    _recover_consumed_samples(args)
    loaders: tuple[Any, Any, Any] = (None, None, None)
    if getattr(provider, "is_distributed", False) or parallel_state.get_tensor_model_parallel_rank() == 0:
        train, valid, test = build_train_valid_test_datasets(provider, ctx=ctx)
        valid_position = 0 if args.skip_train else args.consumed_valid_samples
        loaders = (
            build_pretraining_data_loader(train, args.consumed_train_samples, args=args),
            build_pretraining_data_loader(valid, valid_position, args=args),
            build_pretraining_data_loader(test, 0, args=args),
        )
    train_loader, valid_loader, test_loader = loaders
    flags = torch.tensor(
        [
            train_loader is not None and args.train_iters > 0,
            valid_loader is not None and args.eval_iters > 0,
            test_loader is not None and args.eval_iters > 0,
        ],
        dtype=torch.long,
        device=device.current(),
    )
    dist.broadcast(flags, 0)
    # With virtual chunks any chunk that has data decides for all.
    args.do_train = getattr(args, "do_train", False) or bool(flags[0])
    args.do_valid = getattr(args, "do_valid", False) or bool(flags[1])
    args.do_test = getattr(args, "do_test", False) or bool(flags[2])
    return loaders


def _recover_consumed_samples(args: Namespace) -> None:
    """Positions of checkpoints that are older than the counters."""
    by_iterations = args.train_samples is None
    if args.iteration > 0 and args.consumed_train_samples == 0 and by_iterations:
        args.consumed_train_samples = args.iteration * args.global_batch_size
    if args.iteration > 0 and args.consumed_valid_samples == 0 and by_iterations and args.eval_interval:
        evaluations = args.iteration // args.eval_interval
        args.consumed_valid_samples = evaluations * args.eval_iters * args.global_batch_size


def cyclic_iter(iterable: Any) -> Iterator[Any]:
    """Iterate again and again."""
    while True:
        yield from iterable


def build_train_valid_test_data_iterators(
    provider: DatasetsProvider, *, ctx: TrainContext | None = None
) -> tuple[Any, Any, Any]:
    """Iterators for the three splits, by `--dataloader-type`; None where this rank reads no data."""
    args = (ctx or get_context()).args

    def iterator(loader: Any) -> Any:
        if loader is None or args.dataloader_type == "external":
            return loader
        batches = cyclic_iter(loader) if args.dataloader_type == "cyclic" else iter(loader)
        return device.fetched_ahead(batches)

    train, valid, test = build_train_valid_test_data_loaders(provider, ctx=ctx)
    return iterator(train), iterator(valid), iterator(test)
