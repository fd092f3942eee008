"""Choose and assemble the optimizer that a configuration and a wrapped model call for."""

from __future__ import annotations

from typing import Any

import torch

from megatron.core import parallel_state
from megatron.core.config_logger import has_config_logger_enabled, log_config_to_disk
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from megatron.core.errors import ConfigError
from megatron.core.optimizer.adam import Adam
from megatron.core.optimizer.chained import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.grad_scaler import ConstantGradScaler, DynamicGradScaler, MegatronGradScaler
from megatron.core.optimizer.mixed_precision import Float16OptimizerWithFloat16Params
from megatron.core.optimizer.optimizer import FP32Optimizer, MegatronOptimizer, init_optimizer_state
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.optimizer.param_groups import ParamCondition, get_param_groups
from megatron.core.optimizer.untraced import Sgd
from megatron.core.process_groups_config import ProcessGroupCollection


def get_megatron_optimizer(
    config: OptimizerConfig,
    model_chunks: list[DistributedDataParallel],
    no_weight_decay_cond: ParamCondition | None = None,
    scale_lr_cond: ParamCondition | None = None,
    lr_mult: float = 1.0,
    *,
    pg_collection: ProcessGroupCollection | None = None,
) -> MegatronOptimizer:
    """The optimizer for all trainable parameters of the model chunks of this rank.

    `no_weight_decay_cond(name, param)` replaces the rule that biases and vectors do not decay; `lr_mult` scales the rate
    where `scale_lr_cond(name, param)` holds. Several are chained where expert parameters, or the first chunk of an
    overlapped update, need one of their own. Raises ConfigError for combinations that cannot work.
    """
    if has_config_logger_enabled(config):
        log_config_to_disk(config, locals(), prefix="get_megatron_optimizer")
    groups = parallel_state.resolve(pg_collection)
    parts: list[list[DistributedDataParallel]] = [list(model_chunks)]
    if config.overlap_param_gather_with_optimizer_step:
        parts = [list(model_chunks[:1]), list(model_chunks[1:])]
        model_chunks[0].overlap_param_gather_with_optimizer_step = True
    optimizers: list[MegatronOptimizer] = []
    first_chunk = 0
    for chunks in parts:
        dense = [
            group
            for group in _groups(config, chunks, no_weight_decay_cond, scale_lr_cond, lr_mult)
            if not group["is_expert_parallel"]
        ]
        if dense or not optimizers:
            optimizers.append(
                _assemble(
                    config,
                    chunks,
                    dense,
                    {first_chunk + i: list(_buffers(chunk, "buffers")) for i, chunk in enumerate(chunks)},
                    model_parallel_group=groups.mp,
                    data_parallel_group=groups.dp_cp,
                    data_parallel_group_gloo=groups.dp_cp_gloo,
                    data_parallel_group_idx=groups.rank("mp"),
                )
            )
        first_chunk += len(chunks)
    expert = [
        group
        for group in _groups(config, model_chunks, no_weight_decay_cond, scale_lr_cond, lr_mult)
        if group["is_expert_parallel"]
    ]
    if expert:
        optimizers.append(
            _assemble(
                config,
                list(model_chunks),
                expert,
                {i: list(_buffers(chunk, "expert_parallel_buffers")) for i, chunk in enumerate(model_chunks)},
                model_parallel_group=groups.tp_ep_pp,
                data_parallel_group=groups.dp_modulo_ep_cp,
                data_parallel_group_gloo=groups.dp_modulo_ep_cp_gloo,
                data_parallel_group_idx=groups.rank("ep") * groups.size("mp") + groups.rank("mp"),
            )
        )
    return optimizers[0] if len(optimizers) == 1 else ChainedOptimizer(optimizers)


def _groups(
    config: OptimizerConfig,
    chunks: list[DistributedDataParallel],
    no_weight_decay_cond: ParamCondition | None,
    scale_lr_cond: ParamCondition | None,
    lr_mult: float,
) -> list[dict[str, Any]]:
    return get_param_groups(
        chunks,
        no_weight_decay_cond=no_weight_decay_cond,
        scale_lr_cond=scale_lr_cond,
        lr_mult=lr_mult,
        lr=config.lr,
        min_lr=config.min_lr,
        decoupled_lr=config.decoupled_lr,
        decoupled_min_lr=config.decoupled_min_lr,
    )


def _buffers(chunk: DistributedDataParallel, kind: str) -> list[_ParamAndGradBuffer]:
    """The flat buffers of a wrapped chunk; a bare module has none."""
    return getattr(chunk, kind) if isinstance(chunk, DistributedDataParallel) else []


def _torch_optimizer(config: OptimizerConfig, param_groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The update rule alone. Without `config.lr` its groups have no rate until a scheduler writes one."""
    groups = [{**group, "lr": config.lr} for group in param_groups]
    if config.optimizer == "adam":
        return Adam(
            groups,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
        )
    if config.optimizer == "sgd":
        return Sgd(
            groups,
            weight_decay=config.weight_decay,
            momentum=config.sgd_momentum,
            foreach=True,
        )
    raise ConfigError("--optimizer", f"{config.optimizer!r} is unknown", "use adam or sgd")


def _grad_scaler(config: OptimizerConfig) -> MegatronGradScaler | None:
    """The loss scale that the precision asks for, if any."""
    if config.loss_scale:
        return ConstantGradScaler(config.loss_scale)
    if config.fp16:
        return DynamicGradScaler(
            initial_scale=config.initial_loss_scale,
            min_scale=config.min_loss_scale,
            growth_factor=2.0,
            backoff_factor=0.5,
            growth_interval=config.loss_scale_window,
            hysteresis=config.hysteresis,
        )
    return None


def _assemble(
    config: OptimizerConfig,
    chunks: list[DistributedDataParallel],
    param_groups: list[dict[str, Any]],
    per_model_buffers: dict[int, list[_ParamAndGradBuffer]],
    *,
    model_parallel_group: Any,
    data_parallel_group: Any,
    data_parallel_group_gloo: Any,
    data_parallel_group_idx: int,
) -> MegatronOptimizer:
    """One optimizer for one set of parameter groups, wrapped as its precision and sharding ask."""
    inner = _torch_optimizer(config, param_groups)
    optimizer: MegatronOptimizer
    if config.use_distributed_optimizer:
        optimizer = DistributedOptimizer(
            inner,
            config,
            _grad_scaler(config),
            init_optimizer_state,
            chunks,
            per_model_buffers,
            data_parallel_group,
            data_parallel_group_gloo,
            data_parallel_group_idx,
        )
    elif config.fp16 or config.bf16:
        optimizer = Float16OptimizerWithFloat16Params(
            inner, config, _grad_scaler(config), init_optimizer_state
        )
    else:
        optimizer = FP32Optimizer(inner, config, init_optimizer_state)
    optimizer.model_parallel_group = model_parallel_group
    optimizer.model_chunks = chunks
    return optimizer
