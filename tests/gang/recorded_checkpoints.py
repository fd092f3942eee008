"""A recorded v0.9 checkpoint put to work in a gang worker: loaded by --load, evaluated, and trained on."""

from __future__ import annotations

import importlib
import json
import os
import sys
import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoints"
STEPS = 3


def unpack(model: str, destination: Path) -> Path:
    """Extract the checkpoints of a recorded model; returns the directory that holds one subdirectory per layout."""
    with tarfile.open(GOLDEN / model / "checkpoints.tar.xz") as archive:
        archive.extractall(destination / model, filter="data")
    return destination / model


def command_line(model: str, layout: str) -> list[str]:
    """The flags v0.9 ran that layout with; there is one model stack here, and no data is read."""
    config = json.loads((GOLDEN / model / "config.json").read_text())
    cli = [*config["cli"], *config["layouts"][layout]]
    return [flag for flag in cli if flag not in ("--use-legacy-models", "--mock-data")]


def run(model: str, cli: Sequence[str]) -> dict[str, Any]:
    """Load as an entry script does; then evaluate the recorded batch and take a few steps on it.

    Returns iteration and consumed samples after loading, and per rank: its place "t0p0e0d0", logits [b, s, V] (on the
    last stage, else None), the gradient norm of every parameter at the first step, (losses, gradient norm) per step.
    """
    os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK="0")
    kind = "bert" if "bert" in model else "t5" if "t5" in model else "gpt"
    script = importlib.import_module(f"pretrain_{kind}")
    from megatron.core import parallel_state as mpu
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.enums import ModelType
    from megatron.core.utils import get_model_config
    from megatron.training import get_args
    from megatron.training.initialize import initialize_megatron
    from megatron.training.setup import setup_model_and_optimizer
    from megatron.training.step import train_step

    ranks = {}
    if kind == "t5":
        ranks["get_embedding_ranks"] = script.t5_embedding_ranks
        ranks["get_position_embedding_ranks"] = script.t5_position_embedding_ranks
    with mock.patch.object(sys, "argv", ["run", *cli]):
        initialize_megatron(**ranks)
    args = get_args()
    model_type = ModelType.encoder_and_decoder if kind == "t5" else ModelType.encoder_or_decoder
    chunks, optimizer, scheduler = setup_model_and_optimizer(script.model_provider, model_type)
    loaded = {"iteration": args.iteration, "samples": args.consumed_train_samples}
    batch = {name: torch.from_numpy(value) for name, value in np.load(GOLDEN / model / "batch.npz").items()}
    if model == "legacy_t5":
        # v0.9's first T5 did not hand its cross-attention the mask: it looked at the encoder's padding.
        batch["enc_dec_mask"] = torch.ones_like(batch["enc_dec_mask"])
    logits = _logits(kind, chunks, batch, args)

    norms: dict[str, float] = {}

    def keep_norms(*arguments: Any, **options: Any) -> None:
        finalize_model_grads(*arguments, **options)
        if not norms:
            for index, chunk in enumerate(chunks):
                prefix = f"{index}/" if len(chunks) > 1 else ""
                for name, parameter in chunk.module.named_parameters():
                    norms[prefix + name] = parameter.main_grad.norm().item()

    config = get_model_config(chunks[0])
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = keep_norms
    rows = []
    for _ in range(STEPS):
        losses, skipped, norm, _ = train_step(
            partial(_forward_step, kind), _batches(batch, chunks), chunks, optimizer, scheduler, config
        )
        assert not skipped, "a step was left out"
        rows.append(({name: float(value) for name, value in losses.items()}, float(norm)))
    expert = mpu.get_expert_model_parallel_rank()
    return {
        **loaded,
        "place": f"t{mpu.get_tensor_model_parallel_rank()}p{mpu.get_pipeline_model_parallel_rank()}e{expert}"
        f"d{mpu.get_data_parallel_rank()}",
        "logits": None if logits is None else logits.numpy(),
        "norms": norms,
        "rows": rows,
    }


def _batches(batch: dict[str, Tensor], chunks: list[torch.nn.Module]) -> Any:
    """The same batch over and over, as the schedules want it."""
    iterators = [iter(lambda: batch, None) for _ in chunks]
    return iterators if len(chunks) > 1 else iterators[0]


def _logits(kind: str, chunks: list[torch.nn.Module], batch: dict[str, Tensor], args: Any) -> Tensor | None:
    """Logits of the whole vocabulary on the last stage, by the pipeline's own schedule."""
    from megatron.core import parallel_state as mpu
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    found: list[Tensor] = []

    def keep(output: Any) -> tuple[Tensor, dict[str, Tensor]]:
        found.append((output[0] if kind == "bert" else output).detach())
        return found[-1].sum(), {}

    def step(iterator: Any, chunk: Any) -> Any:
        return _forward(kind, chunk, next(iterator), labelled=False), keep

    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=step, data_iterator=_batches(batch, chunks), model=chunks,
            num_microbatches=get_num_microbatches(), seq_length=args.seq_length,
            micro_batch_size=args.micro_batch_size, decoder_seq_length=args.decoder_seq_length, forward_only=True,
        )  # fmt: skip
    for chunk in chunks:
        chunk.train()
    if not found:
        return None
    group = mpu.get_tensor_model_parallel_group()
    parts = [torch.empty_like(found[0]) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, found[0].contiguous(), group=group)
    return torch.cat(parts, dim=-1)


def _forward(kind: str, chunk: Any, batch: dict[str, Tensor], labelled: bool) -> Any:
    labels = batch["labels"] if labelled else None
    if kind == "bert":
        return chunk(batch["tokens"], batch["padding_mask"], tokentype_ids=batch["types"], lm_labels=labels)
    if kind == "t5":
        masks = [batch[name] < 0.5 for name in ("enc_mask", "dec_mask", "enc_dec_mask")]
        return chunk(batch["text_enc"], batch["text_dec"], *masks, lm_labels=labels)
    positions = torch.arange(batch["tokens"].shape[1]).expand_as(batch["tokens"])
    return chunk(batch["tokens"], positions, None, labels=labels)


def _forward_step(kind: str, iterator: Any, chunk: Any) -> tuple[Any, Any]:
    batch = next(iterator)
    return _forward(kind, chunk, batch, labelled=True), partial(_loss, kind, batch)


def _loss(kind: str, batch: dict[str, Tensor], output: Any) -> tuple[Tensor, dict[str, Tensor]]:
    mask = batch["loss_mask"]
    per_token = output[0] if kind == "bert" else output
    loss = (per_token.float() * mask).sum() / mask.sum()
    if kind == "bert":
        order = torch.nn.functional.cross_entropy(output[1], batch["is_random"])
        return loss + order, {"lm_loss": loss.detach(), "sop_loss": order.detach()}
    return loss, {"loss": loss.detach()}
