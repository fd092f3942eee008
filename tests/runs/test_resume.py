"""Stopping and resuming gives the bits of a run that never stopped: weights, optimizer, schedule, random state, data, log.

Each run has dropout, evaluates on the way, and is compared through what it saves at its end, file by file.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron.core.dist_checkpointing.safe_load import load_file
from megatron.core.errors import CheckpointError
from megatron.training.checkpointing import save
from tests.gang.harness import run_gang
from tests.runs import test_parity as parity
from tests.runs.pretraining import read_records, run_script

STEPS, STOP = 6, 3
COMMON = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 "
    "--micro-batch-size 2 --global-batch-size 8 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 2 "
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 100 --transformer-impl local --num-workers 0 "
    f"--train-iters {STEPS} --eval-iters 1 --eval-interval 2 --log-interval 1 --distributed-backend gloo "
    f"--save-interval {STOP} --attention-dropout 0.1 --hidden-dropout 0.1 "
)
LAYOUTS = {
    "one process": (1, ""),
    "dp2": (2, ""),
    "dp2 distopt overlap": (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "),
    "tp2 sp": (2, "--tensor-model-parallel-size 2 --sequence-parallel "),
    "tp2 pp2": (4, "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "),
    "pp2 vpp2": (2, "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 "),
    "cp2": (2, "--context-parallel-size 2 "),
    "sgd cyclic": (1, "--optimizer sgd --dataloader-type cyclic "),
}


#: Every layout in which gradients are compared with one process, as (ranks, flags).
MATRIX = {
    case: (ranks, f"{model}{layout} --make-vocab-size-divisible-by {parity.VOCABULARY // tp} ")
    for case, (ranks, tp, model, layout) in parity.CASES.items()
}


def stop_and_resume(folder: str, argv: list[str], script: str = "pretrain_gpt") -> None:
    """Body: one run to the end in `whole`; another that stops half way in `parts`, and goes on from there."""
    whole, parts = Path(folder) / "whole", Path(folder) / "parts"
    run_script([*argv, "--save", str(whole)], script)
    forget()
    run_script([*argv, "--save", str(parts), "--exit-interval", str(STOP)], script)
    forget()
    run_script([*argv, "--save", str(parts), "--load", str(parts)], script)


def forget() -> None:
    from megatron.training.training import destroy_global_state

    destroy_global_state()
    torch.manual_seed(99)  # the resumed run must not live on what the first left behind


PRECISIONS = {"fp32": "", "bf16": "--bf16 ", "fp16": "--fp16 --initial-loss-scale 65536 "}
EVERY = [
    (ckpt, layout, precision)
    for ckpt in ("torch", "torch_dist")
    for layout in LAYOUTS
    for precision in PRECISIONS
]
#: In every run of the tests: each precision and each layout, in the two formats.
ALWAYS = {
    ("torch", "one process", "fp32"),
    ("torch", "one process", "fp16"),
    ("torch", "dp2", "bf16"),
    ("torch", "dp2 distopt overlap", "bf16"),
    ("torch", "tp2 pp2", "fp32"),
    ("torch", "sgd cyclic", "fp32"),
    ("torch", "cp2", "bf16"),
    ("torch_dist", "one process", "bf16"),
    ("torch_dist", "dp2 distopt overlap", "fp32"),
    ("torch_dist", "tp2 sp", "bf16"),
    ("torch_dist", "pp2 vpp2", "bf16"),
    ("torch_dist", "cp2", "fp32"),
}


@pytest.mark.parametrize(
    ("ckpt_format", "layout", "precision"),
    [pytest.param(*case, marks=[] if case in ALWAYS else [pytest.mark.slow]) for case in EVERY],
)
def test_resumed_run_is_the_uninterrupted_run(
    tmp_path: Path, ckpt_format: str, layout: str, precision: str
) -> None:
    ranks, flags = LAYOUTS[layout]
    argv = (COMMON + flags + PRECISIONS[precision] + f"--ckpt-format {ckpt_format}").split()
    run_gang(ranks, stop_and_resume, str(tmp_path), argv)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


def save_from_every_rank(folder: str, argv: list[str]) -> str:
    """Body: a run in which every replica takes itself for the one that writes; the error it ends with."""
    with mock.patch.object(save.mpu, "get_data_modulo_expert_parallel_rank", lambda **_: 0):
        try:
            run_script([*argv, "--save", folder])
        except CheckpointError as error:
            return str(error)
    return ""


def test_a_file_that_two_ranks_write_is_no_checkpoint(tmp_path: Path) -> None:
    argv = (COMMON + "--ckpt-format torch").split()
    for message in run_gang(2, save_from_every_rank, str(tmp_path), argv):
        assert f"iter_{STOP:07d}/mp_rank_00/model_optim_rng.pt" in message and "two ranks wrote it" in message
    assert not (tmp_path / "latest_checkpointed_iteration.txt").exists()


@pytest.mark.parametrize("ckpt_format", ["torch", "torch_dist"])
def test_a_run_that_skipped_every_step_so_far_resumes(tmp_path: Path, ckpt_format: str) -> None:
    """The loss scale overflows for longer than the first half of the run."""
    argv = (COMMON + f"--fp16 --initial-loss-scale {2**21} --ckpt-format {ckpt_format}").split()
    run_gang(1, stop_and_resume, str(tmp_path), argv)
    skipped = [line["skipped_iterations"] for line in log_of(tmp_path / "whole") if line["kind"] == "train"]
    assert skipped[:STOP] == [1] * STOP and 0 in skipped
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


def possible(layout: str, precision: str, optimizer: str = "adam") -> bool:
    """Whether no rule refuses it."""
    flags = MATRIX[layout][1]
    scaled_experts = precision == "fp16" and "--expert-model-parallel-size" in flags
    return not scaled_experts and (optimizer == "adam" or "--use-distributed-optimizer" not in flags)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "precision", "optimizer"),
    [case for case in itertools.product(MATRIX, PRECISIONS, ("adam", "sgd")) if possible(*case)],
)
def test_every_layout_of_the_matrix_resumes(
    tmp_path: Path, layout: str, precision: str, optimizer: str
) -> None:
    ranks, flags = MATRIX[layout]
    ckpt_format = "" if "--ckpt-format" in flags else "--ckpt-format torch_dist"
    argv = (COMMON + flags + PRECISIONS[precision] + f"--optimizer {optimizer} {ckpt_format}").split()
    run_gang(ranks, stop_and_resume, str(tmp_path), argv)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


def assert_same_runs(whole: Path, parts: Path, logs: bool = True) -> None:
    """Two runs logged the same numbers (unless `logs` is off) and saved the same bits at their end."""
    assert not logs or log_of(parts) == log_of(whole)
    final = f"iter_{STEPS:07d}"
    names = sorted(str(p.relative_to(whole)) for p in (whole / final).rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(parts)) for p in (parts / final).rglob("*") if p.is_file())
    compared = 0
    for name in names:
        if name.endswith(".pt"):
            compared += same(load_file(whole / name), load_file(parts / name), name)
        elif name.endswith(".distcp"):
            assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
            compared += 1
    assert compared >= 2


def log_of(folder: Path) -> list[dict[str, Any]]:
    """Every logged number but times."""
    lines = read_records(folder / "metrics.jsonl")
    return [
        {k: v for k, v in line.items() if k not in ("time", "elapsed_ms", "tokens_per_second")}
        for line in lines
    ]


def same(a: Any, b: Any, place: str) -> int:
    """Assert equal bits, tensor by tensor, except for the paths and flags of the command line; how many were compared."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), place
        return 1
    if isinstance(a, dict):
        assert a.keys() == b.keys(), place
        return sum(same(a[key], b[key], f"{place}: {key}") for key in a if key != "args")
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b), place
        return sum(same(x, y, f"{place}[{i}]") for i, (x, y) in enumerate(zip(a, b)))
    assert type(a) is type(b) and (a is b or bool(torch.all(torch.as_tensor(a == b)))), f"{place}: {a} {b}"
    return 0
