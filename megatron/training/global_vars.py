"""The current TrainContext and the classic getters: views of it for entry scripts and users' code."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.core.errors import FlagError
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.timers import Timers
from megatron.training.context import TrainContext
from megatron.training.dist_signal_handler import DistributedSignalHandler
from megatron.training.metrics import MetricsFile
from megatron.training.tokenizer import build_tokenizer

_CONTEXT: TrainContext | None = None


def get_context() -> TrainContext:
    """The current context; RuntimeError before `initialize_megatron`."""
    if _CONTEXT is None:
        raise RuntimeError("megatron is not initialised: call initialize_megatron (or set_args) first")
    return _CONTEXT


def set_context(context: TrainContext) -> None:
    """Make `context` the current one."""
    global _CONTEXT
    _CONTEXT = context


@contextmanager
def using(context: TrainContext) -> Iterator[None]:
    """Make `context` the current one inside the block."""
    global _CONTEXT
    before, _CONTEXT = _CONTEXT, context
    try:
        yield
    finally:
        _CONTEXT = before


def has_context() -> bool:
    """Whether there is a current context."""
    return _CONTEXT is not None


def get_args() -> Namespace:
    """The arguments of this run."""
    return get_context().args


def get_tokenizer() -> Any:
    """The tokenizer of this run; RuntimeError if it was started without one."""
    tokenizer = get_context().tokenizer
    if tokenizer is None:
        raise RuntimeError("this run has no tokenizer: initialise with one")
    return tokenizer


def get_timers() -> Timers:
    """The timers of this run."""
    return get_context().timers


def get_tensorboard_writer() -> Any:
    """The TensorBoard writer; None away from the last rank or without `--tensorboard-dir`."""
    return get_context().tensorboard


def get_wandb_writer() -> Any:
    """The wandb module of a started run; None away from the last rank or without `--wandb-project`."""
    return get_context().wandb


def get_signal_handler() -> DistributedSignalHandler:
    """The SIGTERM handler; RuntimeError without `--exit-signal-handler`."""
    handler = get_context().signal_handler
    if handler is None:
        raise RuntimeError("no signal handler: start with --exit-signal-handler")
    return handler


def get_one_logger() -> None:
    """v0.9's vendor-internal logger, which this project does not have: always None."""


def get_adlr_autoresume() -> None:
    """v0.9's vendor-internal autoresume client, which this project does not have: always None."""


def set_args(args: Namespace) -> None:
    """Make `args` current, keeping the rest of the context if there is one."""
    if _CONTEXT is None:
        set_context(TrainContext(args, Timers(args_value(args, "timing_log_level", 0), "minmax")))
    else:
        set_context(dataclasses.replace(_CONTEXT, args=args))


def args_value(args: Namespace, name: str, default: Any) -> Any:
    """An attribute that a partial Namespace may lack."""
    return getattr(args, name, default)


def set_global_variables(args: Namespace, build_tokenizer: bool = True) -> None:
    """Build the context of a run from its arguments; needs the rank, not the process groups."""
    if _CONTEXT is not None:
        raise RuntimeError("megatron is initialised already: call destroy_global_vars first")
    init_num_microbatches_calculator(
        args.rank,
        args.rampup_batch_size,
        args.global_batch_size,
        args.micro_batch_size,
        args.data_parallel_size,
        args.decrease_batch_size_if_needed,
    )
    last = args.rank == args.world_size - 1
    tokenizer = _tokenizer(args) if build_tokenizer else None
    handler = DistributedSignalHandler().__enter__() if args.exit_signal_handler else None
    set_context(
        TrainContext(
            args=args,
            timers=Timers(args.timing_log_level, args.timing_log_option),
            tokenizer=tokenizer,
            tensorboard=_tensorboard(args) if last else None,
            wandb=_wandb(args) if last else None,
            metrics=_metrics(args) if last else None,
            signal_handler=handler,
        )
    )


def rebuild_tokenizer(args: Namespace) -> Any:
    """Build the tokenizer anew and make it current."""
    set_context(dataclasses.replace(get_context(), tokenizer=_tokenizer(args)))
    return get_tokenizer()


def destroy_global_vars() -> None:
    """Forget the context, closing what it had open."""
    global _CONTEXT
    if _CONTEXT is None:
        return
    if _CONTEXT.tensorboard is not None:
        _CONTEXT.tensorboard.close()
    if _CONTEXT.metrics is not None:
        _CONTEXT.metrics.close()
    if _CONTEXT.signal_handler is not None:
        _CONTEXT.signal_handler.release()
    _CONTEXT = None


def _tokenizer(args: Namespace) -> Any:
    return build_tokenizer(args)


def _tensorboard(args: Namespace) -> Any:
    if not args.tensorboard_dir:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise FlagError(
            "--tensorboard-dir", f"the package {error.name} is not installed", "pip install tensorboard"
        ) from None
    return SummaryWriter(log_dir=args.tensorboard_dir, max_queue=args.tensorboard_queue_size)


def _wandb(args: Namespace) -> Any:
    if not args.wandb_project:
        return None
    if not args.wandb_exp_name:
        raise FlagError("--wandb-project", "a W&B run needs a name", "add --wandb-exp-name NAME")
    try:
        import wandb
    except ModuleNotFoundError:
        raise FlagError(
            "--wandb-project", "the package wandb is not installed", "pip install wandb"
        ) from None
    directory = Path(args.wandb_save_dir) if args.wandb_save_dir else Path(args.save or ".") / "wandb"
    directory.mkdir(parents=True, exist_ok=True)
    wandb.init(project=args.wandb_project, name=args.wandb_exp_name, dir=str(directory), config=vars(args))
    return wandb


def _metrics(args: Namespace) -> MetricsFile:
    folder = args.save or args.tensorboard_dir or "."
    return MetricsFile(args.metrics_file or Path(folder) / "metrics.jsonl")
