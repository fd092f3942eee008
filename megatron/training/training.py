"""`pretrain` and `train`: the two functions to read first. A run from its command line to its last checkpoint."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import torch
import torch.distributed as dist

from megatron.core import device, parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.errors import TrainingError
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    get_current_global_batch_size,
    get_current_running_global_batch_size,
    get_num_microbatches,
    update_num_microbatches,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.cuda_graphs import record_layers
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_model_config
from megatron.training import report, sanity
from megatron.training.async_utils import maybe_finalize_async_save
from megatron.training.checkpointing import save_checkpoint
from megatron.training.config import rules
from megatron.training.context import TrainContext
from megatron.training.data import (
    DatasetsProvider,
    build_train_valid_test_data_iterators,
    build_train_valid_test_data_loaders,
    build_train_valid_test_datasets,
    cyclic_iter,
    get_train_valid_test_num_samples,
)
from megatron.training.evaluate import evaluate, evaluate_and_print_results, out_of_time
from megatron.training.flops import num_floating_point_operations
from megatron.training.global_vars import destroy_global_vars, get_context
from megatron.training.initialize import (
    RankFunction,
    initialize_megatron,
    print_start_report,
    write_args_to_tensorboard,
)
from megatron.training.log import training_log
from megatron.training.profiling import Profiler
from megatron.training.progress import JobThroughput, get_start_time_from_progress_log
from megatron.training.setup import (
    ModelProvider,
    get_model,
    get_optimizer_param_scheduler,
    setup_model_and_optimizer,
    update_train_iters,
)
from megatron.training.step import train_step
from megatron.training.stragglers import StragglerLog
from megatron.training.utils import append_to_progress_log, calc_params_l2_norm, print_rank_0

__all__ = [
    "build_train_valid_test_data_iterators",
    "build_train_valid_test_data_loaders",
    "build_train_valid_test_datasets",
    "cyclic_iter",
    "destroy_global_state",
    "evaluate",
    "evaluate_and_print_results",
    "get_model",
    "get_optimizer_param_scheduler",
    "get_start_time_from_progress_log",
    "get_train_valid_test_num_samples",
    "num_floating_point_operations",
    "pretrain",
    "print_datetime",
    "setup_model_and_optimizer",
    "train",
    "train_step",
    "training_log",
    "update_train_iters",
]

_PROCESS_STARTED = time.time()


def print_datetime(string: str) -> None:
    """`[string] datetime: ...` on rank 0 once all ranks are here."""
    dist.barrier()
    print_rank_0(f"[{string}] datetime: {datetime.now().strftime('%Y-%m-%d %H:%M:%S')} ")


def destroy_global_state() -> None:
    """Forget the context, the microbatch calculator and all parallel groups."""
    destroy_global_vars()
    destroy_num_microbatches_calculator()
    parallel_state.destroy_global_memory_buffer()
    parallel_state.destroy_model_parallel()


def pretrain(
    train_valid_test_dataset_provider: DatasetsProvider,
    model_provider: ModelProvider,
    model_type: ModelType,
    forward_step_func: Callable[..., Any],
    process_non_loss_data_func: Callable[..., Any] | None = None,
    extra_args_provider: Callable[..., Any] | None = None,
    args_defaults: dict[str, Any] | None = None,
    get_embedding_ranks: RankFunction | None = None,
    get_position_embedding_ranks: RankFunction | None = None,
    *,
    model_name: str | None = None,
) -> None:
    """Run training as the command line says: set up, train, evaluate, save.

    The caller's four functions: datasets for (train, valid, test) sample counts; the model of one pipeline stage; one
    forward step (its contract: spec training, section 14); optionally what to do with non-loss outputs of evaluation.
    `model_name` is what `rules.UNREAD` calls the model of an entry script of this project: its user is told of typed flags
    that do not reach it, and must say where the samples are. Other programs may have samples of their own.
    """
    ctx = initialize_megatron(
        extra_args_provider=extra_args_provider,
        args_defaults=args_defaults,
        get_embedding_ranks=get_embedding_ranks,
        get_position_embedding_ranks=get_position_embedding_ranks,
        for_training=True,
    )
    args, timers = ctx.args, ctx.timers
    args.notices += rules.unread_by(model_name, args)
    if model_name is not None:
        rules.check(args, rules.FROM_FILES)
    if args.log_progress:
        append_to_progress_log("Starting job", ctx=ctx)
    start_time = _earliest_start()
    print_rank_0(f"time to initialize megatron (seconds): {time.time() - start_time:.3f}")
    print_datetime("after megatron is initialized")
    print_start_report()

    timers("model-and-optimizer-setup", log_level=0).start(barrier=True)
    checkpointing_context: dict[str, Any] = {}
    model, optimizer, scheduler = setup_model_and_optimizer(
        model_provider, model_type, checkpointing_context=checkpointing_context, ctx=ctx
    )
    timers("model-and-optimizer-setup").stop()
    print_datetime("after model, optimizer, and learning rate scheduler are built")
    config = get_model_config(model[0])

    timers("train/valid/test-data-iterators-setup", log_level=0).start(barrier=True)
    iterators = _data_iterators(train_valid_test_dataset_provider, ctx)
    timers("train/valid/test-data-iterators-setup").stop()
    print_datetime("after dataloaders are built")
    report.print_run_report(ctx, model, scheduler)

    print_rank_0("done with setup ...")
    timers.log(["model-and-optimizer-setup", "train/valid/test-data-iterators-setup"], barrier=True)
    run = Run(
        forward_step_func,
        model,
        optimizer,
        scheduler,
        *iterators,
        process_non_loss_data_func,
        config,
        checkpointing_context,
        ctx,
        start_time,
    )
    iteration = args.iteration
    if args.skip_train:
        print_rank_0("skipping training (--skip-train is on) ...")
    else:
        print_rank_0("training ...")
        if args.do_train and args.train_iters > 0:
            iteration = run.train()
        elif args.train_iters > 0:
            print_rank_0(
                "WARNING: nothing is trained, the train split has no data: give it a share with --split, or "
                "--train-data-path; with --skip-train the run is meant to evaluate only"
            )
        print_datetime("after training is done")
        if args.save and iteration != 0 and iteration % args.save_interval != 0:
            run.save(iteration)
    for wanted, iterator, name in (
        (args.do_valid, run.valid_data_iterator, "validation"),
        (args.do_test, run.test_data_iterator, "test"),
    ):
        if wanted:
            run.evaluate(f"iteration {iteration} on {name} set", iterator, iteration, verbose=True)
    if ctx.wandb:
        ctx.wandb.finish()
    maybe_finalize_async_save(blocking=True)
    if ctx.tensorboard:
        ctx.tensorboard.flush()


def _earliest_start() -> float:
    """When the first process of the job started, in seconds since the epoch; all ranks must call."""
    start = torch.tensor([_PROCESS_STARTED], dtype=torch.double, device=device.current())
    dist.all_reduce(start, op=dist.ReduceOp.MIN)
    return start.item()


def _data_iterators(provider: DatasetsProvider, ctx: TrainContext) -> tuple[Any, Any, Any]:
    """Train, validation and test iterators; with virtual chunks a list of each."""
    chunks = ctx.args.virtual_pipeline_model_parallel_size
    if chunks is None:
        return build_train_valid_test_data_iterators(provider, ctx=ctx)
    triples = []
    for chunk in range(chunks):
        parallel_state.set_virtual_pipeline_model_parallel_rank(chunk)
        triples.append(build_train_valid_test_data_iterators(provider, ctx=ctx))
    parallel_state.set_virtual_pipeline_model_parallel_rank(0)
    train, valid, test = (list(split) for split in zip(*triples))
    return train, valid, test


def train(
    forward_step_func: Callable[..., Any],
    model: list[torch.nn.Module],
    optimizer: MegatronOptimizer,
    opt_param_scheduler: OptimizerParamScheduler,
    train_data_iterator: Any,
    valid_data_iterator: Any,
    process_non_loss_data_func: Callable[..., Any] | None,
    config: TransformerConfig,
    checkpointing_context: dict[str, Any] | None = None,
) -> tuple[int, float]:
    """Train until `args.train_iters`; returns the last iteration and the FLOPs so far."""
    ctx = get_context()
    run = Run(
        forward_step_func,
        model,
        optimizer,
        opt_param_scheduler,
        train_data_iterator,
        valid_data_iterator,
        None,
        process_non_loss_data_func,
        config,
        checkpointing_context or {},
        ctx,
        _earliest_start(),
    )
    return run.train(), ctx.args.num_floating_point_operations_so_far


@dataclass
class Run:
    """A model in training: everything the loop touches, and the loop."""

    forward_step_func: Callable[..., Any]
    model: list[torch.nn.Module]
    optimizer: MegatronOptimizer
    opt_param_scheduler: OptimizerParamScheduler
    train_data_iterator: Any
    valid_data_iterator: Any
    test_data_iterator: Any
    process_non_loss_data_func: Callable[..., Any] | None
    config: TransformerConfig
    checkpointing_context: dict[str, Any]
    ctx: TrainContext
    start_time: float

    def train(self) -> int:
        """The loop (spec: training, section 15); returns the iteration reached. Exit conditions raise SystemExit(0)."""
        args, timers = self.ctx.args, self.ctx.timers
        write_args_to_tensorboard()
        for chunk in self.model:
            chunk.train()
        sanity.watch_outputs(args, self.model)
        self._connect_schedule()
        if self.config.enable_cuda_graph and device.available():
            layers = record_layers(self.model, self.config, args.seq_length, args.micro_batch_size)
            print_rank_0(f"> recorded {layers} layers as CUDA graphs")
        iteration = args.iteration
        totals: dict[str, Any] = {}
        report_memory = True
        profiler = Profiler(args)
        throughput = JobThroughput(args.num_floating_point_operations_so_far)
        stragglers = StragglerLog(args)
        timers("interval-time", log_level=0).start(barrier=True)
        print_datetime("before the start of training step")
        if args.manual_gc:
            gc.disable()
            gc.collect()

        exiting = False
        while iteration < args.train_iters and not exiting:
            profiler.before(iteration)
            device.raise_awaited()
            maybe_finalize_async_save(blocking=False)
            self._update_batch_size(iteration, throughput)
            args.curr_iteration = iteration
            losses, skipped, grad_norm, num_zeros = train_step(
                self.forward_step_func,
                self.train_data_iterator,
                self.model,
                self.optimizer,
                self.opt_param_scheduler,
                self.config,
                ctx=self.ctx,
            )
            iteration += 1
            samples = get_num_microbatches() * args.micro_batch_size * args.data_parallel_size
            args.iteration = iteration
            args.consumed_train_samples += samples
            args.skipped_train_samples += (
                get_current_global_batch_size() - get_current_running_global_batch_size()
            )
            args.num_floating_point_operations_so_far += num_floating_point_operations(args, samples)
            if args.train_sync_interval and iteration % args.train_sync_interval == 0:
                device.synchronize()

            report_memory = training_log(
                losses,
                totals,
                *self._learning_rates(),
                iteration,
                self.optimizer.get_loss_scale(),
                report_memory,
                skipped,
                grad_norm,
                calc_params_l2_norm(self.model) if args.log_params_norm else None,
                num_zeros,
                ctx=self.ctx,
            )
            stragglers.after(iteration)
            self._check_weight_hashes(iteration)
            if args.eval_interval and iteration % args.eval_interval == 0 and args.do_valid:
                self._evaluate_in_loop(iteration)
            exiting = self._save_and_decide_exit(iteration, throughput)
            profiler.after(iteration)
            if args.manual_gc and args.manual_gc_interval and iteration % args.manual_gc_interval == 0:
                gc.collect()

        device.raise_awaited(wait=True)
        if self.ctx.tensorboard:
            self.ctx.tensorboard.flush()
        if args.overlap_param_gather:
            self._disable_gather_hooks()
        maybe_finalize_async_save(blocking=True)
        if exiting:
            if self.ctx.wandb:
                self.ctx.wandb.finish()
            raise SystemExit(0)
        return iteration

    def _connect_schedule(self) -> None:
        """Give the schedule what it calls back: loss scaling, gradient and parameter synchronisation, finalisation."""
        args, config = self.ctx.args, self.config
        one = len(self.model) == 1

        def each(method: str) -> Any:
            bound = [getattr(chunk, method) for chunk in self.model]
            return bound[0] if one else bound

        config.grad_scale_func = self.optimizer.scale_loss
        config.timers = self.ctx.timers
        if args.overlap_grad_reduce:
            config.no_sync_func = each("no_sync")
            if args.align_grad_reduce:
                config.grad_sync_func = each("start_grad_sync")
        if args.overlap_param_gather and args.align_param_gather:
            config.param_sync_func = each("start_param_sync")
        config.finalize_model_grads_func = finalize_model_grads

    def _update_batch_size(self, iteration: int, throughput: JobThroughput) -> None:
        """Batch ramp-up: save before the number of microbatches grows, then check that it fits (section 4)."""
        args = self.ctx.args
        before = get_num_microbatches()
        update_num_microbatches(args.consumed_train_samples, consistency_check=False, verbose=True)
        if get_num_microbatches() != before and iteration != 0:
            if get_num_microbatches() < before:
                raise TrainingError(
                    "--rampup-batch-size",
                    f"the number of microbatches fell from {before} to {get_num_microbatches()}",
                    "a batch size can only grow; resume with the ramp-up the run was started with",
                )
            if args.save is not None:
                self._save_in_loop(iteration, throughput)
        update_num_microbatches(args.consumed_train_samples, consistency_check=True, verbose=True)

    def _learning_rates(self) -> tuple[float, float | None]:
        """Rates in force for the next step: of the last ordinary and the last decoupled parameter group."""
        learning_rate, decoupled = 0.0, None
        for group in self.optimizer.param_groups:
            if group.get("is_decoupled_lr"):
                decoupled = group["lr"]
            else:
                learning_rate = group["lr"]
        return learning_rate, decoupled

    def _check_weight_hashes(self, iteration: int) -> None:
        interval = self.ctx.args.check_weight_hash_across_dp_replicas_interval
        if interval is None or iteration % interval:
            return
        with self._gathered_parameters():
            sanity.replicas_equal(self.model)
            dist.barrier()
            print_rank_0(f">>> Weight hashes match after {iteration} iterations...")

    @contextlib.contextmanager
    def _gathered_parameters(self) -> Iterator[None]:
        """Parameters whole on every rank: with `--overlap-param-gather` they are stale between update and forward.

        After the loop, whose end gathers for good, there is nothing to do.
        """
        if not (self.ctx.args.overlap_param_gather and self.model[0].remove_forward_pre_hook_handles):
            yield
            return
        self._disable_gather_hooks()
        yield
        for chunk in self.model:
            chunk.enable_forward_pre_hook()

    def _disable_gather_hooks(self) -> None:
        for chunk in self.model:
            chunk.disable_forward_pre_hook()

    def evaluate(
        self,
        prefix: str,
        iterator: Any,
        iteration: int,
        verbose: bool = False,
    ) -> None:
        """Evaluate on an iterator and print the result."""
        evaluate_and_print_results(
            prefix,
            self.forward_step_func,
            iterator,
            self.model,
            iteration,
            self.process_non_loss_data_func,
            self.config,
            verbose,
            write_to_tensorboard=not self.ctx.args.skip_train,
            start_time=self.start_time,
            ctx=self.ctx,
        )

    def _evaluate_in_loop(self, iteration: int) -> None:
        args, timers = self.ctx.args, self.ctx.timers
        timers("interval-time").stop()
        if args.manual_gc and args.manual_gc_eval:
            gc.collect()
        timers("eval-time", log_level=0).start(barrier=True)
        with self._gathered_parameters():
            self.evaluate(f"iteration {iteration}", self.valid_data_iterator, iteration)
        timers("eval-time").stop()
        if args.manual_gc and args.manual_gc_eval:
            gc.collect(generation=0)
        timers("interval-time").start(barrier=True)

    def save(self, iteration: int, non_persistent: bool = False) -> None:
        """Write a checkpoint of this iteration, unless something is wrong with it."""
        device.raise_awaited(wait=True)
        with self._gathered_parameters():
            save_checkpoint(
                iteration,
                self.model,
                self.optimizer,
                self.opt_param_scheduler,
                self.ctx.args.num_floating_point_operations_so_far,
                self.checkpointing_context,
                non_persistent_ckpt=non_persistent,
                train_data_iterator=self.train_data_iterator,
                args=self.ctx.args,
            )

    def _save_in_loop(self, iteration: int, throughput: JobThroughput, non_persistent: bool = False) -> None:
        """Save outside the interval's time, time it, and note it in progress.txt."""
        args, timers = self.ctx.args, self.ctx.timers
        name = "save-checkpoint-non-persistent" if non_persistent else "save-checkpoint"
        timers("interval-time").stop()
        timers(name, log_level=0).start(barrier=True)
        self.save(iteration, non_persistent)
        timers(name).stop(barrier=True)
        timers.log([name])
        if args.log_progress and not non_persistent:
            throughput.append(iteration, args.num_floating_point_operations_so_far, ctx=self.ctx)
        timers("interval-time").start(barrier=True)

    def _save_and_decide_exit(self, iteration: int, throughput: JobThroughput) -> bool:
        """The triggers of section 21.1, in order: signal, persistent or non-persistent save, duration, interval."""
        args = self.ctx.args
        saved = False
        handler = self.ctx.signal_handler
        if handler is not None and any(handler.signals_received()):
            if args.save:
                self._save_in_loop(iteration, throughput)
            print_datetime("exiting program after receiving SIGTERM.")
            return True
        if args.save and args.save_interval and iteration % args.save_interval == 0:
            self._save_in_loop(iteration, throughput)
            saved = True
        elif (
            args.save
            and args.non_persistent_save_interval
            and iteration % args.non_persistent_save_interval == 0
        ):
            self._save_in_loop(iteration, throughput, non_persistent=True)
        minutes = out_of_time(self.ctx, self.start_time)
        if minutes is not None:
            if args.save and not saved:
                self._save_in_loop(iteration, throughput)
            print_datetime(f"exiting program after {minutes} minutes")
            return True
        if args.exit_interval and iteration % args.exit_interval == 0:
            if args.save and not saved:
                self._save_in_loop(iteration, throughput)
            print_datetime(f"exiting program at iteration {iteration}")
            return True
        return False
