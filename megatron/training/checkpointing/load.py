"""Read a checkpoint: find the newest good one, check that it fits, put everything back where it was."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing import durable
from megatron.core.dist_checkpointing.agreement import barrier, broadcast, rank, together
from megatron.core.dist_checkpointing.core import COMMON_FNAME
from megatron.core.dist_checkpointing.safe_load import UnsafeFileError, load_file
from megatron.core.errors import CheckpointError
from megatron.core.num_microbatches_calculator import update_num_microbatches
from megatron.training.checkpointing import distributed
from megatron.training.checkpointing.arguments import (
    IncompatibleCheckpointError,
    apply_checkpoint_args,
    check_checkpoint_args,
    difference_table,
    say_differences,
)
from megatron.training.checkpointing.experts import rearranged_experts
from megatron.training.checkpointing.layout import (
    OPTIMIZER_FILE,
    Tracked,
    checkpoint_exists,
    find_checkpoint_rank_0,
    get_checkpoint_name,
    get_checkpoint_tracker_filename,
    get_distributed_optimizer_checkpoint_name,
    non_persistent_directory,
    read_tracker,
    saved_iterations,
)
from megatron.training.checkpointing.legacy import adapt_weights
from megatron.training.checkpointing.state import (
    current_args,
    innermost,
    named_chunks,
    say,
    set_rng_state,
    unsafe_allowed,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """One checkpoint that could be loaded."""

    root: str
    tracked: Tracked

    @property
    def path(self) -> Path:
        """Directory of the checkpoint."""
        return Path(self.root) / self.tracked.directory


def load_checkpoint(
    model: Any,
    optimizer: Any,
    opt_param_scheduler: Any,
    load_arg: str = "load",
    strict: bool = True,
    ft_client: Any = None,
    checkpointing_context: dict[str, Any] | None = None,
    *,
    args: Namespace | None = None,
) -> tuple[int, float]:
    """Load the newest good checkpoint of the directory `args.<load_arg>` into the run; every rank must call.

    Returns (iteration, floating-point operations so far), both 0 if there is none. A damaged newest checkpoint
    is named and the one before it used. Sets the counters of consumed samples in `args`. CheckpointError, on
    every rank, if nothing can be loaded or the checkpoint does not fit the run.
    """
    args = current_args(args)
    load_dir = _directory(args, load_arg)
    sources = _sources(load_dir, args)
    if not sources:
        say(f"WARNING: could not find the metadata file {get_checkpoint_tracker_filename(load_dir or '')}")
        if args.exit_on_missing_checkpoint:
            why = "it has no checkpoint, and --exit-on-missing-checkpoint is set"
            raise CheckpointError(f"--load {load_dir}", why, "check the directory")
        say("    will not load any checkpoints and will start from random")
        return 0, 0
    chunks = innermost(model)
    source, state = _first_good(
        sources, lambda source: _read(source, chunks, optimizer, opt_param_scheduler, args)
    )
    release = source.tracked.release
    iteration = _iteration(state, source, args)
    _restore_counters(state, args)
    moved = _load_weights(state, chunks, strict, args)
    if release or args.finetune or args.no_load_optim:
        if optimizer is not None and (args.fp16 or args.bf16):
            optimizer.reload_model_params()
    else:
        _load_optimizer(state, source, optimizer, opt_param_scheduler, args, moved)
    if not (release or args.finetune or args.no_load_rng):
        _load_rng(state, args)
    barrier()
    say(
        f"  successfully loaded checkpoint from {source.root} "
        f"[ t {mpu.get_tensor_model_parallel_rank()}, p {mpu.get_pipeline_model_parallel_rank()} ] "
        f"at iteration {iteration}"
    )
    return iteration, state.get("num_floating_point_operations_so_far", 0)


def load_args_from_checkpoint(
    args: Namespace, load_arg: str = "load", checkpointing_context: dict[str, Any] | None = None
) -> Any:
    """Take the architecture from a checkpoint (--use-checkpoint-args), before process groups exist.

    Returns (args, the checkpoint's args), or only `args` if there is no checkpoint or it has no arguments.
    """
    load_dir = getattr(args, load_arg)
    if load_dir is None:
        say("No load directory specified, using provided arguments.")
        return args
    sources = _sources(load_dir, args)
    if not sources:
        say("Checkpoint not found to provide arguments, using provided arguments.")
        return args
    source, header = _first_good(sources, lambda source: _read_header(source, args))
    if "args" not in header:
        say("Checkpoint provided does not have arguments saved, using provided arguments.")
        return args
    args.iteration = _iteration(header, source, args)
    apply_checkpoint_args(args, header["args"], header.get("checkpoint_version", 0))
    return args, header["args"]


def _directory(args: Namespace, load_arg: str) -> str | None:
    """--load, or --pretrained-checkpoint (which implies --finetune) if --load has no checkpoint yet."""
    load_dir = getattr(args, load_arg)
    pretrained = getattr(args, "pretrained_checkpoint", None)
    if pretrained is None or broadcast(checkpoint_exists(load_dir)):
        return load_dir
    say(f"no checkpoint in {load_dir}: fine-tuning from {pretrained}")
    if not broadcast(checkpoint_exists(pretrained)):
        why = f"neither it nor --load {load_dir} has a checkpoint ({get_checkpoint_tracker_filename(pretrained)})"
        raise CheckpointError(f"--pretrained-checkpoint {pretrained}", why, "check the directory")
    args.finetune = True
    return pretrained


def _sources(load_dir: str | None, args: Namespace) -> list[Source]:
    """What could be loaded, best first, as rank 0 sees it: the tracked checkpoint, then older ones."""
    sources: list[Source] = []
    with together():
        if rank() == 0 and load_dir is not None:
            sources = _find_sources(load_dir, args)
    return broadcast(sources)


def _find_sources(load_dir: str, args: Namespace) -> list[Source]:
    step = getattr(args, "ckpt_step", None)
    if step is not None:
        if step not in saved_iterations(load_dir):
            found = ", ".join(map(str, reversed(saved_iterations(load_dir)))) or "none"
            raise CheckpointError(
                f"--ckpt-step {step}",
                f"{load_dir} has no such iteration (it has: {found})",
                "name one of those",
            )
        return [Source(load_dir, Tracked(step))]
    sources = _tracked_and_older(load_dir)
    interval = getattr(args, "non_persistent_save_interval", None)
    if interval is not None or getattr(args, "non_persistent_ckpt_type", None) == "global":
        more = _tracked_and_older(non_persistent_directory(args, load_dir) or load_dir)
        if any(source.tracked.release for source in more):
            raise CheckpointError(
                more[0].root, "a non-persistent checkpoint cannot be a release", "remove its tracker"
            )
        # Newest first; of equal iterations the non-persistent one.
        sources = sorted(more + sources, key=lambda source: -source.tracked.iteration)
    return sources


def _tracked_and_older(root: str) -> list[Source]:
    if not checkpoint_exists(root):
        return []
    tracked = read_tracker(root)
    durable.heal(Path(root) / tracked.directory)
    if tracked.release:
        return [Source(root, tracked)]
    older = [Tracked(i) for i in saved_iterations(root) if i < tracked.iteration]
    return [Source(root, candidate) for candidate in (tracked, *older)]


def _first_good(sources: list[Source], read: Callable[[Source], T]) -> tuple[Source, T]:
    """The first source that can be read and what was read; damaged ones are named and passed over."""
    failures: list[CheckpointError] = []
    for source in sources:
        try:
            result = read(source)
        except (UnsafeFileError, IncompatibleCheckpointError):
            raise
        except CheckpointError as error:
            failures.append(error)
            say(f"WARNING: the checkpoint of {source.tracked} in {source.root} cannot be used: {error}")
            continue
        if failures:
            say(f"WARNING: using the checkpoint of {source.tracked} instead")
        return source, result
    raise failures[0]


def _read_header(source: Source, args: Namespace) -> dict[str, Any]:
    """The small entries of a checkpoint: args, version, iteration. Rank 0 reads, every rank gets them."""
    header: dict[str, Any] = {}
    with together():
        if rank() == 0:
            found = find_checkpoint_rank_0(source.root, source.tracked.iteration, source.tracked.release)
            if found is None:
                raise CheckpointError(
                    str(source.path), "the first rank's file is missing", "use an earlier checkpoint"
                )
            path = Path(found)
            if path.is_dir():
                path /= COMMON_FNAME
            durable.verify(source.path, [path.relative_to(source.path).as_posix()])
            entries = load_file(path, allow_unsafe_pickle=unsafe_allowed(args))
            wanted = ("args", "checkpoint_version", "iteration", "total_iters")
            header = {name: entries[name] for name in wanted if name in entries}
            header["distributed"] = Path(found).is_dir()
            header["sharding_type"] = distributed.stored_sharding_type(entries.get("optimizer"))
    return broadcast(header)


def _read(
    source: Source, chunks: list[Any], optimizer: Any, opt_param_scheduler: Any, args: Namespace
) -> dict[str, Any]:
    """This rank's part of the checkpoint, after checking that it fits the run."""
    header = _read_header(source, args)
    if "args" in header and args.finetune:
        say_differences(header["args"], args)
    elif "args" in header:
        version = header.get("checkpoint_version", 0)
        check_checkpoint_args(
            header["args"], args=args, fixed_layout=not header["distributed"], version=version
        )
    if header["distributed"]:
        return distributed.read(source, header, chunks, optimizer, opt_param_scheduler, args)
    return _read_rank_files(source, args)


def _read_rank_files(source: Source, args: Namespace) -> dict[str, Any]:
    for dest in ("dist_ckpt_strictness", "ckpt_fully_parallel_load"):
        if dest in getattr(args, "args_given", ()):
            say(f"--{dest.replace('_', '-')} has no effect: {source.path} is in the torch format")
    path = Path(get_checkpoint_name(source.root, source.tracked.iteration, source.tracked.release))
    state: dict[str, Any] = {}
    with together():
        own = [path, Path(get_distributed_optimizer_checkpoint_name(str(path)))]
        durable.verify(source.path, [file.relative_to(source.path).as_posix() for file in own])
        state = load_file(path, allow_unsafe_pickle=unsafe_allowed(args))
        if not isinstance(state, dict) or not any(name.startswith("model") for name in state):
            raise CheckpointError(str(path), "it holds no model", "check that it is a checkpoint")
    return state


def _iteration(state: dict[str, Any], source: Source, args: Namespace) -> int:
    if source.tracked.release or args.finetune:
        return 0
    for name in ("iteration", "total_iters"):
        if name in state:
            return state[name]
    why = "it does not say at which iteration it was saved"
    raise CheckpointError(
        str(source.path), why, "write the word release into the tracker, or pass --finetune"
    )


def _restore_counters(state: dict[str, Any], args: Namespace) -> None:
    """Where in the data the run was."""
    if "args" not in state or args.finetune:
        if "args" not in state:
            say("could not find arguments in the checkpoint ...")
        return
    for name in ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples"):
        setattr(args, name, getattr(state["args"], name, 0))
    update_num_microbatches(consumed_samples=args.consumed_train_samples, verbose=True)


def _load_weights(state: dict[str, Any], chunks: list[Any], strict: bool, args: Namespace) -> bool:
    """Returns whether weights of experts had to be put into another form."""
    moved = False
    heads = args.num_attention_heads // mpu.get_tensor_model_parallel_world_size()
    version = state.get("checkpoint_version", 0)
    with together():
        for name, chunk in named_chunks(chunks):
            if name not in state:
                found = ", ".join(key for key in state if key.startswith("model"))
                why = f"it holds {found}, and this run has {len(chunks)} model chunks per rank"
                raise IncompatibleCheckpointError(
                    "checkpoint", why, "use the checkpoint's --num-layers-per-virtual-pipeline-stage"
                )
            wanted = chunk.state_dict()
            weights = adapt_weights(state[name], wanted, version, heads)
            fitting = rearranged_experts(weights, wanted)
            moved = moved or fitting is not weights
            try:
                chunk.load_state_dict(fitting, strict=strict)
            except RuntimeError as error:
                raise _mismatch(error, state.get("args"), args) from error
    return moved


def _mismatch(error: RuntimeError, checkpoint_args: Any, args: Namespace) -> CheckpointError:
    """torch's list of missing, unexpected and misshapen weights, with the settings that explain it."""
    lines = [line.strip() for line in str(error).splitlines()[1:7]]
    table = difference_table(checkpoint_args, args) if checkpoint_args is not None else ""
    why = "its weights do not fit the model: " + " ".join(lines)
    return IncompatibleCheckpointError(
        "checkpoint", f"{why}\n{table}" if table else why, "give the run the checkpoint's architecture"
    )


def _load_optimizer(
    state: dict[str, Any],
    source: Source,
    optimizer: Any,
    opt_param_scheduler: Any,
    args: Namespace,
    experts_moved: bool,
) -> None:
    if "optimizer" not in state and getattr(state.get("args"), "no_save_optim", None):
        say("the checkpoint was saved with --no-save-optim: the optimizer starts afresh")
        if optimizer is not None and (args.fp16 or args.bf16):
            optimizer.reload_model_params()
        return
    fix = "pass --no-load-optim to start with a fresh optimizer, or --finetune"
    schedule = state.get("lr_scheduler", state.get("opt_param_scheduler"))
    with together():
        if optimizer is not None:
            if "optimizer" not in state:
                raise IncompatibleCheckpointError(str(source.path), "it holds no optimizer state", fix)
            if experts_moved:
                why = "its optimizer state is of experts in another form (--moe-grouped-gemm) than this run's"
                raise IncompatibleCheckpointError(str(source.path), why, fix)
            try:
                optimizer.load_state_dict(state["optimizer"])
            except (KeyError, ValueError, TypeError) as error:
                why = f"its optimizer state does not fit this run's optimizer ({error!r})"
                raise IncompatibleCheckpointError(str(source.path), why, fix) from error
        if opt_param_scheduler is not None:
            if schedule is None:
                raise IncompatibleCheckpointError(str(source.path), "it holds no learning-rate schedule", fix)
            opt_param_scheduler.load_state_dict(schedule)
    if optimizer is not None and args.use_distributed_optimizer and "distributed" not in state:
        _load_parameter_state(source, optimizer, args)


def _load_parameter_state(source: Source, optimizer: Any, args: Namespace) -> None:
    """The distributed optimizer's tensors of the torch format: read by the first rank of each group, scattered."""
    path = Path(get_checkpoint_name(source.root, source.tracked.iteration, basename=OPTIMIZER_FILE))
    optimizers = getattr(optimizer, "chained_optimizers", [optimizer])
    states: list[Any] = [None] * len(optimizers)
    with together():
        if any(one.data_parallel_rank == 0 for one in optimizers):
            loaded = load_file(path, allow_unsafe_pickle=unsafe_allowed(args))
            states = loaded if isinstance(loaded, list) else [loaded]
    for one, state in zip(optimizers, states):
        one.load_parameter_state_from_dp_zero(
            state, update_legacy_format=args.ckpt_convert_update_legacy_dist_opt_format
        )


def _load_rng(state: dict[str, Any], args: Namespace) -> None:
    states = state.get("rng_state")
    if states is None and "random_rng_state" in state:
        states = [state]
    if states is None:
        if "distributed" in state or getattr(state.get("args"), "no_save_rng", None):
            say("the checkpoint has no random states for this layout: they continue from this run's seed")
            return
        raise IncompatibleCheckpointError(
            "rng_state", "the checkpoint holds no random states", "pass --no-load-rng"
        )
    try:
        set_rng_state(states, args=args)
    except (LookupError, ArithmeticError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        # Every library refuses a state that is not its own with another error.
        why = f"the checkpoint's random states cannot be restored ({error!r})"
        raise CheckpointError("rng_state", why, "pass --no-load-rng") from error
