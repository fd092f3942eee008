"""Any combination of layout flags either is refused in one line on every rank, or computes what one process computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron.core.errors import ConfigError
from tests.gang.harness import run_gang
from tests.runs.drawing import always_the_same, check_part
from tests.runs.pretraining import Difference, Observed, compare
from tests.runs.test_parity import BOUNDS, DEEP, DOCUMENTS, EXPERTS, LLAMA, SMALL, flags, one_process

MODELS = (SMALL, DEEP, LLAMA, DOCUMENTS, EXPERTS)
SWITCHES = (
    "--sequence-parallel", "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather",
    "--no-align-grad-reduce", "--no-align-param-gather", "--ddp-bucket-size 5000", "--ddp-average-in-collective",
    "--defer-embedding-wgrad-compute", "--distribute-saved-activations", "--no-overlap-p2p-communication",
    "--num-layers-per-virtual-pipeline-stage 1", "--standalone-embedding-stage", "--context-parallel-algo a2a",
    "--decoder-first-pipeline-num-layers 1", "--no-gradient-accumulation-fusion", "--use-tp-pp-dp-mapping",
    "--recompute-activations", "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    "--recompute-granularity full --recompute-method block --recompute-num-layers 1", "--no-rope-fusion",
    "--no-masked-softmax-fusion", "--no-bias-dropout-fusion", "--use-cpu-initialization",
    "--overlap-param-gather-with-optimizer-step --ckpt-format torch", "--cross-entropy-loss-fusion",
    "--moe-token-dispatcher-type allgather", "--expert-model-parallel-size 2", "--calculate-per-token-loss",
    "--accumulate-allreduce-grads-in-fp32", "--sanity-checks",
)  # fmt: skip
#: Ranks and the sizes of tensor, pipeline and context parallelism; what is left over is data parallel.
LAYOUTS = [
    (ranks, tp, pp, cp)
    for ranks in (2, 4)
    for tp in (1, 2, 4)
    for pp in (1, 2, 4)
    for cp in (1, 2)
    if ranks % (tp * pp * cp) == 0
]
COMBINATIONS = st.tuples(
    st.sampled_from(LAYOUTS), st.sampled_from(MODELS), st.sets(st.sampled_from(SWITCHES), max_size=5)
)


def compare_or_refuse(argv: list[str], expected: Observed) -> Difference | str:
    """Body: this rank's differences, or the line with which it refused."""
    try:
        return compare(argv, expected, dtype=torch.float64)
    except ConfigError as error:
        return str(error)
    except SystemExit as end:
        return f"status {end.code}"


def check(combination: Any) -> None:
    (ranks, tp, pp, cp), model, switches = combination
    chosen = sorted(switches)
    serial = model + (" --calculate-per-token-loss" if "--calculate-per-token-loss" in chosen else "")
    sizes = {"tensor-model": tp, "pipeline-model": pp, "context": cp}
    layout = " ".join([*(f"--{name}-parallel-size {size}" for name, size in sizes.items()), *chosen])
    argv = flags(model, layout, tp, "")
    results = run_gang(ranks, compare_or_refuse, argv, one_process(serial, "", torch.float64))
    refusals = {result for result in results if isinstance(result, str)}
    if refusals:
        assert len(refusals) == 1 and all(isinstance(result, str) for result in results), (layout, refusals)
        return
    bounds = dict(zip(("gradient", "token_loss", "parameter", "norm"), BOUNDS["fp64"]))
    for rank, worst in enumerate(results):
        worst.check(bounds, f"{model} {layout}, rank {rank} of {ranks}")


@pytest.mark.parametrize(
    "layout",
    [
        "--encoder-pipeline-model-parallel-size 1",
        "--pipeline-model-parallel-size 2 --pipeline-model-parallel-split-rank 1",
    ],
)
def test_one_stack_of_layers_has_no_stages_for_an_encoder(layout: str) -> None:
    refusals = set(run_gang(2, compare_or_refuse, flags(SMALL, layout, 1, ""), Observed()))
    assert len(refusals) == 1 and "--encoder-pipeline-model-parallel-size" in refusals.pop()


@given(COMBINATIONS)
@always_the_same(10)
def test_some_combinations(combination: Any) -> None:
    check(combination)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
def test_many_combinations(number: int) -> None:
    """150 more, in ten parts that can be repeated one by one."""
    check_part(check, COMBINATIONS, number, 15)
