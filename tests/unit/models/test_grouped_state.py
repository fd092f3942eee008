"""Slices of grouped experts' weights, as a distributed optimizer owns them, against plain indexing."""

from __future__ import annotations

import pytest
import torch

from megatron.core.transformer.moe.grouped_state import GroupedCell, GroupedWeight

EXPERTS, ROWS, COLUMNS = 2, 3, 2


@pytest.mark.parametrize("parts", [1, 2])
def test_every_slice_is_stored_as_runs_of_its_experts_parts(parts: int) -> None:
    """The pieces are what indexing gives, lie where they say, and join to the slice again."""
    cell = GroupedCell(ROWS, COLUMNS, parts)
    offsets = tuple(((0, 1, 4), (3, 1 + part * 3, 3 * parts)) for part in range(parts))
    count = EXPERTS * ROWS * COLUMNS * parts
    memory = torch.arange(float(count))
    blocks = memory.view(EXPERTS, ROWS, parts, COLUMNS)
    for begin in range(count):
        for end in range(begin + 1, count + 1):
            weight = GroupedWeight(
                "weight", memory[begin:end], None, None, flattened_range=slice(begin, end),
                cell=cell, expert_axis=1, experts=(2, 6), offsets=offsets,
            )  # fmt: skip
            pieces = weight.build()
            assert sum(piece.data.numel() for piece in pieces) == end - begin
            for piece in pieces:
                layer, expert, row, column = piece.global_offset
                assert (layer, row) == (1, 0) and piece.global_shape == (4, 6, ROWS, 3 * parts * COLUMNS)
                part = (column // COLUMNS - 1) // 3
                stored = blocks[expert - 2, :, part].flatten()[piece.flattened_range]
                torch.testing.assert_close(piece.data, stored, rtol=0, atol=0)
            joined = weight.merge([piece.data for piece in pieces])
            torch.testing.assert_close(joined, memory[begin:end], rtol=0, atol=0)
