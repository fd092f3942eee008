"""Bucket and shard layouts: v0.9's recorded ones, and the rules themselves over all small cases."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest

from megatron.core.distributed.buckets import default_bucket_size, plan_buffer
from megatron.core.optimizer.shard_layout import Range, plan_shards

CASES = json.loads((Path(__file__).parents[1] / "golden/training/grad_buffers.json").read_text())["cases"]
RECORDED = [case for case in CASES if "REFERENCE_BUG" not in case["name"]]


def _plan(case):
    names = [name for name, _ in case["params"]]
    layout = plan_buffer(
        [math.prod(shape) for _, shape in case["params"]],
        bucket_size=case["bucket_size"],
        data_parallel_size=case["data_parallel_size"],
        sharded=case["use_distributed_optimizer"],
        own_bucket={names.index(name) for name in case["shared_embedding"]},
    )
    return names, layout


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: case["name"])
def test_layout_is_v09s(case):
    names, layout = _plan(case)
    assert (layout.numel, layout.numel_unpadded) == (case["numel"], case["numel_unpadded"])
    slots = {name: [slot.start, slot.end, slot.bucket] for name, slot in zip(names, layout.slots)}
    assert slots == case["param_index_map"]
    buckets = [
        {
            "offset": bucket.start,
            "end": bucket.end,
            "numel_unpadded": bucket.numel_unpadded,
            "params": [names[i] for i in bucket.params],
        }
        for bucket in layout.buckets
    ]
    assert buckets == [{key: bucket[key] for key in buckets[0]} for bucket in case["buckets"]]


@pytest.mark.parametrize(
    "case", [case for case in RECORDED if "rank_param_ranges" in case], ids=lambda case: case["name"]
)
def test_shards_are_v09s(case):
    names, layout = _plan(case)
    for rank, recorded in enumerate(case["rank_param_ranges"]):
        shards = plan_shards(layout, rank, case["data_parallel_size"])
        ours = [
            {
                names[piece.param]: {
                    "gbuf_world": [piece.in_buffer.start, piece.in_buffer.end],
                    "gbuf_world_in_bucket": [piece.in_bucket.start, piece.in_bucket.end],
                    "gbuf_local": [piece.in_shard.start, piece.in_shard.end],
                    "param": [piece.in_param.start, piece.in_param.end],
                }
                for piece in shard.pieces
            }
            for shard in shards
        ]
        assert ours == recorded


def test_every_small_layout_obeys_the_rules():
    """1 to 3 parameters of 8 sizes x bucket sizes x ranks x sharded or not x which parameter stands alone."""
    sizes = (1, 63, 64, 65, 127, 128, 129, 300)
    checked = 0
    for count in (1, 2, 3):
        for shape in itertools.product(sizes, repeat=count):
            for bucket_size, ranks, sharded in itertools.product((None, 1, 100), (1, 2, 3), (False, True)):
                for alone in (None, *range(count)):
                    own = set() if alone is None else {alone}
                    layout = plan_buffer(
                        shape,
                        bucket_size=bucket_size,
                        data_parallel_size=ranks,
                        sharded=sharded,
                        own_bucket=own,
                    )
                    _check(layout, shape, bucket_size, ranks, sharded, own)
                    checked += 1
    assert checked > 20_000


def _check(layout, sizes, bucket_size, ranks, sharded, own):
    order = [position for bucket in layout.buckets for position in bucket.params]
    assert order == list(reversed(range(len(sizes))))
    edge = 0
    for number, bucket in enumerate(layout.buckets):
        assert bucket.start == edge
        edge = bucket.end
        slots = [layout.slots[position] for position in bucket.params]
        assert all(slot.bucket == number for slot in slots)
        assert [slot.end - slot.start for slot in slots] == [sizes[p] for p in bucket.params]
        assert bucket.start <= slots[0].start and slots[-1].end <= bucket.end
        assert all(a.end <= b.start for a, b in itertools.pairwise(slots))
        if sharded:
            assert all(slot.start % 64 == 0 for slot in slots)
            assert bucket.start % math.lcm(ranks, 128) == 0 == bucket.end % math.lcm(ranks, 128)
            assert own.isdisjoint(bucket.params) or len(bucket.params) == 1
        else:
            assert bucket.numel == bucket.numel_unpadded == sum(sizes[p] for p in bucket.params)
        if bucket_size is not None:
            before_last = slots[-1].start - bucket.start
            assert len(slots) == 1 or before_last < bucket_size + 64, "the bucket should have closed earlier"
    assert layout.numel == edge
    if sharded:
        _check_shards(layout, sizes, ranks)


def _check_shards(layout, sizes, ranks):
    """Every element of every parameter is owned exactly once, and the four views agree."""
    owned = [[] for _ in sizes]
    for rank in range(ranks):
        for bucket, shard in zip(layout.buckets, plan_shards(layout, rank, ranks)):
            assert shard.in_buffer.size * ranks == bucket.numel
            assert shard.in_buffer.start == bucket.start + rank * shard.in_buffer.size
            for piece in shard.pieces:
                assert piece.in_bucket == piece.in_buffer.shifted(-bucket.start)
                assert piece.in_shard == piece.in_buffer.shifted(-shard.in_buffer.start)
                assert piece.in_param == piece.in_buffer.shifted(-layout.slots[piece.param].start)
                owned[piece.param].append(piece.in_param)
    for size, ranges in zip(sizes, owned):
        assert [r.start for r in ranges] == [0, *[r.end for r in ranges[:-1]]] and ranges[-1].end == size


def test_a_layout_without_padding_cannot_be_cut_unevenly():
    layout = plan_buffer([5], bucket_size=None, data_parallel_size=2, sharded=False)
    with pytest.raises(ValueError, match="sharded=True"):
        plan_shards(layout, 0, 2)


def test_default_bucket_grows_with_the_ranks():
    assert [default_bucket_size(ranks) for ranks in (1, 40, 41, 1024)] == [40e6, 40e6, 41e6, 1024e6]


def test_range_arithmetic():
    whole = Range(3, 10)
    assert (whole.size, len(whole), str(whole)) == (7, 7, "3,10 [7]")
    assert whole.normalize(2) == Range(2, 9)
    assert whole.within(Range(8, 20)) == Range(8, 10) and whole.within(Range(10, 12)) is None
