"""Rules about what the machine must have, and about determinism."""

from __future__ import annotations

import os
from typing import Any

from megatron.core.flags import rule
from megatron.core.kernels import capability
from megatron.training.config.rules.base import DERIVED, GIVEN

_DETERMINISTIC_NCCL = ("Tree", "Ring", "CollnetDirect", "CollnetChain", "^NVLS")


# fmt: off
# ---- determinism

@rule(GIVEN, "--deterministic-mode", "--use-flash-attn", bad="--deterministic-mode --use-flash-attn",
      why="flash attention sums gradients in no fixed order", fix="drop --use-flash-attn")
def deterministic_excludes_flash_attention(args: Any) -> bool:
    return not (args.deterministic_mode and args.use_flash_attn)


@rule(GIVEN, "--deterministic-mode", "--cross-entropy-loss-fusion",
      bad="--deterministic-mode --cross-entropy-loss-fusion",
      why="the fused loss is not deterministic", fix="drop --cross-entropy-loss-fusion")
def deterministic_excludes_fused_loss(args: Any) -> bool:
    return not (args.deterministic_mode and args.cross_entropy_loss_fusion)


# ---- what the machine must have

@rule(DERIVED, "--sequence-parallel", bad="--sequence-parallel --tensor-model-parallel-size 2",
      why="the overlap of communication with computation needs the environment variable "
          "CUDA_DEVICE_MAX_CONNECTIONS to be exactly 1",
      fix="export CUDA_DEVICE_MAX_CONNECTIONS=1", device="cuda")
def sequence_parallel_needs_one_connection(args: Any) -> bool:
    return not args.sequence_parallel or os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1"


@rule(DERIVED, "--no-async-tensor-model-parallel-allreduce", bad="",
      why="the overlapped gradient reduction, which is the default, needs the environment variable "
          "CUDA_DEVICE_MAX_CONNECTIONS to be exactly 1",
      fix="export CUDA_DEVICE_MAX_CONNECTIONS=1, or add --no-async-tensor-model-parallel-allreduce", device="cuda")
def async_reduction_needs_one_connection(args: Any) -> bool:
    one = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1"
    return one or not args.async_tensor_model_parallel_allreduce


@rule(GIVEN, "--deterministic-mode", bad="--deterministic-mode",
      why="the environment variable NCCL_ALGO must name an algorithm whose sums have a fixed order: "
          "Tree, Ring, CollnetDirect, CollnetChain or ^NVLS",
      fix="export NCCL_ALGO=Ring", device="cuda")
def deterministic_nccl(args: Any) -> bool:
    return not args.deterministic_mode or os.environ.get("NCCL_ALGO") in _DETERMINISTIC_NCCL


@rule(GIVEN, "--transformer-impl", bad="--transformer-impl transformer_engine",
      why="Transformer Engine needs a CUDA device", fix="drop the flag, or give --transformer-impl local", device="cpu")
def transformer_engine_needs_cuda(args: Any) -> bool:
    return "transformer_impl" not in args.args_given or args.transformer_impl == "local"


@rule(GIVEN, "--transformer-impl", bad="--transformer-impl transformer_engine",
      why="Transformer Engine is not installed", fix="install it, drop the flag, or give --transformer-impl local",
      device="cuda")
def transformer_engine_is_installed(args: Any) -> bool:
    demanded = "transformer_impl" in args.args_given and args.transformer_impl == "transformer_engine"
    return not demanded or "transformer_engine" in capability.probe().packages


@rule(GIVEN, "--distributed-backend", bad="--distributed-backend nccl",
      why="nccl connects CUDA devices, and there is none", fix="drop the flag, or give --distributed-backend gloo",
      device="cpu")
def nccl_needs_cuda(args: Any) -> bool:
    return "distributed_backend" not in args.args_given or args.distributed_backend != "nccl"


@rule(GIVEN, "--use-flash-attn", bad="--use-flash-attn",
      why="the flash-attn package needs a CUDA device", fix="drop the flag; attention is fused without it", device="cpu")
def flash_attention_needs_cuda(args: Any) -> bool:
    return not args.use_flash_attn


@rule(GIVEN, "--fp8-format", bad="--fp8-format hybrid",
      why="this device's matrix units have no fp8: that takes compute capability 8.9",
      fix="drop the flag and train with --bf16", device="cuda")
def fp8_needs_matrix_units(args: Any) -> bool:
    return args.fp8 is None or (capability.probe().compute or (0, 0)) >= (8, 9)
