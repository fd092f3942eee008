"""What several ranks write into one TensorBoard log."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.gang.harness import run_gang
from tests.runs.pretraining import run_script

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
