"""Model, optimizer and schedule of a run, built from its arguments."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch

from megatron.core import device, parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel
from megatron.core.enums import ModelType
from megatron.core.errors import FlagError
from megatron.core.num_microbatches_calculator import (
    get_current_global_batch_size,
    update_num_microbatches,
)
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.upcycling_utils import load_and_upcycle_model
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config
from megatron.training.checkpointing import checkpoint_exists, load_checkpoint, save_checkpoint
from megatron.training.config import build, rules
from megatron.training.context import TrainContext
from megatron.training.global_vars import get_context
from megatron.training.utils import print_line, print_rank_0, unwrap_model, update_use_dist_ckpt

ModelProvider = Callable[..., torch.nn.Module]


def get_model(
    model_provider_func: ModelProvider,
    model_type: ModelType = ModelType.encoder_or_decoder,
    wrap_with_ddp: bool = True,
    *,
    ctx: TrainContext | None = None,
) -> list[torch.nn.Module]:
    """The model chunks of this rank: built, moved to the device, in their precision, wrapped for data parallelism."""
    args = (ctx or get_context()).args
    args.model_type = model_type
    chunks = _build_chunks(model_provider_func, model_type, args)
    for chunk in chunks:
        chunk.model_type = model_type
        for param in chunk.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(param)
    if parallel_state.get_data_parallel_rank() == 0 and parallel_state.get_context_parallel_rank() == 0:
        tp = parallel_state.get_tensor_model_parallel_rank()
        pp = parallel_state.get_pipeline_model_parallel_rank()
        count = sum(param.nelement() for chunk in chunks for param in chunk.parameters())
        print_line(f" > number of parameters on (tensor, pipeline) model parallel rank ({tp}, {pp}): {count}")
    chunks = [chunk.to(device.current()) for chunk in chunks]
    if args.fp16 or args.bf16:
        chunks = [Float16Module(_config_in_precision(chunk, args), chunk) for chunk in chunks]
    if wrap_with_ddp:
        ddp_config = build.ddp_config(args)
        chunks = [
            DistributedDataParallel(
                get_model_config(chunk),
                ddp_config,
                chunk,
                # Gradients of later chunks are complete too late for buckets of their own to help.
                disable_bucketing=index > 0 or args.overlap_param_gather_with_optimizer_step,
            )
            for index, chunk in enumerate(chunks)
        ]
        if args.data_parallel_random_init:
            for chunk in chunks:
                chunk.broadcast_params()
    return chunks


def _config_in_precision(chunk: torch.nn.Module, args: Namespace) -> TransformerConfig:
    """The model's own configuration or, if its provider left the precision out, a copy with that of the arguments."""
    config = get_model_config(chunk)
    if not (config.fp16 or config.bf16):
        config = copy.copy(config)
        config.fp16, config.bf16 = args.fp16, args.bf16
    return config


def _build_chunks(
    model_provider_func: ModelProvider, model_type: ModelType, args: Namespace
) -> list[torch.nn.Module]:
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    if model_type == ModelType.encoder_and_decoder:
        if args.virtual_pipeline_model_parallel_size is not None:
            raise FlagError(
                "--num-layers-per-virtual-pipeline-stage",
                "an encoder-decoder model has no interleaved schedule",
                "drop it",
            )
        if stages == 1:
            return [
                model_provider_func(pre_process=True, post_process=True, add_encoder=True, add_decoder=True)
            ]
        stage = parallel_state.get_pipeline_model_parallel_rank()
        first_decoder = args.encoder_pipeline_model_parallel_size
        return [
            model_provider_func(
                pre_process=stage in (0, first_decoder),
                post_process=stage in (first_decoder - 1, stages - 1),
                add_encoder=parallel_state.is_inside_encoder(stage),
                add_decoder=parallel_state.is_inside_decoder(stage),
            )
        ]
    rules.check(args, rules.ONE_STACK)
    if args.virtual_pipeline_model_parallel_size is None or stages == 1:
        return [
            model_provider_func(
                pre_process=parallel_state.is_pipeline_first_stage(),
                post_process=parallel_state.is_pipeline_last_stage(),
            )
        ]
    chunks = []
    for index in range(args.virtual_pipeline_model_parallel_size):
        # Modules read the virtual rank to learn which layers they hold.
        parallel_state.set_virtual_pipeline_model_parallel_rank(index)
        chunks.append(
            model_provider_func(
                pre_process=parallel_state.is_pipeline_first_stage(),
                post_process=parallel_state.is_pipeline_last_stage(),
            )
        )
    parallel_state.set_virtual_pipeline_model_parallel_rank(0)
    return chunks


def setup_model_and_optimizer(
    model_provider_func: ModelProvider,
    model_type: ModelType,
    no_wd_decay_cond: Callable[..., bool] | None = None,
    scale_lr_cond: Callable[..., bool] | None = None,
    lr_mult: float = 1.0,
    checkpointing_context: dict[str, Any] | None = None,
    *,
    ctx: TrainContext | None = None,
) -> tuple[list[torch.nn.Module], MegatronOptimizer, OptimizerParamScheduler]:
    """Build model, optimizer and schedule, and load what `--load` or `--pretrained-checkpoint` names (or upcycle it).

    Sets `args.iteration` and `args.num_floating_point_operations_so_far`. All ranks must call.
    """
    ctx = ctx or get_context()
    args = ctx.args
    model = get_model(model_provider_func, model_type, ctx=ctx)
    config = build.optimizer_config(args)
    config.timers = ctx.timers
    optimizer = get_megatron_optimizer(config, model, no_wd_decay_cond, scale_lr_cond, lr_mult)
    scheduler = get_optimizer_param_scheduler(optimizer, ctx=ctx)
    args.iteration, args.num_floating_point_operations_so_far = 0, 0
    if args.moe_use_upcycling:
        _upcycle(model, optimizer, model_provider_func, model_type, ctx)
    elif args.load is not None or args.pretrained_checkpoint is not None:
        ctx.timers("load-checkpoint", log_level=0).start(barrier=True)
        args.iteration, args.num_floating_point_operations_so_far = load_checkpoint(
            model,
            optimizer,
            scheduler,
            checkpointing_context=checkpointing_context,
            args=args,
        )
        ctx.timers("load-checkpoint").stop(barrier=True)
        ctx.timers.log(["load-checkpoint"])
    args.curr_iteration = args.iteration
    if args.iteration == 0:
        # Models that start from the weights of another one, e.g. of a BERT.
        for plain in unwrap_model(model):
            if hasattr(plain, "init_state_dict_from_bert"):
                plain.init_state_dict_from_bert()
                if args.fp16:
                    optimizer.reload_model_params()
    if args.ckpt_convert_format is not None:
        convert_checkpoint(model, optimizer, scheduler, args)
    return model, optimizer, scheduler


def _upcycle(
    model: list[torch.nn.Module],
    optimizer: MegatronOptimizer,
    model_provider_func: ModelProvider,
    model_type: ModelType,
    ctx: TrainContext,
) -> None:
    """Load a dense checkpoint, every expert a copy of its MLP; save that as iteration 1 (spec: training, section 22.8)."""
    args = ctx.args
    if checkpoint_exists(args.save):
        raise FlagError(
            "--moe-use-upcycling, --save",
            f"{args.save} holds a checkpoint already; only the first run starts from the dense model",
            "drop --moe-use-upcycling and give that directory as --load, or give another --save",
        )
    dense = {"num_experts": None, "expert_model_parallel_size": 1}
    own = {name: getattr(args, name) for name in dense}
    vars(args).update(dense)  # model providers read the current arguments
    try:
        source = get_model(model_provider_func, model_type, wrap_with_ddp=False, ctx=ctx)
    finally:
        vars(args).update(own)
    args.exit_on_missing_checkpoint = True
    _, args.num_floating_point_operations_so_far = load_and_upcycle_model(
        load_checkpoint,
        unwrap_model(model),
        unwrap_model(source),
        load_args=(source, None, None),
        load_kwargs={"args": args},
    )
    if args.fp16 or args.bf16:
        optimizer.reload_model_params()
    args.iteration = 1
    save_checkpoint(1, model, None, None, args.num_floating_point_operations_so_far, args=args)
    print_rank_0(f"> upcycled checkpoint: {args.load or args.pretrained_checkpoint} -> {args.save}.")


def convert_checkpoint(
    model: list[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    args: Namespace,
) -> None:
    """Write what was loaded to `<--ckpt-convert-save>/<format>` in `--ckpt-convert-format`, and end the program."""
    args.ckpt_format = args.ckpt_convert_format
    args.save = f"{args.ckpt_convert_save}/{args.ckpt_convert_format}"
    update_use_dist_ckpt(args)
    save_checkpoint(
        args.iteration,
        model,
        optimizer,
        scheduler,
        args.num_floating_point_operations_so_far,
        args=args,
    )
    print_rank_0(f"> converted checkpoint: {args.load} -> {args.save}.")
    torch.distributed.barrier()
    raise SystemExit(0)


def update_train_iters(args: Namespace) -> None:
    """Derive `args.train_iters` of a run given in samples, batch ramp-up included (spec: training, section 5)."""
    if args.train_iters:
        return
    if args.rampup_batch_size is None:
        args.train_iters = args.train_samples // args.global_batch_size
    else:
        iterations = consumed = 0
        rampup_samples = int(args.rampup_batch_size[2])
        while consumed <= rampup_samples and consumed <= args.train_samples:
            update_num_microbatches(consumed, consistency_check=False)
            consumed += get_current_global_batch_size()
            iterations += 1
        update_num_microbatches(0, consistency_check=False)
        if args.train_samples > consumed:
            iterations += (args.train_samples - consumed) // args.global_batch_size
        args.train_iters = iterations
    print_rank_0(f"setting training iterations to {args.train_iters}")


def get_optimizer_param_scheduler(
    optimizer: MegatronOptimizer, *, ctx: TrainContext | None = None
) -> OptimizerParamScheduler:
    """The learning-rate and weight-decay schedule; its steps are samples (spec: training, section 6)."""
    args = (ctx or get_context()).args
    if args.train_iters:
        batch = args.global_batch_size
        if args.lr_decay_iters is None:
            args.lr_decay_iters = args.train_iters
        decay_steps = args.lr_decay_iters * batch
        wd_incr_steps = args.train_iters * batch
        wsd_decay_steps = None if args.lr_wsd_decay_iters is None else args.lr_wsd_decay_iters * batch
        warmup_steps: float = args.lr_warmup_iters * batch
    elif args.train_samples:
        update_train_iters(args)
        if args.lr_decay_samples is None:
            args.lr_decay_samples = args.train_samples
        decay_steps = args.lr_decay_samples
        wd_incr_steps = args.train_samples
        wsd_decay_steps = args.lr_wsd_decay_samples
        warmup_steps = args.lr_warmup_samples
    else:
        raise FlagError("--train-iters --train-samples", "the run has no length", "give one of the two")
    if args.lr_warmup_fraction is not None:
        warmup_steps = args.lr_warmup_fraction * decay_steps
    return OptimizerParamScheduler(
        optimizer,
        init_lr=args.lr_warmup_init,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.start_weight_decay,
        end_wd=args.end_weight_decay,
        wd_incr_steps=wd_incr_steps,
        wd_incr_style=args.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=args.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=args.override_opt_param_scheduler,
        wsd_decay_steps=wsd_decay_steps,
        lr_wsd_decay_style=args.lr_wsd_decay_style,
    )
