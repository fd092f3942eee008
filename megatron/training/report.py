"""The start-up report: what this run is, what was derived, chosen or left out, in lines a person reads once.

Each function returns lines and prints nothing, so that `tools/explain.py` can say the same without a process group.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
import torch.distributed as dist

from megatron.core import device, parallel_state
from megatron.core.errors import TrainingError
from megatron.core.kernels import registry
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.training.arguments import notices
from megatron.training.context import TrainContext
from megatron.training.utils import print_rank_0


def layout(args: Namespace, device_name: str | None = None) -> list[str]:
    """Parallel layout on devices of this name (None: this machine's), derived sizes, flags that do nothing there."""
    sizes = {
        "tensor": args.tensor_model_parallel_size,
        "context": args.context_parallel_size,
        "pipeline": args.encoder_pipeline_model_parallel_size + args.pipeline_model_parallel_size,
        "data": args.data_parallel_size,
    }
    product = " x ".join(f"{name} {size}" for name, size in sizes.items())
    if args.expert_model_parallel_size > 1:
        product += f" (experts over {args.expert_model_parallel_size} of the data-parallel ranks)"
    lines = [f"> layout: {args.world_size} rank(s) on {device_name or device.device_name()} = {product}"]
    virtual = args.virtual_pipeline_model_parallel_size
    if virtual is not None:
        lines.append(
            f">   interleaved: {virtual} chunks of {args.num_layers_per_virtual_pipeline_stage} layers per stage"
        )
    per_rank = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
    lines.append(
        f">   global batch {args.global_batch_size} = {per_rank} micro-batches of {args.micro_batch_size}"
        f" x {args.data_parallel_size} data-parallel ranks, {args.seq_length} tokens each"
    )
    lines.append(
        f">   layers {args.num_layers}, hidden {args.hidden_size}, ffn {args.ffn_hidden_size},"
        f" heads {args.num_attention_heads} of {args.kv_channels},"
        f" {str(args.params_dtype).removeprefix('torch.')} parameters"
    )
    lines += [f">   {line}" for line in notices(args)]
    return lines


def tokenizer(args: Namespace, built: Any) -> list[str]:
    """Tokenizer and vocabulary."""
    if built is None:
        return []
    return [
        f"> tokenizer: {args.tokenizer_type}, vocabulary {built.vocab_size}"
        f" padded to {args.padded_vocab_size} (multiple of {args.make_vocab_size_divisible_by}"
        f" x {args.tensor_model_parallel_size})"
    ]


def kernels(choices: list[registry.Choice] | None = None) -> list[str]:
    """Which implementation of each operation runs (None: those chosen so far), and why not a faster one."""
    lines = ["> kernels:"]
    for choice in registry.report() if choices is None else choices:
        dtype = str(choice.spec.dtype).removeprefix("torch.")
        line = f">   {choice.op} ({dtype}): {choice.chosen}"
        if choice.demanded:
            line += ", as demanded"
        lines.append(line)
        lines += [f">     not {name}: {reason}" for name, reason in choice.refused]
    return lines


def datasets(splits: Any) -> list[str]:
    """For each split the sources with their weights, samples and epochs."""
    lines = []
    for name, dataset in zip(("train", "validation", "test"), splits):
        if dataset is None:
            continue
        samples = _length(dataset)
        if samples is None:
            lines.append(f"> {name} data: from a source that does not tell its length")
            continue
        lines.append(f"> {name} data: {samples} samples")
        parts = getattr(dataset, "datasets", [dataset])
        weights = getattr(dataset, "weights", [1.0])
        for part, weight in zip(parts, weights):
            path = getattr(part, "dataset_path", None)
            epochs = _epochs(part)
            text = f">   {path or 'synthetic'}: weight {weight:.4g}, {len(part)} samples"
            lines.append(text if epochs is None else f"{text}, {epochs} epoch(s)")
    return lines


def _length(source: Any) -> int | None:
    """Samples, or None: with `--dataloader-type external` a split is whatever its user's code iterates over."""
    try:
        return len(source)
    except TypeError:
        return None


def _epochs(dataset: Any) -> int | None:
    """How often a dataset runs through its documents, where it does so in whole epochs."""
    order, documents = getattr(dataset, "document_index", None), getattr(dataset, "indices", None)
    return None if order is None or documents is None or not len(documents) else len(order) // len(documents)


def schedule(args: Namespace, scheduler: OptimizerParamScheduler) -> list[str]:
    """The learning-rate curve at its corners."""
    batch = args.global_batch_size
    lines = [
        f"> learning rate: {args.lr_decay_style}, {scheduler.init_lr:g} -> {args.lr:g}"
        f" over {scheduler.lr_warmup_steps:g} samples, then to {args.min_lr:g}"
        f" at {scheduler.lr_decay_steps} samples (iteration {scheduler.lr_decay_steps / batch:g} of {args.train_iters})"
    ]
    if args.weight_decay_incr_style == "constant":
        lines.append(f"> weight decay: {args.start_weight_decay:g}")
    else:
        lines.append(
            f"> weight decay: {args.weight_decay_incr_style}, {args.start_weight_decay:g} -> {args.end_weight_decay:g}"
        )
    return lines


def parameters(model: list[torch.nn.Module]) -> list[str]:
    """Parameters of the whole model, shared ones counted once; all ranks must call."""
    mine = 0
    for chunk in model:
        for param in chunk.parameters():
            duplicate = (
                parallel_state.get_tensor_model_parallel_rank() > 0 and not param.tensor_model_parallel
            )
            if not duplicate and not getattr(param, "shared", False):
                mine += param.numel()
    total = torch.tensor([mine], dtype=torch.int64, device=device.current())
    dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return model_size(int(total.item()))


def model_size(total: int) -> list[str]:
    """How large the whole model is."""
    return [f"> model: {total:,} parameters"]


def print_run_report(
    ctx: TrainContext, model: list[torch.nn.Module], scheduler: OptimizerParamScheduler
) -> None:
    """Print what is known once model and data are built; all ranks must call, and must have chosen the same kernels."""
    lines = parameters(model) + kernels() + schedule(ctx.args, scheduler)
    hashes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hashes, registry.table_hash())
    odd = [rank for rank, value in enumerate(hashes) if value != hashes[0]]
    # Stages of a pipeline hold different operations; replicas must not.
    if odd and parallel_state.get_pipeline_model_parallel_world_size() == 1:
        raise TrainingError(
            f"kernels of rank {odd[0]}",
            "differ from those of rank 0, so replicas would part",
            "install the same packages everywhere",
        )
    for line in lines:
        print_rank_0(line)
