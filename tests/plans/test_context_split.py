"""Which tokens a context-parallel rank holds, and which tiles of the attention it computes, by brute force."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch

from megatron.core.context_parallel.ring import Visibility, tiles
from megatron.core.context_parallel.split import document_runs, indices, runs

S = 48
EDGES = (0, 5, 5, 17, 30, 48)
VISIBILITIES = [
    Visibility(causal=causal, window=window, edges=edges)
    for causal, window, edges in product(
        (False, True), ((-1, -1), (4, 0), (7, -1), (0, 3), (-1, 5)), (None, EDGES)
    )
]


def _visible(query: int, key: int, rule: Visibility) -> bool:
    left, right = rule.window
    return (
        not (rule.causal and key > query)
        and not (left >= 0 and query - key > left)
        and not (right >= 0 and key - query > right)
        and not (
            rule.edges is not None
            and sum(edge <= query for edge in rule.edges) != sum(edge <= key for edge in rule.edges)
        )
    )


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_token_has_one_home_and_causal_work_is_even(size: int) -> None:
    held = [indices(S, size, rank).tolist() for rank in range(size)]
    assert sorted(token for tokens in held for token in tokens) == list(range(S))
    assert all(tokens == sorted(tokens) for tokens in held)
    assert len({sum(token + 1 for token in tokens) for tokens in held}) == 1  # keys seen under a causal mask


@pytest.mark.parametrize("size", [2, 3])
def test_documents_are_cut_one_by_one(size: int) -> None:
    edges = [0, 12, 12, 36, 48]
    held: list[list[int]] = []
    for rank in range(size):
        found = document_runs(edges, size, rank)
        assert [run.local for run in found] == [sum(r.length for r in found[:i]) for i in range(len(found))]
        held.append([token for run in found for token in range(run.start, run.stop)])
        for first, last in pairwise(edges):
            assert sum(first <= token < last for token in held[-1]) * size == last - first
    assert sorted(token for tokens in held for token in tokens) == list(range(48))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("tile", [1, 3, 128])
def test_tiles_hold_every_visible_pair_once(size: int, tile: int) -> None:
    homes = [runs(S, size, rank) for rank in range(size)]
    places = [indices(S, size, rank) for rank in range(size)]
    for rule in VISIBILITIES:
        covered = torch.zeros(S, S, dtype=torch.int64)
        whole = torch.tensor([[_visible(query, key, rule) for key in range(S)] for query in range(S)])
        assert torch.equal(~rule.hidden(torch.arange(S), torch.arange(S)), whole)
        for mine, theirs in product(range(size), repeat=2):
            for each in tiles(homes[mine], homes[theirs], rule, tile):
                rows, columns = places[mine][each.rows], places[theirs][each.columns]
                assert rows[0] == each.row_start and columns[0] == each.column_start
                assert len(rows) <= tile and torch.equal(columns, torch.arange(columns[0], columns[-1] + 1))
                block = whole[rows][:, columns]
                assert block.any(), "a tile without anything to see is not computed"
                assert each.partial or block.all(), "a tile with something hidden says so"
                covered[rows.unsqueeze(1), columns] += 1
        assert torch.equal(covered.bool() & whole, whole) and covered.max() <= 1
