"""Which attention runs where the sequence is divided."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron.core.context_parallel.all_to_all import all_to_all_attention
from megatron.core.fusions.core_attention import AttentionSpec
from megatron.core.kernels import registry
from megatron.core.process_groups_config import group_size


def choose_attention(
    algorithm: str, spec: AttentionSpec, group: ProcessGroup | None, demand: Any = None
) -> Callable[..., Tensor]:
    """The provider (contract of fusions/core_attention.py) for `--context-parallel-algo` ring or a2a.

    demand: an implementation the user asked for by name; with a2a it is what runs between the exchanges.
    """
    if algorithm == "ring":
        return functools.partial(registry.select("core_attention", spec, demand=demand), group=group)
    if algorithm != "a2a":
        raise ValueError(f"context-parallel algorithm {algorithm!r} is neither ring nor a2a")
    size = group_size(group)
    whole = replace(
        spec,
        heads=max(1, spec.heads // size),
        groups=max(1, spec.groups // size),
        context_parallel=1,
    )
    attend = registry.select("core_attention", whole, demand=demand)
    return functools.partial(all_to_all_attention, attend=attend, group=group)
