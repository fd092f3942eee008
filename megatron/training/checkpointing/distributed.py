"""The torch_dist format: every rank describes its pieces; saved in one layout, loaded in any other."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.core import parallel_state as mpu
from megatron.core.dist_checkpointing import durable, serialization
from megatron.core.dist_checkpointing.agreement import rank, together, world_size
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.optimizer.param_groups import group_key
from megatron.training.checkpointing import asynchronous
from megatron.training.checkpointing.arguments import OtherLayoutError
from megatron.training.checkpointing.layout import Tracked
from megatron.training.checkpointing.state import generate_state_dict, get_rng_state, say, unsafe_allowed

if TYPE_CHECKING:
    from megatron.training.checkpointing.load import Source

_MODEL_SPACE = "fully_sharded_model_space"
_DP_ZERO = "dp_zero_gather_scatter"
_MASTER_PREFIX = "optimizer.state.fp32_param."
# Keys of chained optimizers: at most one for the first chunk, one for the others and one for experts.
_CHAINED = re.compile(r"^chained_\d+\.")
_MOST_CHAINED = 3

# The norm before an expert layer has two names in the files, depending on who built the layer.
_OTHER_NAMES = [
    (".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm."),
    (".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"),
]


def write(
    save_dir: str,
    iteration: int,
    assemble: Callable[..., dict[str, Any]],
    announce: Callable[[], None],
    optimizer: Any,
    checkpointing_context: dict[str, Any] | None,
    args: Namespace,
) -> None:
    """Save into the staging directory, then `announce`; with --async-save the latter happens when it is durable."""
    final = Path(save_dir) / Tracked(iteration).directory
    strategy = serialization.get_default_save_sharded_strategy(args.ckpt_format)
    if args.ckpt_fully_parallel_save:
        strategy = FullyParallelSaveStrategyWrapper(
            strategy,
            mpu.get_data_parallel_group(with_context_parallel=True),
            args.ckpt_assume_constant_structure,
        )
    optimizer_options = {}
    if args.use_distributed_optimizer and optimizer is not None:
        optimizer_options["sharding_type"] = _MODEL_SPACE if args.ckpt_fully_parallel_save else _DP_ZERO
    state = assemble(True, optimizer_options)
    staged = durable.staging_path(final)
    request = serialization.save(state, str(staged), strategy, async_sharded_save=bool(args.async_save))
    if request is None:
        announce()
        return
    request.add_finalize_fn(announce)
    asynchronous.schedule_async_save(request)
    say(f"  scheduled an async checkpoint save at iteration {iteration:7d} to {save_dir}")


def read(
    source: Source,
    header: dict[str, Any],
    chunks: list[Any],
    optimizer: Any,
    opt_param_scheduler: Any,
    args: Namespace,
) -> dict[str, Any]:
    """The state dict for this rank of a checkpoint that any layout may have written; every rank must call.

    Random states are asked for only if the tensor- and pipeline-parallel sizes are the checkpoint's.
    """
    with together():
        # Every file is verified once, by one of the ranks.
        durable.verify(source.path, sorted(durable.read_manifest(source.path))[rank() :: world_size()])
    saved = header.get("args", Namespace())
    resumes = not (source.tracked.release or args.finetune)
    with_optimizer = resumes and not args.no_load_optim and not getattr(saved, "no_save_optim", None)
    with_rng = resumes and not args.no_load_rng and not getattr(saved, "no_save_rng", None)
    if with_rng and not _same_layout(saved):
        say("the checkpoint's random states belong to another layout and are not used")
        with_rng = False
    optimizer_options: dict[str, Any] = {"is_loading": True}
    if args.use_distributed_optimizer:
        sharding_type = header["sharding_type"] or _sharding_type(saved)
        optimizer_options["sharding_type"] = sharding_type
        if with_optimizer and sharding_type != _MODEL_SPACE:
            _demand_same_layout(source, saved)
    request = generate_state_dict(
        Namespace(no_save_optim=not with_optimizer, no_save_rng=not with_rng),
        chunks,
        optimizer,
        opt_param_scheduler,
        get_rng_state(True, args=args) if with_rng else None,
        use_dist_ckpt=True,
        optim_sd_kwargs=optimizer_options,
    )
    wanted_optimizer = dict(request.get("optimizer") or {})
    state = serialization.load(
        request,
        str(source.path),
        _load_strategy(source.path, args),
        TorchCommonLoadStrategy(unsafe_allowed(args)),
        strict=args.dist_ckpt_strictness,
        key_fallbacks=key_fallbacks,
    )
    if with_optimizer and "optimizer" in state:
        _fit_optimizer(state["optimizer"], wanted_optimizer)
    return {**state, "distributed": True}


def _fit_optimizer(stored: dict[Any, Any], wanted: dict[Any, Any]) -> None:
    """Move what is common to all optimizers to where this run's kind keeps it, in place.

    The fp32 optimizer has its parameter groups at the top, the others under `optimizer`; the step count is in the
    groups or beside the state. Chained optimizers are numbered, a single one has no numbers. Experts have an optimizer
    of their own only while they are divided over ranks, so a run may chain where the checkpoint does not: then every
    part is offered all groups.
    """
    numbers = [name for name in wanted if isinstance(name, int)]
    theirs = [part for name, part in stored.items() if isinstance(name, int) and _groups_of(part)]
    shared: list[dict[str, Any]] | None = None
    if len(theirs) != len(numbers):
        every = [group for part in theirs or [stored] for group in _groups_of(part)]
        shared = _for_experts_and_others(every)
    for name in [name for name in stored if isinstance(name, int) != bool(numbers)]:
        del stored[name]
    places = [(stored.setdefault(number, {}), wanted[number]) for number in numbers] or [(stored, wanted)]
    for place, like in places:
        _fit_one(place, like, _groups_of(place) if shared is None else shared)


def _groups_of(part: dict[Any, Any]) -> list[dict[str, Any]]:
    """The parameter groups of one optimizer, each with its step."""
    theirs = part if "param_groups" in part else part.get("optimizer")
    if not isinstance(theirs, dict):
        return []
    groups = theirs.get("param_groups", [])
    step = theirs.get("state", {}).get("common_step")
    for group in groups:
        if step is not None:
            group.setdefault("step", int(step))
    return groups


def _for_experts_and_others(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups and, of those that only experts or only others have, twins for the others or experts."""
    found = {group_key(group): group for group in groups}
    for group in groups:
        twin = {**group, "is_expert_parallel": not group_key(group).is_expert_parallel}
        found.setdefault(group_key(twin), twin)
    return list(found.values())


def _fit_one(stored: dict[Any, Any], wanted: dict[Any, Any], groups: list[dict[str, Any]]) -> None:
    if "param_groups" in wanted:
        stored["param_groups"] = groups
        stored.setdefault("state", {})
    elif isinstance(stored.setdefault("optimizer", {}), dict):
        stored["optimizer"]["param_groups"] = groups
    if "param_state_sharding_type" in wanted:
        stored["param_state_sharding_type"] = wanted["param_state_sharding_type"]


def key_fallbacks(key: str) -> list[str]:
    """Other keys under which the checkpoint may have the tensor `key`.

    Optimizers are chained or not, in the same numbers or others. An fp32 run without distributed optimizer stores no
    master copy: it is the weight itself.
    """
    own = _CHAINED.sub("", key)
    names = [own, *(own.replace(name, other) for name, other in _OTHER_NAMES if name in own)]
    chained = [f"chained_{number}.{name}" for number in range(_MOST_CHAINED) for name in names]
    weights = [name.removeprefix(_MASTER_PREFIX) for name in names if name.startswith(_MASTER_PREFIX)]
    return [*names, *(chained if own.startswith("optimizer.") else []), *weights]


def _layouts(saved: Any) -> tuple[tuple[int, int, int], tuple[int | None, int | None, int]]:
    """(tensor, decoder pipeline, encoder pipeline) parallel sizes of this run and of the checkpoint."""
    encoder = mpu.get_pipeline_model_parallel_decoder_start() or 0
    decoder = mpu.get_pipeline_model_parallel_world_size() - encoder
    theirs = (
        getattr(saved, "tensor_model_parallel_size", None),
        getattr(saved, "pipeline_model_parallel_size", None),
        getattr(saved, "encoder_pipeline_model_parallel_size", None) or 0,
    )
    return (mpu.get_tensor_model_parallel_world_size(), decoder, encoder), theirs


def _same_layout(saved: Any) -> bool:
    ours, theirs = _layouts(saved)
    return ours == theirs


def _demand_same_layout(source: Source, saved: Any) -> None:
    """Refuse to continue an optimizer whose state lies as the ranks of another layout held it."""
    ours, theirs = _layouts(saved)
    if ours != theirs:
        why = (
            f"(TP, PP, encoder PP) mismatch: its optimizer state belongs to the ranks of {theirs}, "
            f"and this run has {ours}"
        )
        fix = "keep these sizes, pass --no-load-optim, or save it anew without --no-ckpt-fully-parallel-save"
        raise OtherLayoutError(str(source.path), why, fix)


def stored_sharding_type(optimizer: Any) -> str | None:
    """How the common part of a checkpoint's optimizer says that its state lies in the files; None if it does not say."""
    parts = [optimizer, *optimizer.values()] if isinstance(optimizer, dict) else []
    found = (part.get("param_state_sharding_type") for part in parts if isinstance(part, dict))
    return next((kind for kind in found if kind is not None), None)


def _sharding_type(saved: Any) -> str:
    """The same, by the arguments of a checkpoint that does not say; without distributed optimizer it lies like the model."""
    gathered = getattr(saved, "use_distributed_optimizer", False) and not getattr(
        saved, "ckpt_fully_parallel_save", False
    )
    return _DP_ZERO if gathered else _MODEL_SPACE


def _load_strategy(directory: Path, args: Namespace) -> Any:
    strategy: Any = serialization.get_default_load_sharded_strategy(str(directory))
    strategy = strategy.with_unsafe_pickle(unsafe_allowed(args))
    if args.ckpt_fully_parallel_load:
        return FullyParallelLoadStrategyWrapper(
            strategy, mpu.get_data_parallel_group(with_context_parallel=True)
        )
    return strategy
