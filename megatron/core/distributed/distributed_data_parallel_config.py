"""Settings of the data-parallel wrapper: how gradients are stored, grouped and reduced."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.flags import flag


@dataclass
class DistributedDataParallelConfig:
    """How `DistributedDataParallel` keeps gradients in flat buffers and reduces them over the data-parallel group."""

    # fmt: off
    grad_reduce_in_fp32: bool = flag(
        False, on="--accumulate-allreduce-grads-in-fp32", dest="accumulate_allreduce_grads_in_fp32",
        group="mixed precision", needs="--fp16 or --bf16",
        help="Accumulate and reduce gradients in fp32 whatever the parameters' type (--bf16 switches this on).")
    overlap_grad_reduce: bool = flag(
        False, group="distributed",
        help="Reduce each bucket of gradients as soon as it is complete, while the backward pass goes on.")
    overlap_param_gather: bool = flag(
        False, group="distributed",
        help="With the distributed optimizer: gather updated parameters bucket by bucket, ahead of the forward "
        "pass that needs them.")
    align_param_gather: bool = flag(
        False, cli_default=True, off="--no-align-param-gather", group="distributed",
        needs=("--overlap-param-gather", "--num-layers-per-virtual-pipeline-stage"),
        help="Let every pipeline stage start parameter gathers on its own instead of all at the same moment.")
    use_distributed_optimizer: bool = flag(
        False, group="distributed",
        help="Divide the optimizer's state and fp32 parameters over the data-parallel ranks (ZeRO stage 1).")
    check_for_nan_in_grad: bool = flag(
        False, cli_default=True, off="--no-check-for-nan-in-loss-and-grad", dest="check_for_nan_in_loss_and_grad",
        group="training",
        help="Do not stop when the loss or a gradient is NaN (with fp16 loss scaling this is never checked).")
    bucket_size: int | None = flag(
        None, on="--ddp-bucket-size", dest="ddp_bucket_size", group="distributed",
        needs="--overlap-grad-reduce",
        help="Parameters per gradient bucket; default: 40 million, or one million per data-parallel rank if that is more.")
    average_in_collective: bool = flag(
        False, on="--ddp-average-in-collective", dest="ddp_average_in_collective", group="distributed",
        help="Average gradients inside the collective instead of scaling them before it.")
    fp8_param_gather: bool = flag(
        False, group="Transformer-Engine", needs="--fp8-format",
        help="Keep the weights of fp8 layers as fp8 numbers, and have the distributed optimizer gather them so.")
    # fmt: on
