"""From finished arguments to configuration objects: the only bridge from the command line to core."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from megatron.core.distributed.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron.core.errors import FlagError
from megatron.core.flags import BrokenRule, Computed, Flag, FromArgs, kinds
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

_Config = TypeVar("_Config")


def values(config_class: type, args: Any) -> dict[str, Any]:
    """What `args` say about the fields of a configuration class; fields they are silent about are left out.

    A field of none of the four kinds, as in a user's own subclass, takes the argument of its name.
    """
    result: dict[str, Any] = {}
    for item in fields(config_class):
        kind = kinds(config_class)[item.name]
        if isinstance(kind, Computed):
            result[item.name] = kind.compute(args)
            continue
        if kind is None or isinstance(kind, Flag | FromArgs):
            dest = item.name if kind is None else kind.dest
            if hasattr(args, dest):
                value = getattr(args, dest)
                result[item.name] = not value if isinstance(kind, Flag) and kind.inverted else value
    return result


def config(config_class: type[_Config], args: Any) -> _Config:
    """One configuration object; a rule it breaks is reported as FlagError, in terms of flags."""
    try:
        return config_class(**values(config_class, args))
    except BrokenRule as broken:
        raise FlagError(", ".join(broken.rule.flags), broken.why, broken.fix) from broken


def transformer_config(
    args: Any, config_class: type[TransformerConfig] = TransformerConfig
) -> TransformerConfig:
    """The transformer's configuration (the decoder's, where encoder and decoder differ)."""
    return config(config_class, args)


def encoder_config(args: Any, decoder: TransformerConfig) -> TransformerConfig:
    """The configuration of an encoder beside `decoder`: its own depth and, where given, its own division over ranks."""
    encoder = copy.deepcopy(decoder)
    encoder.num_layers = args.encoder_num_layers
    encoder.first_pipeline_num_layers = encoder.last_pipeline_num_layers = None  # they are about the decoder
    if args.encoder_pipeline_model_parallel_size > 0:
        encoder.pipeline_model_parallel_size = args.encoder_pipeline_model_parallel_size
    if args.encoder_tensor_model_parallel_size > 0:
        encoder.tensor_model_parallel_size = args.encoder_tensor_model_parallel_size
    return encoder


def optimizer_config(args: Any) -> OptimizerConfig:
    """The optimizer's configuration."""
    return config(OptimizerConfig, args)


def ddp_config(args: Any) -> DistributedDataParallelConfig:
    """The configuration of the data-parallel wrapper."""
    return config(DistributedDataParallelConfig, args)


@dataclass(frozen=True)
class Configs:
    """The configurations one command line stands for."""

    transformer: TransformerConfig
    optimizer: OptimizerConfig
    ddp: DistributedDataParallelConfig


def configs(args: Any) -> Configs:
    """All configurations at once."""
    return Configs(transformer_config(args), optimizer_config(args), ddp_config(args))
