"""The same command makes the same bytes; a replica that drifts and the first NaN are found and named."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron.core import parallel_state
from megatron.core.errors import TrainingError
from megatron.training import training
from megatron.training.utils import unwrap_model
from tests.gang.harness import run_gang
from tests.runs.pretraining import run_script
from tests.runs.test_resume import LAYOUTS, MATRIX, PRECISIONS, log_of, possible

SHORT = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 "
    "--micro-batch-size 2 --global-batch-size 8 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer --vocab-size 100 "
    "--transformer-impl local --num-workers 0 --train-iters 3 --eval-iters 1 --eval-interval 2 --log-interval 1 "
    "--distributed-backend gloo --save-interval 3 --attention-dropout 0.1 --hidden-dropout 0.1 "
)
EVERY_LAYOUT = {**MATRIX, **LAYOUTS}
EVERY = [
    (layout, precision)
    for layout in EVERY_LAYOUT
    for precision in PRECISIONS
    if layout not in MATRIX or possible(layout, precision)
]
ALWAYS = {("dp2 distopt overlap", "bf16"), ("tp2 sp", "fp32"), ("pp2 vpp2", "fp16"), ("cp2", "bf16")}


@pytest.mark.parametrize(
    ("layout", "precision"),
    [pytest.param(*case, marks=[] if case in ALWAYS else [pytest.mark.slow]) for case in EVERY],
)
def test_the_same_command_makes_the_same_bytes(tmp_path: Path, layout: str, precision: str) -> None:
    ranks, flags = EVERY_LAYOUT[layout]
    argv = (SHORT + flags + PRECISIONS[precision] + "--deterministic-mode").split()
    folders = []
    for name in ("first", "second"):
        run_gang(ranks, run_script, [*argv, "--save", str(tmp_path / "run")])
        folders.append(tmp_path / name)
        shutil.move(tmp_path / "run", folders[-1])  # the path is part of the arguments that are saved
    first, second = ({str(p.relative_to(f)): p for p in f.rglob("*") if p.is_file()} for f in folders)
    assert first.keys() == second.keys()
    assert sum("iter_" in name for name in first) >= 1
    for name in first.keys() - {"metrics.jsonl"}:
        assert first[name].read_bytes() == second[name].read_bytes(), name
    assert log_of(folders[0]) == log_of(folders[1])


def disturbed(argv: list[str], what: str, name: str, at: int, rank: int) -> str:
    """Body: a run in which, before step `at`, one element of a parameter of `rank` changes: the error it ends with."""
    real, calls = training.train_step, 0

    def train_step(
        forward: Any, iterator: Any, model: list[torch.nn.Module], *args: Any, **kwargs: Any
    ) -> Any:
        nonlocal calls
        calls += 1
        if calls == at and dist.get_rank() == rank:
            for chunk in unwrap_model(model):
                for own, param in chunk.named_parameters():
                    if own == name:
                        with torch.no_grad():
                            param.view(-1)[0] = float("nan") if what == "nan" else param.view(-1)[0] + 1e-3
        return real(forward, iterator, model, *args, **kwargs)

    try:
        with mock.patch.object(training, "train_step", train_step):
            run_script(argv)
    except TrainingError as error:
        return str(error)
    except RuntimeError as error:  # the other ranks lose the one that stopped
        return f"lost: {error}"
    return ""


WEIGHT = "decoder.layers.1.mlp.linear_fc2.weight"


@pytest.mark.parametrize(
    "flags",
    ["--sanity-checks", "--check-weight-hash-across-dp-replicas-interval 1", "--sanity-checks --bf16"],
)
def test_a_replica_that_drifts_is_named(flags: str) -> None:
    for said in run_gang(2, disturbed, (SHORT + flags).split(), "drift", WEIGHT, at=2, rank=1):
        assert said.startswith(f"{'module.' * said.count('module.')}{WEIGHT}: rank(s) 1 hold other values"), (
            said
        )


def test_equal_replicas_pass_the_checks() -> None:
    flags = "--sanity-checks --check-weight-hash-across-dp-replicas-interval 1"
    for ranks, layout in ((2, ""), (2, LAYOUTS["dp2 distopt overlap"][1]), (2, LAYOUTS["tp2 sp"][1])):
        printed = run_gang(ranks, run_script, (SHORT + layout + flags).split())[0]
        assert "Weight hashes match after 3 iterations" in printed
        assert "iteration        3/" in "".join(run_gang(ranks, run_script, (SHORT + layout + flags).split()))


def test_the_first_nan_is_reported_with_its_layer_and_rank() -> None:
    (said,) = run_gang(1, disturbed, (SHORT + "--sanity-checks").split(), "nan", WEIGHT, at=2, rank=0)
    assert "decoder.layers.1.mlp.linear_fc2: its output holds a NaN on rank 0 at iteration 2" in said
    assert "weight is not finite" in said


def test_a_nan_is_reported_without_checks_too() -> None:
    (said,) = run_gang(1, disturbed, SHORT.split(), "nan", WEIGHT, at=2, rank=0)
    assert "lm loss: is NaN on rank 0 at iteration 2" in said


def start(argv: list[str]) -> tuple[int, float, float]:
    """Body: build a model; its seed, the next random number, and the sum of its parameters."""
    seen: dict[str, float] = {}
    real = training.train_step

    def train_step(
        forward: Any, iterator: Any, model: list[torch.nn.Module], *args: Any, **kwargs: Any
    ) -> Any:
        seen.setdefault("sum", sum(p.double().sum().item() for p in model[0].parameters()))
        return real(forward, iterator, model, *args, **kwargs)

    with mock.patch.object(training, "train_step", train_step):
        run_script(argv)
    rank = parallel_state.get_data_parallel_rank()
    return rank, seen["sum"], float(torch.initial_seed())


def test_replicas_with_their_own_seeds_start_equal() -> None:
    """`--data-parallel-random-init`: each replica's generator is seeded 10 apart, and the first one's weights count."""
    seed = 4321
    results = run_gang(2, start, [*SHORT.split(), "--data-parallel-random-init", "--seed", str(seed)])
    alone = run_gang(1, start, [*SHORT.split(), "--seed", str(seed)])[0]
    assert [rank for rank, _, _ in results] == [0, 1]
    assert results[0][1] == results[1][1] == alone[1]
    assert [own for _, _, own in results] == [seed, seed + 10]
