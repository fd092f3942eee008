"""The buffers through which TransformerEngine's layers overlap tensor-parallel transfers with products."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
import transformer_engine as te

from megatron.core.tensor_parallel.overlap import Overlap
from megatron.core.transformer.transformer_config import TransformerConfig


def start_user_buffers(config: TransformerConfig, tokens: int, settings: Mapping[str, Any]) -> None:
    """Before layers with `tp_comm_overlap` are built; all ranks must call.

    tokens: of one forward pass, sequence x micro batch / context-parallel size. settings: by product (`qkv_fprop`, ..),
    what TransformerEngine shall do differently from its defaults.
    """
    start = te.pytorch.module.base.initialize_ub
    options: dict[str, Any] = {}
    if "bootstrap_backend" in inspect.signature(start).parameters:
        options["bootstrap_backend"] = "nccl"
    else:
        dist.new_group(backend="mpi")  # older releases find their neighbours through it
    start(
        shape=[tokens, config.hidden_size],
        tp_size=config.tensor_model_parallel_size,
        use_fp8=config.fp8 is not None,
        ub_cfgs=dict(settings),
        **options,
    )


def linear_options(overlap: Overlap, name: str) -> dict[str, Any]:
    """What a linear layer of TransformerEngine is told."""
    return {"ub_name": name, "ub_overlap_ag": overlap.gathers, "ub_overlap_rs": overlap.scatters}


def norm_linear_options(overlap: Overlap, name: str) -> dict[str, Any]:
    """What a norm-linear layer, which gathers only, is told."""
    return {
        "ub_name": name,
        "ub_overlap_ag": overlap.gathers,
        "ub_overlap_rs_dgrad": overlap.scatters_dgrad,
        "ub_bulk_dgrad": overlap.bulk_dgrad,
        "ub_bulk_wgrad": overlap.bulk_wgrad,
    }
