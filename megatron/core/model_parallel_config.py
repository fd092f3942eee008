"""Settings common to all models: how they are divided over ranks, in which precision, and what overlaps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from megatron.core.flags import Rule, check_config, computed, flag, from_args, rule, runtime

RULES: list[Rule] = []


def _dtype_between_stages(args: Any) -> torch.dtype | None:
    """What a layer hands on: the residual stream, which may be wider than the parameters."""
    wide = getattr(args, "fp32_residual_connection", False)
    return torch.float32 if wide else getattr(args, "params_dtype", None)


@dataclass
class ModelParallelConfig:
    """How a model is divided over ranks and which communication overlaps with computation."""

    # fmt: off
    tensor_model_parallel_size: int = flag(
        1, group="distributed", help="Ranks over which every layer's matrices are divided.")
    pipeline_model_parallel_size: int = flag(
        1, group="distributed", help="Ranks over which the layers are divided.")
    virtual_pipeline_model_parallel_size: int | None = from_args("virtual_pipeline_model_parallel_size", None)
    sequence_parallel: bool = flag(
        False, group="training",
        help="Divide activations outside the matrix products along the sequence, over the tensor-parallel ranks.")
    context_parallel_size: int = flag(
        1, group="distributed", help="Ranks over which every sequence is divided, attention included.")
    expert_model_parallel_size: int = flag(
        1, group="moe", help="Ranks over which the experts are divided.")
    moe_extended_tp: bool = flag(
        False, group="moe",
        needs=("--num-experts", "--expert-model-parallel-size"),
        help="Divide each expert's matrices over tensor and expert ranks together instead of placing whole experts.")

    perform_initialization: bool = flag(
        True, off="--no-initialization", group="checkpointing",
        help="Leave weights uninitialised, for runs that load them anyway.")
    use_cpu_initialization: bool = flag(
        False, cli_default=None, group="training",
        help="Draw every weight whole from the CPU generator, so that values do not depend on tensor parallelism.")

    fp16: bool = from_args("fp16", False)
    bf16: bool = from_args("bf16", False)
    params_dtype: torch.dtype = from_args("params_dtype", torch.float32)
    timers: Callable | None = runtime(None)
    finalize_model_grads_func: Callable | None = runtime(None)
    grad_scale_func: Callable | None = runtime(None)
    no_sync_func: Callable | None = runtime(None)
    grad_sync_func: Callable | None = runtime(None)
    param_sync_func: Callable | None = runtime(None)
    deterministic_mode: bool = flag(
        False, group="training", help="Use only operations whose results do not vary from run to run.")
    enable_autocast: bool = from_args("enable_autocast", False)
    autocast_dtype: torch.dtype | None = from_args("autocast_dtype", None)
    num_microbatches_with_partial_activation_checkpoints: int | None = from_args(
        "num_microbatches_with_partial_activation_checkpoints", None)

    gradient_accumulation_fusion: bool = flag(
        False, cli_default=True, off="--no-gradient-accumulation-fusion", group="training",
        help="Do not fold the accumulation of weight gradients into the matrix product that computes them.")
    async_tensor_model_parallel_allreduce: bool = flag(
        False, cli_default=True, off="--no-async-tensor-model-parallel-allreduce", group="training", status="gpu",
        help="Start even if CUDA_DEVICE_MAX_CONNECTIONS is not 1; tensor-parallel reductions may then overlap less.")
    use_te_rng_tracker: bool = from_args("use_te_rng_tracker", False)
    tp_comm_overlap: bool = flag(
        False, group="training", needs="--tensor-model-parallel-size",
        help="Move sequence-parallel activations rank by rank, while the tokens that are there are multiplied.")
    tp_comm_bulk_wgrad: bool = flag(
        True, off="--disable-tp-comm-bulk-wgrad", group="training", needs="--tp-comm-overlap",
        help="Do not overlap the reduce-scatter of the input's gradient with the weight-gradient product.")
    tp_comm_bulk_dgrad: bool = flag(
        True, off="--disable-tp-comm-bulk-dgrad", group="training", needs="--tp-comm-overlap",
        help="Do not overlap the second all-gather of the input with the data-gradient product.")
    tp_comm_overlap_ag: bool = flag(
        True, off="--disable-tp-comm-overlap-ag", group="training", needs="--tp-comm-overlap",
        help="Do not overlap the all-gather with the product that consumes it.")
    tp_comm_overlap_rs: bool = flag(
        True, off="--disable-tp-comm-overlap-rs", group="training", needs="--tp-comm-overlap",
        help="Do not overlap the reduce-scatter with the product that feeds it.")
    tp_comm_overlap_rs_dgrad: bool = flag(
        False, group="training", needs="--tp-comm-overlap",
        help="Overlap the reduce-scatter of the input's gradient with the product that feeds it.")
    tp_comm_split_ag: bool = flag(
        True, off="--disable-tp-comm-split-ag", group="training", status="noop",
        reason="Transformer Engine replaced it", instead="--disable-tp-comm-overlap-ag",
        help="Do not split the all-gather of --tp-comm-overlap into pieces.")
    tp_comm_atomic_ag: bool = from_args("tp_comm_atomic_ag", False)
    tp_comm_split_rs: bool = flag(
        True, off="--disable-tp-comm-split-rs", group="training", status="noop",
        reason="Transformer Engine replaced it", instead="--disable-tp-comm-overlap-rs",
        help="Do not split the reduce-scatter of --tp-comm-overlap into pieces.")
    tp_comm_atomic_rs: bool = from_args("tp_comm_atomic_rs", False)
    cross_entropy_loss_fusion: bool = flag(
        False, group="training", help="Compute the loss and its gradient over the divided vocabulary in one pass.")
    tp_comm_overlap_disable_qkv: bool = from_args("tp_comm_overlap_disable_qkv", False)
    tp_comm_overlap_disable_fc1: bool = from_args("tp_comm_overlap_disable_fc1", False)

    pipeline_dtype: torch.dtype | None = computed(None, _dtype_between_stages)
    variable_seq_lengths: bool = from_args("variable_seq_lengths", False)
    overlap_p2p_comm: bool = flag(
        False, cli_default=True, off="--no-overlap-p2p-communication", group="distributed",
        needs="--num-layers-per-virtual-pipeline-stage",
        help="Do not overlap communication between stages with computation.")
    batch_p2p_comm: bool = computed(True, lambda args: not args.overlap_p2p_comm)
    batch_p2p_sync: bool = from_args("batch_p2p_sync", True)
    use_ring_exchange_p2p: bool = flag(
        False, group="distributed", status="unsupported",
        reason="it needs a build of torch with torch.distributed.ring_exchange, which no release has",
        help="Exchange tensors between pipeline stages with a ring_exchange call.")
    deallocate_pipeline_outputs: bool = computed(False, lambda args: True)
    defer_embedding_wgrad_compute: bool = flag(
        False, group="distributed",
        help="Compute the output layer's weight gradients while the pipeline drains instead of microbatch by microbatch.")
    wgrad_deferral_limit: int = flag(
        0, group="distributed",
        needs="--defer-embedding-wgrad-compute", help="Microbatches to defer; 0 means all.")
    pipeline_model_parallel_split_rank: int | None = flag(
        None, group="distributed", status="deprecated", reason="there is a more general flag",
        instead="--encoder-pipeline-model-parallel-size",
        help="Pipeline rank at which the decoder starts.")

    cpu_offloading: bool = from_args("cpu_offloading", False)
    cpu_offloading_num_layers: int = from_args("cpu_offloading_num_layers", 0)
    _cpu_offloading_context: AbstractContextManager | None = runtime(None)
    cpu_offloading_activations: bool = from_args("cpu_offloading_activations", True)
    cpu_offloading_weights: bool = from_args("cpu_offloading_weights", True)
    barrier_with_L1_time: bool = flag(
        True, off="--no-barrier-with-level-1-timing", group="logging",
        needs="--timing-log-level",
        help="Do not wait for all ranks around level 1 timers; times become uneven but the run is undisturbed.")

    # Not in v0.9, therefore keyword-only: the positions of its fields stay.
    context_parallel_algo: str = flag(
        "ring", choices=("ring", "a2a"), group="extras", kw_only=True,
        needs="--context-parallel-size",
        help="How context parallelism computes attention: pass keys and values around a ring, or exchange heads "
        "for sequence with an all-to-all.")
    # fmt: on

    def __post_init__(self) -> None:
        if self.autocast_dtype is None:
            self.autocast_dtype = self.params_dtype
        check_config(self, RULES)


# fmt: off
@rule(RULES, "--tensor-model-parallel-size", bad="--tensor-model-parallel-size 0",
      why="the number of tensor-parallel ranks is {a.tensor_model_parallel_size}", fix="give 1 or more")
def tensor_ranks_exist(config: ModelParallelConfig) -> bool:
    return config.tensor_model_parallel_size >= 1


@rule(RULES, "--pipeline-model-parallel-size", bad="--pipeline-model-parallel-size 0",
      why="the number of pipeline stages is {a.pipeline_model_parallel_size}", fix="give 1 or more")
def pipeline_stages_exist(config: ModelParallelConfig) -> bool:
    return config.pipeline_model_parallel_size >= 1


@rule(RULES, "--context-parallel-size", bad="--context-parallel-size 0",
      why="the number of context-parallel ranks is {a.context_parallel_size}", fix="give 1 or more")
def context_ranks_exist(config: ModelParallelConfig) -> bool:
    return config.context_parallel_size >= 1


@rule(RULES, "--expert-model-parallel-size", bad="--expert-model-parallel-size 0",
      why="the number of expert-parallel ranks is {a.expert_model_parallel_size}", fix="give 1 or more")
def expert_ranks_exist(config: ModelParallelConfig) -> bool:
    return config.expert_model_parallel_size >= 1


# The command line drops --sequence-parallel itself where there is no tensor parallelism, so `bad` is empty here.
@rule(RULES, "--sequence-parallel", "--tensor-model-parallel-size", bad="",
      why="sequence parallelism divides activations over the tensor-parallel ranks, and there is only one",
      fix="use a tensor-parallel size of 2 or more, or switch sequence parallelism off")
def sequence_parallel_needs_tensor_parallel(config: ModelParallelConfig) -> bool:
    return not config.sequence_parallel or config.tensor_model_parallel_size > 1


@rule(RULES, "--pipeline-model-parallel-size", "pipeline_dtype", bad="",
      why="stages exchange tensors of an agreed type, which is not given", fix="set pipeline_dtype")
def pipeline_needs_dtype(config: ModelParallelConfig) -> bool:
    return config.pipeline_model_parallel_size == 1 or config.pipeline_dtype is not None


@rule(RULES, "--defer-embedding-wgrad-compute", "--pipeline-model-parallel-size",
      bad="--defer-embedding-wgrad-compute",
      why="weight gradients are deferred into the pipeline's drain phase, and one stage has none",
      fix="use two or more pipeline stages or drop --defer-embedding-wgrad-compute")
def deferral_needs_pipeline(config: ModelParallelConfig) -> bool:
    return not config.defer_embedding_wgrad_compute or config.pipeline_model_parallel_size > 1


@rule(RULES, "--defer-embedding-wgrad-compute", "--no-gradient-accumulation-fusion",
      bad="--defer-embedding-wgrad-compute --pipeline-model-parallel-size 2 --no-gradient-accumulation-fusion",
      why="a deferred weight gradient is added straight into the gradient buffer, which is what the fusion does",
      fix="drop one of the two")
def deferral_needs_accumulation_fusion(config: ModelParallelConfig) -> bool:
    return not config.defer_embedding_wgrad_compute or config.gradient_accumulation_fusion


@rule(RULES, "--wgrad-deferral-limit", "--defer-embedding-wgrad-compute",
      bad="--wgrad-deferral-limit -1 --defer-embedding-wgrad-compute --pipeline-model-parallel-size 2",
      why="{a.wgrad_deferral_limit} microbatches cannot be deferred", fix="give 0 (all of them) or more")
def deferral_limit_counts(config: ModelParallelConfig) -> bool:
    return not config.defer_embedding_wgrad_compute or config.wgrad_deferral_limit >= 0


@rule(RULES, "--expert-model-parallel-size", "--tensor-model-parallel-size", "--sequence-parallel",
      bad="--expert-model-parallel-size 2 --tensor-model-parallel-size 2 --num-experts 4",
      why="with expert and tensor parallelism together, tokens are dispatched from sequence-parallel activations",
      fix="add --sequence-parallel")
def experts_over_tensor_ranks_need_sequence_parallel(config: ModelParallelConfig) -> bool:
    both = config.expert_model_parallel_size > 1 and config.tensor_model_parallel_size > 1
    return not both or config.sequence_parallel
