"""Optimizer shards of grouped experts in distributed checkpoints.

A distributed optimizer owns a slice of a grouped weight as it lies in memory, [e, rows, parts * columns], one after the
other. What it owns of one expert's part (gate or value of a gated projection) is one run of that part's own
[rows, columns], so a slice is stored as at most one piece for each expert and part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory


@dataclass
class GroupedCell:
    """One expert's block [rows, parts * columns] of a grouped weight."""

    rows: int
    columns: int
    parts: int

    def runs(self, owned: slice) -> Iterator[tuple[int, int, int, list[slice]]]:
        """For each expert in an owned slice: its index, where the slice begins in its first row, how many elements there
        are, and the run of each part in that part's [rows, columns].
        """
        width = self.parts * self.columns
        size = self.rows * width
        for expert in range(owned.start // size, -(-owned.stop // size)):
            begin, end = max(owned.start - expert * size, 0), min(owned.stop - expert * size, size)
            ends = [
                [at // width * self.columns + min(max(at % width - part * self.columns, 0), self.columns)
                 for at in (begin, end)]
                for part in range(self.parts)
            ]  # fmt: skip
            yield expert, begin % width, end - begin, [slice(*run) for run in ends]

    def cut(self, data: Tensor, lead: int) -> list[Tensor]:
        """Elements of one expert, the first of them in column `lead`, as the run of each part."""
        width = self.parts * self.columns
        whole = torch.nn.functional.pad(data, (lead, -(lead + data.numel()) % width)).view(-1, width)
        inside = torch.zeros_like(whole, dtype=torch.bool)
        inside.view(-1)[lead : lead + data.numel()] = True
        pairs = zip(whole.chunk(self.parts, dim=1), inside.chunk(self.parts, dim=1))
        return [block[mine] for block, mine in pairs]

    def join(self, runs: list[Tensor], lead: int, count: int) -> Tensor:
        """The inverse of `cut`."""
        width = self.parts * self.columns
        whole = runs[0].new_zeros(-(-(lead + count) // width), width)
        inside = torch.zeros_like(whole, dtype=torch.bool)
        inside.view(-1)[lead : lead + count] = True
        for block, mine, run in zip(whole.chunk(self.parts, dim=1), inside.chunk(self.parts, dim=1), runs):
            block[mine] = run
        return whole.view(-1)[lead : lead + count]


@dataclass
class GroupedWeight(ShardedTensorFactory):
    """A grouped weight: whole as `build_fn` says, a slice of it as runs of its experts' parts.

    `experts` are the model's number of the first local expert and how many the model has, along `expert_axis`;
    `offsets[part]` place that part on all other axes.
    """

    cell: GroupedCell = field(kw_only=True)
    expert_axis: int = field(kw_only=True)
    experts: tuple[int, int] = field(kw_only=True)
    offsets: tuple[tuple[tuple[int, int, int], ...], ...] = field(kw_only=True)

    def build(self) -> Any:
        """The pieces of the whole weight, or of the slice in `flattened_range`."""
        if self.flattened_range is None:
            return super().build()
        pieces, taken = [], 0
        first, total = self.experts
        for expert, lead, count, runs in self.cell.runs(self.flattened_range):
            blocks = self.cell.cut(self.data[taken : taken + count], lead)
            taken += count
            pieces += [
                ShardedTensor.from_rank_offsets_flat(
                    # Not transposed as the weight itself is, and so no other kind of experts can mistake it.
                    f"{self.key}.grouped",
                    block,
                    (self.cell.rows, self.cell.columns),
                    *place,
                    (self.expert_axis, first + expert, total),
                    replica_id=self.replica_id,
                    prepend_axis_num=self.expert_axis + 1,
                    flattened_range=run,
                )
                for block, run, place in zip(blocks, runs, self.offsets)
                if block.numel()
            ]
        return pieces

    def merge(self, loaded: Any) -> Tensor:
        """What the pieces of `build` hold after loading, as the weight or slice they were cut from."""
        if self.flattened_range is None:
            return super().merge(loaded)
        pieces, experts = iter(loaded), []
        for _, lead, count, runs in self.cell.runs(self.flattened_range):
            blocks = [next(pieces) if run.stop > run.start else loaded[0][:0] for run in runs]
            experts.append(self.cell.join(blocks, lead, count))
        return torch.cat(experts)
