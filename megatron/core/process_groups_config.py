"""The process groups of one layout, as a value; the only place that creates groups.

Modules take a `ProcessGroupCollection` (keyword `pg_collection`, None = the current one) and read from it the
groups they need. A collection without processes (`ProcessGroupCollection()`) stands for a single rank: every group
is None, every size 1, every rank 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron.core.topology import GROUP_AXES, Layout

#: Kinds that share one group where their rank lists are equal, since each nccl communicator costs device memory and
#: each gloo group threads. Within a family no two transfers are meant to overlap; across families they are (gradient
#: reduction beside ring attention or expert exchange), or the members run different programs (pipeline stages), and
#: a common queue would delay or even block them.
_FAMILIES = {
    "tp": "tensor",
    "tp_cp": "tensor",
    "tp_ep": "tensor",
    "dp": "replicas",
    "dp_cp": "replicas",
    "dp_modulo_ep": "replicas",
    "dp_modulo_ep_cp": "replicas",
    "tp_dp": "norms",
    "tp_dp_cp": "norms",
}

#: Kinds that also exist on gloo, for checkpoint traffic in host memory.
_ON_GLOO = ("dp", "dp_cp", "dp_modulo_ep", "dp_modulo_ep_cp")

KINDS = (*GROUP_AXES, "embd", "pos_embd")

OptionsFor = Callable[[str], Any]


def group_size(group: ProcessGroup | None) -> int:
    """Number of ranks in a group; no group means this rank alone."""
    return 1 if group is None else group.size()


def group_rank(group: ProcessGroup | None) -> int:
    """This rank's index in a group it belongs to."""
    return 0 if group is None else group.rank()


@dataclass
class ProcessGroupCollection:
    """Every group this rank belongs to, by the axes it spans, and the global ranks of each.

    pp, embd and pos_embd: in a layout where one encoder rank feeds several decoder pipelines that rank belongs to
    several; the field holds the first and `all_pipelines` all of them. `embd`/`pos_embd` are None on ranks
    without an embedding.
    """

    tp: ProcessGroup | None = None
    pp: ProcessGroup | None = None
    mp: ProcessGroup | None = None
    cp: ProcessGroup | None = None
    dp: ProcessGroup | None = None
    dp_cp: ProcessGroup | None = None
    tp_cp: ProcessGroup | None = None
    tp_dp: ProcessGroup | None = None
    tp_dp_cp: ProcessGroup | None = None
    embd: ProcessGroup | None = None
    pos_embd: ProcessGroup | None = None
    ep: ProcessGroup | None = None
    tp_ep: ProcessGroup | None = None
    tp_ep_pp: ProcessGroup | None = None
    dp_modulo_ep: ProcessGroup | None = None
    dp_modulo_ep_cp: ProcessGroup | None = None
    dp_gloo: ProcessGroup | None = None
    dp_cp_gloo: ProcessGroup | None = None
    dp_modulo_ep_gloo: ProcessGroup | None = None
    dp_modulo_ep_cp_gloo: ProcessGroup | None = None
    #: Group kind -> the global ranks of this rank's group, whether or not it is a member (embd, pos_embd).
    ranks: dict[str, list[int]] = field(default_factory=dict)
    layout: Layout | None = None
    #: (group, ranks) of every pipeline through this rank.
    all_pipelines: list[tuple[ProcessGroup | None, list[int]]] = field(default_factory=list)
    #: Sizes and ranks set by hand, for tools that build one rank's model shard without processes.
    assumed_sizes: dict[str, int] = field(default_factory=dict)
    assumed_ranks: dict[str, int] = field(default_factory=dict)

    def size(self, kind: str) -> int:
        """Ranks in the group of this kind, e.g. `"tp"`."""
        return self.assumed_sizes.get(kind, group_size(getattr(self, kind)))

    def rank(self, kind: str) -> int:
        """This rank's index in the group of this kind."""
        return self.assumed_ranks.get(kind, group_rank(getattr(self, kind)))

    def destroy(self) -> None:
        """Close every group. All ranks must call; nothing happens if torch.distributed has already ended."""
        if not dist.is_initialized():
            return
        opened = {
            id(group): group
            for group in (
                *(getattr(self, entry.name) for entry in fields(self)),
                *(pipeline for pipeline, _ in self.all_pipelines),
            )
            if isinstance(group, ProcessGroup)
        }
        for group in opened.values():
            with contextlib.suppress(ValueError):  # it ended with an earlier world
                dist.destroy_process_group(group)


def create(
    layout: Layout,
    timeout: timedelta | None = None,
    options_for: OptionsFor | None = None,
) -> ProcessGroupCollection:
    """Open every group of a layout. All ranks of the world must call, with equal arguments.

    options_for maps a group kind to backend options (nccl communicator settings) or None.
    """
    me = dist.get_rank()
    gloo_world = dist.get_backend() == "gloo"
    opened: dict[tuple[Any, ...], ProcessGroup | None] = {}

    def open_group(ranks: list[int], kind: str, backend: str | None = None) -> ProcessGroup | None:
        options = options_for(kind) if options_for is not None and backend is None else None
        # A group of one never communicates, so one per rank serves all kinds.
        family = "alone" if len(ranks) == 1 else kind if options is not None else _FAMILIES.get(kind, kind)
        key = (tuple(ranks), backend, family)
        if key not in opened:
            member = dist.new_group(ranks, timeout=timeout, backend=backend, pg_options=options)
            opened[key] = member if me in ranks else None
        return opened[key]

    result = ProcessGroupCollection(layout=layout)
    pipelines = layout.groups("pp")
    for kind in KINDS:
        groups = layout.groups(kind)
        # A stage without an embedding still knows which ranks of its pipeline have one.
        concerned = pipelines if kind in ("embd", "pos_embd") else groups
        for ranks, audience in zip(groups, concerned):
            group = open_group(ranks, kind)
            mine = me in audience
            if kind == "pp" and mine:
                result.all_pipelines.append((group, ranks))
            if mine and kind not in result.ranks:
                result.ranks[kind] = ranks
            if me in ranks and getattr(result, kind) is None:
                setattr(result, kind, group)
    for kind in _ON_GLOO:
        if gloo_world:
            setattr(result, f"{kind}_gloo", getattr(result, kind))
            continue
        for ranks in layout.groups(kind):
            group = open_group(ranks, kind, backend="gloo")
            if me in ranks:
                setattr(result, f"{kind}_gloo", group)
    return result
