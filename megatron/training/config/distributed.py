"""Flags about processes, groups and what core's parallel configuration does not hold."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.flags import flag


@dataclass
class DistributedConfig:
    """How processes meet and how layers are placed on pipeline stages."""

    # fmt: off
    encoder_tensor_model_parallel_size: int = flag(
        0, group="distributed", help="Tensor-parallel size of the encoder; 0 means the decoder's.")
    encoder_pipeline_model_parallel_size: int = flag(
        0, group="distributed", help="Pipeline stages of the encoder, before those of the decoder.")
    model_parallel_size: int | None = flag(
        None, group="distributed", status="unsupported", reason="it was renamed", instead="--tensor-model-parallel-size",
        help="Old name of --tensor-model-parallel-size.")
    num_layers_per_virtual_pipeline_stage: int | None = flag(
        None, group="distributed", help="Interleave the pipeline: layers per model chunk.")
    distributed_backend: str = flag(
        "nccl", parse=None, choices=("nccl", "gloo"), group="distributed",
        help="Library for communication; without an accelerator the default means gloo.")
    distributed_timeout_minutes: int = flag(
        10, group="distributed", help="Minutes after which a collective that does not end is an error.")
    align_grad_reduce: bool = flag(
        True, off="--no-align-grad-reduce", group="distributed",
        needs=("--overlap-grad-reduce", "--pipeline-model-parallel-size"),
        help="Let every pipeline stage start gradient reductions on its own instead of all at the same moment.")
    scatter_gather_tensors_in_pipeline: bool = flag(
        True, off="--no-scatter-gather-tensors-in-pipeline", group="distributed", status="noop",
        reason="v0.9 reads it nowhere", help="Send whole tensors between pipeline stages.")
    local_rank: int = flag(
        0, group="distributed", help="Rank on this node; torchrun gives it as LOCAL_RANK, which is the default.")
    lazy_mpu_init: bool | None = flag(
        None, parse=bool, group="distributed", status="unsupported",
        reason="the process groups are made by initialize_megatron itself",
        help="Return from initialisation before process groups exist, for a trainer that makes its own.")
    standalone_embedding_stage: bool = flag(
        False, group="distributed", help="Give the first pipeline stage the embedding and no layers.")
    nccl_communicator_config_path: str | None = flag(
        None, group="distributed", status="gpu", help="YAML file with NCCL settings per kind of group.")
    use_tp_pp_dp_mapping: bool = flag(
        False, group="distributed",
        help="Number ranks in the order tensor, pipeline, data instead of tensor, data, pipeline.")
    # fmt: on
