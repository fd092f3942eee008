"""The index algorithms against recordings and against walks one sample at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron.core.datasets import helpers, index_builder
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.utils import get_blend_from_list, normalize
from megatron.core.errors import ConfigError, DataError

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "data"
UTIL = json.loads((GOLDEN / "util.json").read_text())


def recorded(pattern: str) -> list[Any]:
    return [pytest.param(path, id=path.stem) for path in sorted((GOLDEN / "helpers").glob(pattern))]


def arguments(path: Path, *outputs: str) -> dict[str, Any]:
    stored = np.load(path)
    return {
        key: stored[key] if stored[key].ndim else stored[key].item() for key in stored if key not in outputs
    }


# Recorded ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", recorded("sample_idx_*.npz"))
def test_recorded_sample_index(path: Path) -> None:
    index = helpers.build_sample_idx(**arguments(path, "out"))
    assert index.dtype == np.int64
    np.testing.assert_array_equal(index, np.load(path)["out"])


@pytest.mark.parametrize("path", recorded("mapping_*.npz"))
def test_recorded_mapping(path: Path) -> None:
    mapping = helpers.build_mapping(**arguments(path, "out"))
    assert mapping.dtype == np.uint32
    np.testing.assert_array_equal(mapping, np.load(path)["out"])


@pytest.mark.parametrize("path", recorded("blend_*.npz") + recorded("exhaustive_*.npz"))
def test_recorded_blend(path: Path) -> None:
    stored = np.load(path)
    chosen, numbers = (np.zeros_like(stored[name]) for name in ("dataset_index", "dataset_sample_index"))
    if "weights" in stored:
        size = int(stored["size"])
        helpers.build_blending_indices(
            chosen, numbers, stored["weights"], stored["weights"].size, size, False
        )
    else:
        helpers.build_exhaustive_blending_indices(chosen, numbers, stored["sizes"], stored["sizes"].size)
    np.testing.assert_array_equal(chosen, stored["dataset_index"])
    np.testing.assert_array_equal(numbers, stored["dataset_sample_index"])


@pytest.mark.parametrize("case", UTIL["split"], ids=lambda case: case["in"])
def test_recorded_split(case: dict[str, Any]) -> None:
    if "error" in case:
        with pytest.raises(ConfigError, match="--split"):
            parse_and_normalize_split(case["in"])
        return
    vector = parse_and_normalize_split(case["in"])
    assert vector == case["vector"]
    matrix = convert_split_vector_to_split_matrix(vector)
    # As JSON, because 0 and 0.0 differ in the cache key.
    assert json.dumps(matrix) == json.dumps(case["matrix"])


def test_overlap_of_two_splits() -> None:
    assert convert_split_vector_to_split_matrix([0.5, 0.5, 0.0], [0.25, 0.5, 0.25]) == [
        (0, 0.25),
        (0.5, 0.75),
        None,
    ]


@pytest.mark.parametrize("case", UTIL["blend_list"], ids=lambda case: str(case["in"]))
def test_recorded_blend_list(case: dict[str, Any]) -> None:
    if isinstance(case["out"], dict):
        with pytest.raises(ConfigError, match="--data-path"):
            get_blend_from_list(case["in"])
        return
    blend = get_blend_from_list(case["in"])
    assert (None if blend is None else list(blend)) == case["out"]


def test_weights_may_be_numbers() -> None:
    assert get_blend_from_list([1, "a", 2.5, "b"]) == (["a", "b"], [1.0, 2.5])


def test_recorded_normalize() -> None:
    for weights, expected in UTIL["normalize"]:
        assert normalize(weights) == expected
    for wrong in ([0, 0], [1, -1], [float("nan"), 1], [float("inf"), 1]):
        with pytest.raises(ConfigError, match="cannot be normalised"):
            normalize(wrong)


# Walks ------------------------------------------------------------------------------------------------------------


def walk_samples(sizes: list[int], length: int, samples: int, extra: int) -> list[tuple[int, int]] | None:
    """Take `length` tokens at a time; None where the data ends before the last sample."""
    rows, position, offset = [(0, 0)], 0, 0
    for row in range(1, samples + 1):
        remaining = length + extra
        while True:
            available = sizes[position] - offset
            remaining -= available
            if remaining <= 0:
                offset += remaining + available - extra
                break
            if position == len(sizes) - 1:
                if row < samples:
                    return None
                offset = sizes[position] - extra
                break
            position, offset = position + 1, 0
        rows.append((position, offset))
    return rows


@settings(max_examples=400, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=12),
    epochs=st.integers(1, 4),
    length=st.integers(1, 25),
    drop_last=st.booleans(),
    extra=st.integers(0, 1),
    chunk=st.sampled_from([1, 3, 1 << 17]),
    seed=st.integers(0, 99),
)
def test_sample_index_is_the_walk(
    sizes: list[int], epochs: int, length: int, drop_last: bool, extra: int, chunk: int, seed: int
) -> None:
    tokens = sum(sizes)
    assume(tokens * epochs > extra)
    order = np.tile(np.arange(len(sizes), dtype=np.int32), epochs)
    np.random.default_rng(seed).shuffle(order)
    stream = tokens * epochs - extra
    samples = stream // length if drop_last else math.ceil(stream / length)
    expected = walk_samples([sizes[i] for i in order], length, samples, extra)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_builder, "_CHUNK", chunk)
        index = index_builder.build_sample_idx(
            np.array(sizes, dtype=np.int32), order, length, epochs, tokens, drop_last, extra
        )
    assert index.tolist() == [list(row) for row in expected]


def test_sample_index_refuses_lengths_that_do_not_add_up() -> None:
    sizes, order = np.array([5, 5], dtype=np.int32), np.array([0, 1], dtype=np.int32)
    with pytest.raises(DataError, match="7 samples of 4 tokens were asked of 10 tokens"):
        index_builder.build_sample_idx(sizes, order, 4, 1, 29)
    with pytest.raises(DataError, match="1 tokens in 1 epochs cannot be cut"):
        index_builder.build_sample_idx(sizes, order, 4, 1, 1)


def test_kept_partial_sample_counts_in_single_precision() -> None:
    """The row count of v0.9 without drop_last rounds to 32 bits, so a last short sample may be missing."""
    assert index_builder.count_samples(2**24 + 2, 1 << 12, False, 1) == (1 << 12)
    assert index_builder.count_samples(2**22 + 2, 1 << 12, False, 1) == (1 << 10) + 1


def walk_blend(weights: list[float], size: int, limits: list[int] | None) -> tuple[list[int], list[int]]:
    taken = [0] * len(weights)
    chosen, numbers = [], []
    for step in range(size):
        best = None
        for i, weight in enumerate(weights):
            if limits is not None and taken[i] >= limits[i]:
                continue
            lag = weight * float(max(step, 1)) - taken[i]
            if best is None or lag > best[0]:
                best = (lag, i)
        chosen.append(best[1])
        numbers.append(taken[best[1]])
        taken[best[1]] += 1
    return chosen, numbers


weights_with_ties = st.lists(
    st.one_of(st.integers(1, 4).map(float), st.floats(1e-4, 1.0)), min_size=1, max_size=9
)


@settings(max_examples=150, deadline=None)
@given(weights=weights_with_ties, size=st.integers(0, 700), min_steps=st.sampled_from([1, 7, 40, 512]))
def test_blend_is_the_walk(weights: list[float], size: int, min_steps: int) -> None:
    shares = normalize(weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_builder, "_BLEND_MIN_STEPS", min_steps)
        chosen, numbers = index_builder.blend_datasets(np.array(shares), size)
    assert (chosen.dtype, numbers.dtype) == (np.int16, np.int64)
    assert (chosen.tolist(), numbers.tolist()) == walk_blend(shares, size, None)


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 120), min_size=1, max_size=8), min_steps=st.sampled_from([1, 5, 60, 512])
)
def test_exhaustive_blend_is_the_walk(sizes: list[int], min_steps: int) -> None:
    limits = np.array(sizes, dtype=np.int64)
    shares = limits / limits.sum()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_builder, "_BLEND_MIN_STEPS", min_steps)
        chosen, numbers = index_builder.blend_datasets(shares, sum(sizes), limits)
    assert (chosen.tolist(), numbers.tolist()) == walk_blend(shares.tolist(), sum(sizes), sizes)


def walk_sentences(
    bounds: list[int], sizes: list[int], epochs: int, longest: int, short: float, seed: int, least: int
) -> list[tuple[int, int, int]]:
    random = np.random.RandomState(seed)
    ratio = 0 if short == 0 else int(1 / short + 0.5)

    def target() -> int:
        if ratio == 0:
            return longest
        value = int(random.randint(0, 2**32, dtype=np.uint32))
        return 2 + value % (longest - 1) if value % ratio == 0 else longest

    rows = []
    for _ in range(epochs):
        for first, end in zip(bounds[:-1], bounds[1:]):  # noqa: RUF007 - spelled as the boundaries are defined
            remain = end - first
            if remain < max(least, 1) or (remain > 1 and max(sizes[first:end]) > 512):
                continue
            start, length, count, wanted = first, 0, 0, target()
            for sentence in range(first, end):
                length, count, remain = length + sizes[sentence], count + 1, remain - 1
                if (length >= wanted and remain > 1 and count >= least) or remain == 0:
                    rows.append((start, sentence + 1, wanted))
                    start, length, count, wanted = sentence + 1, 0, 0, target()
    return rows


@settings(max_examples=200, deadline=None)
@given(
    documents=st.lists(
        st.lists(st.one_of(st.integers(0, 40), st.just(600)), max_size=12), min_size=1, max_size=8
    ),
    epochs=st.integers(1, 3),
    longest=st.integers(2, 80),
    short=st.sampled_from([0.0, 0.1, 0.15, 0.5, 1.0]),
    seed=st.integers(1, 2**31),
    least=st.sampled_from([1, 2]),
)
def test_mapping_is_the_walk(
    documents: list[list[int]], epochs: int, longest: int, short: float, seed: int, least: int
) -> None:
    sizes = [size for document in documents for size in document]
    bounds = np.cumsum([0, *map(len, documents)])
    expected = walk_sentences(bounds.tolist(), sizes, epochs, longest, short, seed, least)
    assume(expected)
    mapping = index_builder.build_mapping(
        bounds, np.array(sizes, dtype=np.int32), epochs, 10**9, longest, short, seed, least
    )
    assert sorted(map(tuple, mapping.tolist())) == sorted(expected)
    # The walk's draws and rows in order, seen through the permutation, which depends on their number only.
    order = index_builder._shuffled_rows(len(expected), seed + 1)
    assert [tuple(row) for row in mapping.tolist()] == [expected[i] for i in order]


def test_mapping_without_a_usable_document() -> None:
    with pytest.raises(DataError, match="none of 1 documents has 2 sentences of at most 512 tokens"):
        index_builder.build_mapping(np.array([0, 1]), np.array([9], np.int32), 9, 5, 60, 0.1, 1, 2)


def test_64_bit_twister_as_the_c_standard_library_defines_it() -> None:
    """ISO C++ [rand.predef]: the 10000th output of a default-constructed mt19937_64, whose seed is 5489."""
    assert int(index_builder._mt19937_64(5489, 10000)[-1]) == 9981545732273789042
