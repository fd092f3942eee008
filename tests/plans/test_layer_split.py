"""Which layers live where: every small case against the definition."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from megatron.core import parallel_state
from megatron.core.errors import ConfigError
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.layer_split import layers_here, layers_per_stage, split_layers
from megatron.core.transformer.recompute import Segment, plan_recompute


@pytest.mark.parametrize("stages", range(1, 6))
def test_even_splits_follow_the_formula(stages: int) -> None:
    """Chunk v of stage p starts at v * (L / V) + p * (L / (P V)) and holds L / (P V) layers (v0.9's rule)."""
    for virtual, share in product(range(1, 5), range(1, 4)):
        layers = stages * virtual * share
        split = split_layers(layers, stages, virtual)
        for v, p in product(range(virtual), range(stages)):
            start = v * (layers // virtual) + p * share
            assert split[v][p] == range(start, start + share)


@pytest.mark.parametrize("standalone", [False, True])
def test_every_layer_once_in_order(standalone: bool) -> None:
    """All uneven cases: either a refusal with a fix, or every layer exactly once, in the order the chunks
    run.
    """
    accepted = refused = 0
    fixed = [None, 0, 1, 2, 3]
    for layers, stages, virtual, first, last in product(range(1, 13), range(1, 5), range(1, 4), fixed, fixed):
        try:
            split = split_layers(layers, stages, virtual, first, last, standalone)
        except ConfigError as error:
            refused += 1
            assert error.fix
            continue
        accepted += 1
        in_order = [index for row in split for stage in row for index in stage]
        assert in_order == list(range(layers))
        held = [sum(len(row[p]) for row in split) for p in range(stages)]
        inner = held[1:] if standalone else held
        if standalone:
            assert held[0] == 0
        if len(inner) > 1:
            assert first is None or inner[0] == first
            assert last is None or inner[-1] == last
        rest = inner[first is not None : len(inner) - (last is not None)]
        assert len(set(rest)) <= 1
    assert accepted > 100
    assert refused > 100


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        ((10, 4), "--num-layers"),
        ((8, 4, 3), "--num-layers-per-virtual-pipeline-stage"),
        ((8, 2, 1, 3, 4), "--decoder-first-pipeline-num-layers"),
        ((8, 1, 1, 3), "--decoder-first-pipeline-num-layers"),
        ((8, 1, 1, None, None, True), "--standalone-embedding-stage"),
    ],
)
def test_refusals_name_the_flag(arguments: tuple, flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        split_layers(*arguments)


def config(stages: int, **others: Any) -> TransformerConfig:
    return TransformerConfig(
        num_layers=8,
        hidden_size=8,
        num_attention_heads=2,
        pipeline_model_parallel_size=stages,
        pipeline_dtype=torch.float32,
        **others,
    )


def test_the_process_says_which_chunk_is_built() -> None:
    """As in v0.9 the virtual pipeline is what `initialize_model_parallel` or the setters were told, not the config."""
    second_stage = ProcessGroupCollection(assumed_sizes={"pp": 2}, assumed_ranks={"pp": 1})
    with parallel_state.standing_at(second_stage):
        assert layers_here(config(2)) == range(4, 8)
        assert layers_here(config(2, virtual_pipeline_model_parallel_size=2)) == range(4, 8)
    for chunk, layers in enumerate((range(2, 4), range(6, 8))):
        with parallel_state.standing_at(second_stage, chunk, 2):
            assert layers_here(config(2)) == layers


def test_a_configuration_of_one_stage_is_built_whole_on_any() -> None:
    third_stage = ProcessGroupCollection(assumed_sizes={"pp": 4}, assumed_ranks={"pp": 2})
    with parallel_state.standing_at(third_stage):
        with pytest.warns(UserWarning, match="stage 2 of a pipeline.*all 8 layers"):
            assert layers_here(config(1)) == range(8)
        with pytest.raises(ConfigError, match="the config says 2 stages"):
            layers_here(config(2))


def test_uneven_stages() -> None:
    assert layers_per_stage(10, 4, first=2, last=2) == (2, 3, 3, 2)
    assert layers_per_stage(9, 4, standalone_embedding=True) == (0, 3, 3, 3)


def test_recompute_plans() -> None:
    for layers, n in product(range(9), range(1, 6)):
        uniform = plan_recompute(layers, "uniform", n)
        block = plan_recompute(layers, "block", n)
        for plan in (uniform, block):
            assert [i for s in plan for i in range(s.start, s.stop)] == list(range(layers))
        assert all(s.recomputed and s.stop - s.start <= n for s in uniform)
        assert len(uniform) == -(-layers // n)
        assert block == [Segment(i, i + 1, i < n) for i in range(layers)]


@pytest.mark.parametrize(
    ("method", "n"), [(None, 1), ("other", 1), ("uniform", None), ("uniform", 0), ("block", None)]
)
def test_recompute_needs_method_and_number(method: str | None, n: int | None) -> None:
    with pytest.raises(ConfigError, match="--recompute"):
        plan_recompute(4, method, n)
