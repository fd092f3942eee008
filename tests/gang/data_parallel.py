"""A small model and training loop that the data-parallel tests run on every rank."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig

WIDTHS = (12, 37, 19, 5)
MICROBATCHES = 3
SAMPLES = 8


class Network(torch.nn.Module):
    """Linear layers with odd sizes and a norm, so that shards cut parameters anywhere."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(a, b, dtype=dtype) for a, b in pairwise(WIDTHS))
        self.norm = torch.nn.LayerNorm(WIDTHS[1], dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[b, 12] -> [b, 5]"""
        x = self.norm(torch.tanh(self.layers[0](x)))
        return self.layers[2](torch.tanh(self.layers[1](x)))


def batch(step: int, microbatch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One microbatch of the whole data-parallel group."""
    generator = torch.Generator().manual_seed(1000 * step + microbatch)
    x = torch.randn(SAMPLES, WIDTHS[0], generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randn(SAMPLES, WIDTHS[-1], generator=generator, dtype=torch.float64).to(dtype)
    return x, y


def loss_of(model: torch.nn.Module, data: tuple[Tensor, Tensor], rank: int, ranks: int) -> Tensor:
    """Mean squared error of this rank's samples, averaged over microbatches."""
    x, y = (part.chunk(ranks)[rank] for part in data)
    return (
        (model(x) - y).float().square().mean() / MICROBATCHES
        if x.dtype.itemsize < 8
        else ((model(x) - y).square().mean() / MICROBATCHES)
    )


def build(
    dtype: torch.dtype = torch.float32,
    ddp: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
) -> tuple[DistributedDataParallel, Any]:
    """The wrapped network and its optimizer."""
    ddp = ddp or {}
    half = {"bf16": dtype is torch.bfloat16, "fp16": dtype is torch.float16}
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    ddp_config = DistributedDataParallelConfig(**{"grad_reduce_in_fp32": True, **ddp})
    model = DistributedDataParallel(config, ddp_config, Network(dtype))
    settings = {
        "lr": 0.01, "min_lr": 0.0, "weight_decay": 0.1, "clip_grad": 0.5, "initial_loss_scale": 256.0, **half,
        "use_distributed_optimizer": ddp_config.use_distributed_optimizer, "params_dtype": dtype,
        "log_num_zeros_in_grad": True, **(optimizer or {}),
    }  # fmt: skip
    return model, get_megatron_optimizer(OptimizerConfig(**settings), [model])


def accumulate(
    model: DistributedDataParallel, step: int, dtype: torch.dtype, scale: Any = lambda x: x
) -> None:
    """Forward and backward of all microbatches; the last one outside no_sync()."""
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    with model.no_sync():
        for microbatch in range(MICROBATCHES - 1):
            scale(loss_of(model, batch(step, microbatch, dtype), rank, ranks)).backward()
    scale(loss_of(model, batch(step, MICROBATCHES - 1, dtype), rank, ranks)).backward()


def train(
    model: DistributedDataParallel, optimizer: Any, steps: range, dtype: torch.dtype
) -> list[tuple[bool, Any, Any]]:
    """Whole training steps; what optimizer.step() returned for each."""
    results = []
    for step in steps:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        accumulate(model, step, dtype, optimizer.scale_loss)
        finalize_model_grads([model])
        results.append(optimizer.step())
    return results


def weights(model: DistributedDataParallel) -> dict[str, Tensor]:
    """All parameters, gathered if need be, as copies."""
    if model.ddp_config.overlap_param_gather:
        model.disable_forward_pre_hook()
        model.enable_forward_pre_hook()
    return {name: param.detach().clone() for name, param in model.module.named_parameters()}


def init() -> None:
    """A layout of data parallelism alone."""
    parallel_state.initialize_model_parallel()


def rank_and_size() -> tuple[int, int]:
    """This rank and the number of ranks."""
    return dist.get_rank(), dist.get_world_size()
