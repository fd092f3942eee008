"""Does the written model compute what the read one does? Random tokens, fp32, layer by layer."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

from megatron.core.errors import CheckpointError

TOLERANCE = 1e-5


def verify(loader: Any, saver: Any, args: Namespace) -> None:
    """Run both models and print the largest difference of their logits; CheckpointError if it is too large."""
    models = []
    for kind, plugin in (("loader", loader), ("saver", saver)):
        make = getattr(plugin, "verification_model", None)
        model = None if make is None else make(args)
        if model is None:
            print(f"not verified: the {kind} {plugin.__name__} has no model to run")
            return
        models.append(model)
    source, target = models
    source.overrides.update(getattr(target, "source_overrides", {}))
    vocabulary = min(size for size in (source.vocabulary, target.vocabulary) if size)
    length = min(source.positions, target.positions, 32)
    tokens = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
    largest = scale = 0.0
    for ours, theirs in zip(source.logits(tokens), target.logits(tokens)):
        width = min(ours.shape[-1], theirs.shape[-1], max(vocabulary, 2))
        ours, theirs = ours[..., :width], theirs[..., :width]
        largest = max(largest, (ours - theirs).abs().max().item())
        scale = max(scale, ours.abs().max().item())
    # Rounding grows with the logits themselves: large models have logits of dozens.
    allowed = TOLERANCE * max(1.0, scale)
    print(
        f"verified on {tokens.numel()} random tokens in fp32: max |dlogit| {largest:.2e} "
        f"(logits up to {scale:.1f}, allowed {allowed:.0e})"
    )
    if not largest <= allowed:
        raise CheckpointError(
            args.save_dir,
            f"the written model computes other logits than the one read (max |dlogit| {largest:.2e})",
            "do not use it; --no-verify skips this check",
        )
