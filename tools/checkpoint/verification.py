"""Does the written model compute what the read one does? Random tokens, layer by layer, in fp32.

The logits of a large model are dozens, of which fp32 has no five digits behind the point. Where it leaves more than the
tolerance, both models run once more in float64, and that decides.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

from megatron.core.errors import CheckpointError
from tools.checkpoint.streamed_model import double_precision

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
    largest, scale = _compare(source, target, tokens, vocabulary)
    how, note = "fp32", ""
    if not largest <= TOLERANCE:
        how, note = "float64", f"; fp32's rounding leaves {largest:.2e}"
        with double_precision():
            largest, scale = _compare(source, target, tokens, vocabulary)
    verdict = "verified" if largest <= TOLERANCE else "NOT verified"
    print(
        f"{verdict} on {tokens.numel()} random tokens in {how}: max |dlogit| {largest:.2e} "
        f"(logits up to {scale:.1f}, allowed {TOLERANCE:.0e}{note})"
    )
    if not largest <= TOLERANCE:
        raise CheckpointError(
            args.save_dir,
            f"the written model computes other logits than the one read (max |dlogit| {largest:.2e})",
            "do not use it; --no-verify skips this check",
        )


def _compare(source: Any, target: Any, tokens: torch.Tensor, vocabulary: int) -> tuple[float, float]:
    """(largest difference of the models' logits, largest logit)."""
    largest = scale = 0.0
    for ours, theirs in zip(source.logits(tokens), target.logits(tokens)):
        width = min(ours.shape[-1], theirs.shape[-1], max(vocabulary, 2))
        ours, theirs = ours[..., :width], theirs[..., :width]
        # Not a number is larger than any number.
        largest = max(largest, (ours - theirs).abs().nan_to_num(nan=torch.inf).max().item())
        scale = max(scale, ours.abs().max().item())
    return largest, scale
