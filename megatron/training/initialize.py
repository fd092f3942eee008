"""From a command line to a process that is ready to build its model."""

from __future__ import annotations

import logging
import os
import random
import sys
from argparse import Namespace
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron.core import device, parallel_state, tensor_parallel
from megatron.core.errors import FlagError
from megatron.training import report, watch
from megatron.training.arguments import (
    core_transformer_config_from_args,
    parse_args,
    validate_args,
    validate_for_training,
)
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.config import build
from megatron.training.context import TrainContext
from megatron.training.global_vars import get_context, set_global_variables
from megatron.training.yaml_arguments import read_mapping

RankFunction = Callable[[list[int]], list[int]]


def initialize_megatron(
    extra_args_provider: Callable[..., Any] | None = None,
    args_defaults: dict[str, Any] | None = None,
    ignore_unknown_args: bool = False,
    allow_no_cuda: bool = False,
    skip_mpu_initialization: bool = False,
    get_embedding_ranks: RankFunction | None = None,
    get_position_embedding_ranks: RankFunction | None = None,
    *,
    for_training: bool = False,
) -> TrainContext:
    """Parse and check the command line, start process groups, seed, and make the context current.

    `allow_no_cuda` is accepted for compatibility: every run may be on CPU. With `skip_mpu_initialization` no process group
    is created; `for_training` also checks what only a training run needs. All ranks must call. Raises FlagError for a
    command line that cannot be run.
    """
    del allow_no_cuda
    args = parse_args(extra_args_provider, ignore_unknown_args)
    prepare_args(args, args_defaults or {})
    if for_training:
        validate_for_training(args)
        build.configs(args)
    set_global_variables(args)
    setup_logging()
    if not skip_mpu_initialization:
        start_distributed(args, get_embedding_ranks, get_position_embedding_ranks)
    return get_context()


def prepare_args(args: Namespace, defaults: dict[str, Any]) -> None:
    """Everything between parsing and a checked set of arguments: checkpoint arguments, derived values, rules."""
    if args.ckpt_convert_format is not None:
        if not args.ckpt_convert_save or not args.load:
            raise FlagError(
                "--ckpt-convert-format",
                "it converts one checkpoint into another",
                "add --load and --ckpt-convert-save",
            )
        args.exit_on_missing_checkpoint = True
    if args.use_checkpoint_args or defaults.get("use_checkpoint_args"):
        if not args.load:
            raise FlagError(
                "--use-checkpoint-args", "there is no checkpoint to take them from", "add --load DIR"
            )
        load_args_from_checkpoint(args)
    validate_args(args, defaults)


def start_distributed(
    args: Namespace,
    get_embedding_ranks: RankFunction | None = None,
    get_position_embedding_ranks: RankFunction | None = None,
) -> None:
    """Join the world, create the model-parallel groups and seed; all ranks must call."""
    if args.deterministic_mode:
        torch.use_deterministic_algorithms(True)
    init_process_group(args)
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size,
        args.pipeline_model_parallel_split_rank,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        distributed_timeout_minutes=args.distributed_timeout_minutes,
        nccl_communicator_config_path=args.nccl_communicator_config_path,
        order="tp-pp-dp" if args.use_tp_pp_dp_mapping else "tp-cp-ep-dp-pp",
        encoder_tensor_model_parallel_size=args.encoder_tensor_model_parallel_size,
        encoder_pipeline_model_parallel_size=args.encoder_pipeline_model_parallel_size,
        get_embedding_ranks=get_embedding_ranks,
        get_position_embedding_ranks=get_position_embedding_ranks,
    )
    if args.rank == 0:
        tp, pp = args.tensor_model_parallel_size, parallel_state.get_pipeline_model_parallel_world_size()
        print(f"> initialized tensor model parallel with size {tp}", flush=True)
        print(f"> initialized pipeline model parallel with size {pp}", flush=True)
        print(f"> setting random seeds to {args.seed} ...", flush=True)
    set_random_seed(args.seed, args.data_parallel_random_init)
    if args.tp_comm_overlap and args.transformer_impl == "transformer_engine":
        _start_user_buffers(args)


def _start_user_buffers(args: Namespace) -> None:
    """What Transformer Engine's layers need to overlap tensor-parallel transfers; those of this project need nothing."""
    from megatron.core.extensions.transformer_engine import start_user_buffers  # needs that package

    path = args.tp_comm_overlap_cfg
    settings = {} if path is None else read_mapping("--tp-comm-overlap-cfg", path)
    tokens = args.seq_length * args.micro_batch_size // args.context_parallel_size
    start_user_buffers(core_transformer_config_from_args(args), tokens, settings)


def init_process_group(args: Namespace) -> None:
    """Start torch.distributed unless it runs already; then rank and world size are read from it."""
    if dist.is_initialized():
        args.rank, args.world_size = dist.get_rank(), dist.get_world_size()
        device.init(args.local_rank)
        return
    if args.rank == 0:
        print("> initializing torch distributed ...", flush=True)
    device.init(args.local_rank)
    backend, notice = device.backend_for(args.distributed_backend)
    if notice and args.rank == 0:
        print(f"> {notice}", flush=True)
    # A plain `python pretrain_gpt.py` is a world of one.
    os.environ.setdefault("MASTER_ADDR", "localhost")
    store = None
    if args.world_size == 1 and "MASTER_PORT" not in os.environ:
        store = dist.HashStore()
    dist.init_process_group(
        backend=backend,
        store=store,
        world_size=args.world_size,
        rank=args.rank,
        timeout=timedelta(minutes=args.distributed_timeout_minutes),
    )
    if args.world_size > 1:
        connection = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        watch.start(
            dist.PrefixStore(f"attempt {attempt}", connection),
            args.rank,
            progress=lambda: _progress(args),
            patience=watch.patience_s(backend, args.distributed_timeout_minutes),
        )


def _progress(args: Namespace) -> tuple[int, int, int] | None:
    """Counts of steps begun and ended and of evaluated samples; None before the first step."""
    if "curr_iteration" not in args:
        return None
    return args.curr_iteration, args.iteration, args.consumed_valid_samples


def set_random_seed(seed: int, data_parallel_random_init: bool = False) -> None:
    """Seed python, numpy, torch and the RNG tracker of this rank (spec: training, section 11)."""
    if seed is None or seed <= 0:
        raise FlagError("--seed", f"{seed} is not a positive number", "choose a seed of at least 1")
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    if data_parallel_random_init:
        seed += 10 * parallel_state.get_data_parallel_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _set_random_seed(seed_: int, data_parallel_random_init: bool = False) -> None:
    """`set_random_seed` as v0.9's users know it."""
    set_random_seed(seed_, data_parallel_random_init)


def write_args_to_tensorboard() -> None:
    """Every argument as a TensorBoard text, at the iteration of `args.iteration`."""
    context = get_context()
    if context.tensorboard:
        for name, value in vars(context.args).items():
            context.tensorboard.add_text(name, str(value), global_step=context.args.iteration)


def set_jit_fusion_options() -> None:
    """Kept for entry scripts that call it: kernels are chosen by the registry, nothing is warmed up."""


def setup_logging() -> None:
    """Root logger to stdout at `--logging-level`, else MEGATRON_LOGGING_LEVEL, else INFO (section 17.4)."""
    args = get_context().args
    level = int(os.getenv("MEGATRON_LOGGING_LEVEL", logging.INFO))
    if args.logging_level is not None:
        level = args.logging_level
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(logging.BASIC_FORMAT))
    handler.addFilter(lambda record: not record.name.startswith("torch.distributed"))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)


def print_start_report() -> None:
    """The part of the start-up report that is known before the model is built; rank 0 prints."""
    context = get_context()
    if context.args.rank == 0:
        for line in report.layout(context.args) + report.tokenizer(context.args, context.tokenizer):
            print(line, flush=True)
