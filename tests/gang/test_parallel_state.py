"""The classic accessors on real groups, for several layouts and orders; broadcast, timers and replica hashes."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron.core import parallel_state as mpu
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.replicas import check_param_hashes_across_dp_replicas, differing_parameters
from megatron.core.tensor_parallel import broadcast_data
from megatron.core.timers import Timers
from megatron.core.topology import Layout
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.gang.harness import run_gang


def _where(**sizes: Any) -> dict[str, Any]:
    mpu.initialize_model_parallel(**sizes)
    groups = {
        "tp": mpu.get_tensor_model_parallel_group(),
        "pp": mpu.get_pipeline_model_parallel_group(),
        "dp": mpu.get_data_parallel_group(),
        "dp_cp": mpu.get_data_parallel_group(with_context_parallel=True),
        "cp": mpu.get_context_parallel_group(),
        "mp": mpu.get_model_parallel_group(),
        "tp_ep_pp": mpu.get_model_parallel_group(with_expert_parallel=True),
        "tp_cp": mpu.get_tensor_and_context_parallel_group(),
        "tp_dp": mpu.get_tensor_and_data_parallel_group(),
        "tp_dp_cp": mpu.get_tensor_and_data_parallel_group(with_context_parallel=True),
        "ep": mpu.get_expert_model_parallel_group(),
        "tp_ep": mpu.get_tensor_and_expert_parallel_group(),
        "dp_modulo_ep": mpu.get_data_modulo_expert_parallel_group(),
        "dp_modulo_ep_cp": mpu.get_data_modulo_expert_parallel_group(with_context_parallel=True),
    }
    sums = {}
    for kind, group in groups.items():
        value = torch.tensor([float(2 ** dist.get_rank())])
        dist.all_reduce(value, group=group)
        sums[kind] = int(value.item())
    return {
        "ranks": {kind: dist.get_process_group_ranks(group) for kind, group in groups.items()},
        "sums": sums,
        "place": {
            "tp": mpu.get_tensor_model_parallel_rank(),
            "pp": mpu.get_pipeline_model_parallel_rank(),
            "cp": mpu.get_context_parallel_rank(),
            "dp": mpu.get_data_parallel_rank(),
        },
        "ep": (mpu.get_expert_model_parallel_rank(), mpu.get_expert_model_parallel_world_size()),
        "first": mpu.is_pipeline_first_stage(),
        "last": mpu.is_pipeline_last_stage(),
        "next": mpu.get_pipeline_model_parallel_next_rank(),
        "prev": mpu.get_pipeline_model_parallel_prev_rank(),
        "ends": (mpu.get_pipeline_model_parallel_first_rank(), mpu.get_pipeline_model_parallel_last_rank()),
        "sources": (mpu.get_tensor_model_parallel_src_rank(), mpu.get_data_parallel_src_rank()),
        "embedding": (mpu.is_rank_in_embedding_group(), mpu.is_rank_in_position_embedding_group()),
        "cp_ranks": mpu.get_context_parallel_global_ranks(),
        "text": mpu.get_all_ranks(),
    }


LAYOUTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, {"tp": 2, "pp": 2}),
    (
        {"tensor_model_parallel_size": 2, "context_parallel_size": 2, "order": "tp-pp-dp-cp"},
        {"tp": 2, "cp": 2, "order": "tp-pp-dp-cp"},
    ),
    (
        {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
        {"tp": 2, "ep": 2},
    ),
    (
        {"pipeline_model_parallel_size": 4, "context_parallel_size": 2, "order": "dp-cp-tp-pp-ep"},
        {"pp": 4, "cp": 2, "order": "dp-cp-tp-pp-ep"},
    ),
]


@pytest.mark.parametrize(("sizes", "layout_sizes"), LAYOUTS)
def test_accessors_agree_with_the_plan(sizes: dict[str, Any], layout_sizes: dict[str, Any]) -> None:
    layout = Layout(world_size=8, **layout_sizes)
    for rank, found in enumerate(run_gang(8, _where, **sizes)):
        for kind, ranks in found["ranks"].items():
            assert rank in ranks and ranks in layout.groups(kind), kind
            assert found["sums"][kind] == sum(2**member for member in ranks), kind
        place = layout.coordinates(rank)
        assert found["place"] == place
        pipeline = found["ranks"]["pp"]
        stage = place["pp"]
        assert (found["first"], found["last"]) == (stage == 0, stage == layout.pp - 1)
        assert found["next"] == pipeline[(stage + 1) % layout.pp]
        assert found["prev"] == pipeline[stage - 1]
        assert found["ends"] == (pipeline[0], pipeline[-1])
        assert found["sources"] == (found["ranks"]["tp"][0], found["ranks"]["dp"][0])
        assert found["embedding"] == (stage in (0, layout.pp - 1), stage == 0)
        assert found["cp_ranks"] == found["ranks"]["cp"]
        assert found["ep"] == (found["ranks"]["ep"].index(rank), layout.ep)
        numbers = [place["tp"], place["dp"], place["cp"], place["pp"], found["ep"][0]]
        assert found["text"] == "_".join(map(str, numbers))


def _virtual_stages() -> list[tuple[bool, bool]]:
    mpu.initialize_model_parallel(
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=3,
        pipeline_model_parallel_split_rank=1,
    )
    seen = []
    for chunk in range(3):
        mpu.set_virtual_pipeline_model_parallel_rank(chunk)
        seen.append((mpu.is_pipeline_first_stage(), mpu.is_pipeline_last_stage()))
    seen.append(
        (mpu.is_pipeline_first_stage(ignore_virtual=True), mpu.is_pipeline_last_stage(ignore_virtual=True))
    )
    seen.append((mpu.is_pipeline_stage_before_split(), mpu.is_pipeline_stage_after_split()))
    seen.append((mpu.is_pipeline_stage_at_split(), mpu.is_inside_encoder() and mpu.is_inside_decoder()))
    mpu.set_pipeline_model_parallel_rank(1)
    mpu.set_tensor_model_parallel_world_size(7)
    seen.append(
        (mpu.get_pipeline_model_parallel_rank() == 1, mpu.get_tensor_model_parallel_world_size() == 7)
    )
    return seen


def test_virtual_stages_splits_and_assumed_places() -> None:
    first, last = run_gang(2, _virtual_stages)
    no, yes = (False, False), (True, True)
    assert first == [(True, False), no, no, (True, False), (True, False), (True, True), yes]
    assert last == [no, no, (False, True), (False, True), (False, True), (False, True), yes]


def _mixture(dispatcher: str) -> MoELayer:
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=2, num_moe_experts=4, add_bias_linear=False,
        moe_token_dispatcher_type=dispatcher, expert_model_parallel_size=2, use_cpu_initialization=True,
    )  # fmt: skip
    return MoELayer(config, get_gpt_layer_local_spec(num_experts=4).submodules.mlp.submodules)


def _built_before_the_groups(dispatcher: str) -> None:
    """Body: a layer built on the places that the setters tell of exchanges tokens like one built on the groups."""
    mpu.set_expert_model_parallel_world_size(2)
    mpu.set_expert_model_parallel_rank(dist.get_rank())
    torch.manual_seed(3)
    early = _mixture(dispatcher)
    # Nothing is seeded yet but the default generator.
    torch.manual_seed(3)
    torch.testing.assert_close(early.router.weight.detach(), torch.empty(4, 8).normal_(std=0.02))
    mpu.initialize_model_parallel(expert_model_parallel_size=2)
    late = _mixture(dispatcher)
    late.load_state_dict(early.state_dict())
    hidden = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(dist.get_rank()))
    torch.testing.assert_close(early(hidden)[0], late(hidden)[0], rtol=0, atol=0)


@pytest.mark.parametrize("dispatcher", ["allgather", "alltoall"])
def test_layers_built_before_the_groups_use_them(dispatcher: str) -> None:
    run_gang(2, _built_before_the_groups, dispatcher)


def _encoder_stages() -> tuple[Any, ...]:
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=1,
        encoder_tensor_model_parallel_size=1,
        encoder_pipeline_model_parallel_size=2,
    )
    groups = mpu.get_pipeline_model_parallel_group()
    return (
        mpu.is_inside_encoder(),
        mpu.is_inside_decoder(),
        mpu.get_tensor_model_parallel_world_size(),
        mpu.get_pipeline_model_parallel_next_rank(),
        mpu.get_pipeline_model_parallel_prev_rank(),
        len(groups) if isinstance(groups, list) else 1,
    )


def test_one_encoder_rank_feeds_two_decoder_pipelines() -> None:
    """Ranks 0, 1: encoder stages of tp 1. Ranks 2, 3: decoder of tp 2. Pipelines 0-1-2 and 0-1-3."""
    assert run_gang(4, _encoder_stages) == [
        (True, False, 1, [1, 1], [2, 3], 2),
        (True, False, 1, [2, 3], [0, 0], 2),
        (False, True, 2, 0, 1, 1),
        (False, True, 2, 0, 1, 1),
    ]


def _before_and_wrong() -> None:
    with pytest.raises(AssertionError, match="tensor model parallel group is not initialized"):
        mpu.get_tensor_model_parallel_group()
    assert mpu.get_tensor_model_parallel_group(check_initialized=False) is None
    assert mpu.is_unitialized() and not mpu.model_parallel_is_initialized()
    with pytest.raises(RuntimeError, match="not divisible"):
        mpu.initialize_model_parallel(tensor_model_parallel_size=3)
    with pytest.raises(RuntimeError, match="greater than 1"):
        mpu.initialize_model_parallel(virtual_pipeline_model_parallel_size=2)
    mpu.initialize_model_parallel(tensor_model_parallel_size=2)
    with pytest.raises(AssertionError, match="already initialized"):
        mpu.initialize_model_parallel(tensor_model_parallel_size=2)
    mpu.destroy_model_parallel()
    assert not mpu.is_initialized()


def test_wrong_use_is_explained() -> None:
    run_gang(2, _before_and_wrong)


def _broadcast() -> dict[str, Tensor]:
    mpu.initialize_model_parallel(tensor_model_parallel_size=2)
    data = None
    if mpu.get_tensor_model_parallel_rank() == 0:
        replica = mpu.get_data_parallel_rank()
        data = {
            "text": torch.arange(6).view(2, 3) + 100 * replica,
            "one": torch.tensor(replica),
            "left": torch.ones(2),
        }
    return broadcast_data(["text", "one"], data, torch.int64)


def test_broadcast_within_each_tensor_group() -> None:
    for rank, received in enumerate(run_gang(4, _broadcast)):
        replica = rank // 2
        assert torch.equal(received["text"], torch.arange(6).view(2, 3) + 100 * replica)
        assert received["one"].shape == () and received["one"].item() == replica


def _times() -> tuple[str | None, float]:
    timers = Timers(log_level=1, log_option="minmax")
    timer = timers("work", log_level=0)
    timer._elapsed = 1.0 + dist.get_rank()  # type: ignore[attr-defined]
    timers("idle", log_level=1)
    assert timers("fine", log_level=2).stop() is None
    with pytest.raises(RuntimeError, match="timing-log-level"):
        timers("fine", log_level=2).elapsed()
    with pytest.raises(AssertionError, match="log level 0"):
        timers("work", log_level=1)
    report = timers.get_all_timers_string(["work", "idle", "absent"], normalizer=2.0)
    return report, timer.elapsed()


def test_timers_compare_ranks() -> None:
    label = "work ".ljust(48, ".")
    for report, left in run_gang(4, _times):
        assert report == f"(min, max) time across ranks (ms):\n    {label}: (500.00, 2000.00)"
        assert left == 0.0


def _drift(expert: bool) -> tuple[bool, bool, list[tuple[str, list[int]]]]:
    mpu.initialize_model_parallel(tensor_model_parallel_size=2)
    torch.manual_seed(mpu.get_tensor_model_parallel_rank())
    model = torch.nn.Linear(3, 4)
    equal = check_param_hashes_across_dp_replicas([model])
    if dist.get_rank() == 3:
        with torch.no_grad():
            model.bias[2] += 1e-7
    if expert:
        model.bias.allreduce = False
    logging.getLogger("megatron.core.replicas").setLevel(logging.ERROR)
    found = list(differing_parameters([model]))
    return equal, check_param_hashes_across_dp_replicas([model], cross_check=True), found


@pytest.mark.parametrize("expert", [False, True])
def test_a_replica_that_drifts_is_named(expert: bool) -> None:
    for rank, (before, after, found) in enumerate(run_gang(4, _drift, expert)):
        assert before
        assert after == (rank % 2 == 0)
        assert found == ([("bias", [3])] if rank % 2 else [])
