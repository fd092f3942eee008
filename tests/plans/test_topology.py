"""Rank lists against a brute-force definition: two ranks share a group iff they agree on every axis it leaves out."""

from __future__ import annotations

from itertools import permutations, product

import pytest

from megatron.core.topology import (
    GROUP_AXES,
    Layout,
    RankGenerator,
    default_embedding_ranks,
    default_position_embedding_ranks,
)

AXES = ("tp", "cp", "ep", "dp", "pp")
ORDERS = ["-".join(order) for order in permutations(AXES)]


def _coordinates(rank: int, sizes: dict[str, int], order: list[str]) -> dict[str, int]:
    """The definition: walk the axes in order, each taking its remainder."""
    place = {}
    for axis in order:
        place[axis] = rank % sizes[axis]
        rank //= sizes[axis]
    return place


def _brute_force(sizes: dict[str, int], order: list[str], token: str) -> list[list[int]]:
    world = 1
    for axis in order:
        world *= sizes[axis]
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(world):
        place = _coordinates(rank, sizes, order)
        outside = tuple(place[axis] for axis in order if axis not in token.split("-"))
        groups.setdefault(outside, []).append(rank)
    return list(groups.values())


def _small_sizes() -> list[tuple[int, ...]]:
    return [sizes for sizes in product((1, 2, 3), repeat=5) if 1 < _numel(sizes) <= 12]


def _numel(sizes: tuple[int, ...]) -> int:
    product_ = 1
    for size in sizes:
        product_ *= size
    return product_


@pytest.mark.parametrize("order", ORDERS)
def test_groups_agree_on_the_axes_they_leave_out(order: str) -> None:
    names = order.split("-")
    for tp, cp, ep, outer, pp in _small_sizes():
        grid = RankGenerator(tp=tp, ep=ep, dp=ep * outer, pp=pp, cp=cp, order=order)
        cut = {"tp": tp, "cp": cp, "ep": ep, "dp": outer, "pp": pp}
        whole = {**cut, "dp": ep * outer}
        dense = [name for name in names if name != "ep"]
        for token, with_experts in GROUP_AXES.values():
            expected = _brute_force(cut, names, token) if with_experts else _brute_force(whole, dense, token)
            found = grid.get_ranks(token, independent_ep=with_experts)
            assert sorted(found) == sorted(expected), (token, tp, cp, ep, outer, pp)
            assert all(group == sorted(group) for group in found)


def test_known_layouts() -> None:
    """Lists written down by hand: 16 ranks, tp 2, pp 4, dp 2 (the example of the first Megatron-LM release)."""
    layout = Layout(world_size=16, tp=2, pp=4)
    assert layout.groups("tp") == [[2 * i, 2 * i + 1] for i in range(8)]
    assert layout.groups("pp") == [[i, i + 4, i + 8, i + 12] for i in range(4)]
    assert layout.groups("dp") == [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]]
    assert layout.groups("mp") == [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]
    assert layout.groups("embd") == [[i, i + 12] for i in range(4)]
    assert layout.groups("pos_embd") == [[0], [1], [2], [3]]
    swapped = Layout(world_size=16, tp=2, pp=4, order="tp-pp-dp")
    assert swapped.groups("pp") == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]]
    assert swapped.groups("dp") == [[i, i + 8] for i in range(8)]


def test_experts_divide_the_data_axis() -> None:
    layout = Layout(world_size=8, tp=2, ep=2)
    assert layout.groups("dp") == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert layout.groups("ep") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert layout.groups("dp_modulo_ep") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert layout.groups("tp_ep") == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_embedding_ranks_include_the_split() -> None:
    assert default_embedding_ranks([7]) == [7]
    assert default_embedding_ranks([0, 4, 8, 12]) == [0, 12]
    assert default_embedding_ranks([0, 4, 8, 12], split_rank=2) == [0, 8, 12]
    assert default_embedding_ranks([0, 4, 8, 12], split_rank=3) == [0, 12]
    assert default_position_embedding_ranks([0, 4, 8, 12], split_rank=2) == [0, 8]
    assert default_position_embedding_ranks([0, 4], split_rank=0) == [0]


ENCODER_LAYOUTS = [
    (world, tp, pp, cp, dp, encoder_tp, encoder_pp)
    for tp, pp, cp, dp, encoder_tp, encoder_pp in product(
        (1, 2, 4), (1, 2), (1, 2), (1, 2), (0, 1, 2), (1, 2)
    )
    if encoder_tp <= tp and (not encoder_tp or tp % encoder_tp == 0)
    for world in [dp * (tp * pp * cp + (encoder_tp or tp) * encoder_pp * cp)]
]


@pytest.mark.parametrize("order", ["tp-cp-ep-dp-pp", "tp-pp-dp-cp", "dp-tp-cp-pp"])
def test_pipelines_join_encoder_and_decoder_of_one_replica(order: str) -> None:
    for world, tp, pp, cp, dp, encoder_tp, encoder_pp in ENCODER_LAYOUTS:
        layout = Layout(
            world_size=world, tp=tp, pp=pp, cp=cp, encoder_tp=encoder_tp, encoder_pp=encoder_pp, order=order
        )
        assert layout.dp == dp
        pipelines = layout.groups("pp")
        assert len(pipelines) == tp * cp * dp
        ratio = tp // (encoder_tp or tp)
        for ranks in pipelines:
            places = [layout.coordinates(rank) for rank in ranks]
            assert [place["pp"] for place in places] == list(range(encoder_pp + pp))
            assert len({(place["dp"], place["cp"]) for place in places}) == 1
            last_tp = places[-1]["tp"]
            assert all(place["tp"] == last_tp for place in places[encoder_pp:])
            assert all(place["tp"] == last_tp // ratio for place in places[:encoder_pp])
        assert {rank for ranks in pipelines for rank in ranks} == set(range(world))
        for kind in ("tp", "dp", "cp", "dp_cp", "tp_cp", "tp_dp_cp"):
            covered = sorted(rank for ranks in layout.groups(kind) for rank in ranks)
            assert covered == list(range(world)), kind
        assert sorted({rank for ranks in layout.groups("mp") for rank in ranks}) == list(range(world))
        for ranks in layout.groups("mp"):
            assert len({layout.coordinates(rank)["dp"] for rank in ranks}) == 1


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"world_size": 6, "tp": 4}, "world size .6. is not divisible"),
        ({"world_size": 4, "ep": 3}, "expert-parallel size"),
        ({"world_size": 4, "tp": 0}, "at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int], text: str) -> None:
    with pytest.raises(RuntimeError, match=text):
        Layout(**sizes)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"world_size": 4, "encoder_tp": 1}, "encoder_pipeline"),
        ({"world_size": 6, "tp": 2, "encoder_tp": 4, "encoder_pp": 1}, "must divide"),
    ],
)
def test_an_encoder_that_does_not_fit_fails_an_assertion_as_in_v09(sizes: dict[str, int], text: str) -> None:
    with pytest.raises(AssertionError, match=text):
        Layout(**sizes)


def test_orders_must_place_every_axis_in_use() -> None:
    assert RankGenerator(2, 1, 1, 1, 1, "tp").order == "tp-pp-dp-ep-cp"
    with pytest.raises(RuntimeError, match="does not say where"):
        RankGenerator(2, 1, 2, 1, 1, "tp-pp")
    with pytest.raises(RuntimeError, match="at most once"):
        RankGenerator(2, 1, 2, 1, 1, "tp-dp-tp")
