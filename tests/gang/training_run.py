"""A short training run inside a gang worker: the recorded optimizer fixture's model, its batch, real save and load."""

from __future__ import annotations

import json
import os
import sys
import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoints" / "opt"


def recorded_cli() -> list[str]:
    """The command line of the recorded runs, without batch size and format."""
    return json.loads((GOLDEN / "config.json").read_text())["cli"]


def unpack(destination: Path) -> Path:
    """Extract the recorded checkpoints; returns the directory that holds one subdirectory per variant."""
    with tarfile.open(GOLDEN / "checkpoints.tar.xz") as archive:
        archive.extractall(destination, filter="data")
    return destination


def run(cli: Sequence[str], steps: int, save_at: Sequence[int] = (), seed_shift: int = 0) -> dict[str, Any]:
    """Set up as an entry script does, take `steps` steps on the recorded batch, saving at the iterations of `save_at`.

    Returns iteration, (loss, gradient norm) per step, and a digest of parameters and random state at the end.
    """
    os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()), LOCAL_RANK="0")
    sys.argv = ["run", *cli]
    from megatron.core.enums import ModelType
    from megatron.core.utils import get_model_config
    from megatron.training import get_args
    from megatron.training.async_utils import maybe_finalize_async_save
    from megatron.training.checkpointing import save_checkpoint
    from megatron.training.initialize import initialize_megatron
    from megatron.training.setup import setup_model_and_optimizer
    from megatron.training.step import train_step
    from pretrain_gpt import model_provider

    initialize_megatron()
    args = get_args()
    torch.manual_seed(torch.initial_seed() + seed_shift)
    model, optimizer, scheduler = setup_model_and_optimizer(model_provider, ModelType.encoder_or_decoder)
    config = get_model_config(model[0])
    config.grad_scale_func = optimizer.scale_loss
    from megatron.core.distributed import finalize_model_grads

    config.finalize_model_grads_func = finalize_model_grads
    batch = {name: torch.from_numpy(value) for name, value in np.load(GOLDEN / "batch.npz").items()}
    iteration = args.iteration
    if iteration in save_at:
        save_checkpoint(iteration, model, optimizer, scheduler, 1e9)
    trajectory = []
    for _ in range(steps):
        for chunk in model:
            chunk.train()
        iterators = [iter(lambda: batch, None) for _ in model]
        losses, _, norm, _ = train_step(
            _forward_step, iterators if len(model) > 1 else iterators[0], model, optimizer, scheduler, config
        )
        iteration += 1
        args.iteration = iteration
        args.consumed_train_samples += args.global_batch_size
        loss = losses.get("lm loss")
        trajectory.append((None if loss is None else float(loss), float(norm)))
        maybe_finalize_async_save()
        if iteration in save_at:
            if hasattr(model[0], "disable_forward_pre_hook") and args.overlap_param_gather:
                optimizer.disable_pre_hook()
            save_checkpoint(iteration, model, optimizer, scheduler, 1e9)
    maybe_finalize_async_save(blocking=True)
    digest = [p.detach().double().sum().item() for chunk in model for p in chunk.parameters()]
    return {
        "iteration": iteration,
        "trajectory": trajectory,
        "digest": digest,
        "rng": torch.get_rng_state().sum().item(),
        "samples": args.consumed_train_samples,
        "lr": optimizer.param_groups[0]["lr"],
    }


def _forward_step(iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
    batch = next(iterator)
    positions = torch.arange(batch["tokens"].shape[1]).expand_as(batch["tokens"])
    output = model(batch["tokens"], positions, None, labels=batch["labels"])
    return output, partial(_loss, batch["loss_mask"])


def _loss(mask: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = (output.float() * mask).sum() / mask.sum()
    return loss, {"lm loss": loss.detach()}
