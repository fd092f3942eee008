"""Training in emulated fp8: it learns as bf16 does, every layout agrees within fp8's rounding, and it resumes to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gang.harness import run_gang
from tests.runs.pretraining import records
from tests.runs.test_resume import COMMON, assert_same_runs, stop_and_resume

PLAIN = COMMON.replace(
    "--attention-dropout 0.1 --hidden-dropout 0.1", "--attention-dropout 0 --hidden-dropout 0"
).replace("--save-interval 3", "")


def losses(ranks: int, flags: str) -> list[float]:
    lines = run_gang(ranks, records, (PLAIN + flags).split())[-1]
    return [line["lm loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize(
    "flags",
    [
        "--fp8-format hybrid --fp8-amax-history-len 4 --fp8-amax-compute-algo max",
        "--fp8-format e4m3 --fp8-recipe tensorwise --no-fp8-wgrad",
        "--fp8-format hybrid --first-last-layers-bf16 --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1",
    ],
)
def test_losses_follow_those_of_higher_precision(flags: str) -> None:
    wide, narrow = losses(1, "--bf16"), losses(1, "--bf16 " + flags)
    assert wide != narrow
    assert max(abs(a - b) / a for a, b in zip(wide, narrow)) < 0.01


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
        (2, "--tensor-model-parallel-size 2"),
        (2, "--pipeline-model-parallel-size 2"),
        (2, "--use-distributed-optimizer --overlap-grad-reduce"),
    ],
)
def test_layouts_agree(ranks: int, layout: str) -> None:
    """Other microbatches and pieces of weights meet other scales in the first step only; after it all ranks share them."""
    flags = "--bf16 --use-cpu-initialization --make-vocab-size-divisible-by 64 --fp8-format hybrid "
    one, many = losses(1, flags), losses(ranks, flags + layout)
    assert max(abs(a - b) / a for a, b in zip(one, many)) < 0.01


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, "--ckpt-format torch"),
        (2, "--ckpt-format torch_dist --tensor-model-parallel-size 2 --sequence-parallel"),
        (2, "--ckpt-format torch_dist --use-distributed-optimizer --pipeline-model-parallel-size 2"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path: Path, ranks: int, flags: str) -> None:
    fp8 = "--bf16 --fp8-format hybrid --fp8-amax-history-len 3 --fp8-amax-compute-algo max "
    run_gang(ranks, stop_and_resume, str(tmp_path), (COMMON + fp8 + flags).split())
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")
