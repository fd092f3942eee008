"""Are the replicas still replicas? Hashes of parameters compared over the data-parallel ranks."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import device, parallel_state
from megatron.core.collectives import all_gather_single

_HASH_BYTES = 32


def _digest(tensor: Tensor) -> Tensor:
    """SHA-256 of a tensor's bytes, uint8 [32] on the device."""
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return torch.tensor(list(hashlib.sha256(data.data).digest()), dtype=torch.uint8, device=device.current())


def _named(parameters: Iterable[tuple[str, Tensor]], expert: bool) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in parameters if getattr(value, "allreduce", True) != expert]


def differing_parameters(model: list[torch.nn.Module]) -> Iterator[tuple[str, list[int]]]:
    """Name and global ranks of every parameter that is not equal on all its replicas (x context ranks).

    Ranks listed differ from the first rank of the group. All ranks of the data-parallel groups must call.
    """
    groups = parallel_state.get_current()
    for chunk, module in enumerate(model):
        for expert, kind in ((False, "dp_cp"), (True, "dp_modulo_ep_cp")):
            named = _named(module.named_parameters(), expert)
            if not named or groups.size(kind) == 1:
                continue
            mine = torch.stack([_digest(value) for _, value in named])
            everyone = mine.new_empty((groups.size(kind), *mine.shape))
            all_gather_single(everyone, mine.unsqueeze(0), group=getattr(groups, kind))
            differs = (everyone != everyone[0]).any(dim=-1)  # [replicas, parameters]
            for index, (name, _) in enumerate(named):
                if differs[:, index].any():
                    ranks = [
                        groups.ranks[kind][replica]
                        for replica in differs[:, index].nonzero().flatten().tolist()
                    ]
                    yield (f"chunk {chunk}: {name}" if len(model) > 1 else name), ranks


def check_param_hashes_across_dp_replicas(model: list[torch.nn.Module], cross_check: bool = False) -> bool:
    """True if every parameter of this rank equals its copy on the first replica.

    With cross_check: if all parameters are equal on all replicas. What differs is logged with name and ranks. All
    ranks of the data-parallel groups must call.
    """
    logger = logging.getLogger(__name__)
    own, all_equal = True, True
    for name, ranks in differing_parameters(model):
        all_equal = False
        if dist.get_rank() in ranks:
            own = False
            logger.info(f"[Rank {dist.get_rank()}] Hash not matching for {name}; differs on ranks {ranks}")
    return all_equal if cross_check else own


def log_on_each_pipeline_stage(logger: logging.Logger, *args: Any, **kwargs: Any) -> None:
    """`logger.log(*args)` on one rank of each pipeline stage: the first of its tensor, data and context ranks."""
    groups = parallel_state.get_current()
    if groups.rank("dp_cp") == 0 and groups.rank("tp") == 0:
        logger.log(*args, **kwargs)
