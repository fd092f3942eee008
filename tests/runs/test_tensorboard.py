"""What several ranks write into one log: times of them all, sums over them all."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.gang.harness import run_gang
from tests.runs.pretraining import records, run_script

RUN = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16 "
    "--micro-batch-size 1 --global-batch-size 4 --lr 1e-3 --train-iters 3 --eval-iters 0 --transformer-impl local "
    "--num-workers 0 --distributed-backend gloo --mock-data --tokenizer-type NullTokenizer --vocab-size 30 "
    "--log-interval 2 --timing-log-level 2 --log-timers-to-tensorboard "
)


@pytest.mark.parametrize("layout", ["", "--pipeline-model-parallel-size 2"])
def test_times_of_all_ranks_are_written_by_one(tmp_path: Path, layout: str) -> None:
    run_gang(2, run_script, [*RUN.split(), *layout.split(), "--tensorboard-dir", str(tmp_path)])
    log = EventAccumulator(str(tmp_path)).Reload()
    tags = log.Tags()["scalars"]
    for name in ("forward-backward", "forward-compute", "backward-compute", "optimizer"):
        entries = log.Scalars(f"{name}-time")
        assert [entry.step for entry in entries] == [1, 2, 3], name
        assert all(entry.value > 0 for entry in entries), name
    assert ("forward-recv-time" in tags) == bool(layout)  # which the rank that writes does not do itself
    assert [entry.step for entry in log.Scalars("iteration-time")] == [2]


EXPERTS = "--num-experts 4 --moe-router-topk 2 --moe-router-load-balancing-type none "


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, ""),
        (4, "--tensor-model-parallel-size 2 --sequence-parallel"),
        (4, "--expert-model-parallel-size 2 " + EXPERTS),
        pytest.param(
            2, "--bf16 --fp8-format e4m3 --fp8-recipe tensorwise --fp8-param-gather", marks=pytest.mark.slow
        ),
    ],
)
def test_the_norm_is_of_the_parameters_after_the_step(ranks: int, layout: str) -> None:
    """Also where ranks hear of each other's updates only in the next forward pass."""
    argv = [*RUN.split(), *layout.split(), "--log-interval", "1", "--lr", "0.1", "--log-params-norm"]
    argv.append("--use-distributed-optimizer")
    overlapping = [*argv, "--overlap-grad-reduce", "--overlap-param-gather"]
    at_once, later = (
        [line["params_norm"] for line in run_gang(ranks, records, words)[-1]] for words in (argv, overlapping)
    )
    assert later == pytest.approx(at_once, rel=1e-6)
    assert len(set(at_once)) == 3
