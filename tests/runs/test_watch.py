"""A rank that dies takes the others down with its reason; one that hangs ends the run and everyone says where it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.training import watch

REPOSITORY = Path(__file__).resolve().parents[2]
FLAGS = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16 "
    "--micro-batch-size 1 --global-batch-size 2 --lr 1e-3 --train-iters 9 --eval-iters 0 --transformer-impl local "
    "--num-workers 0 --distributed-backend gloo --make-vocab-size-divisible-by 32 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 30 --distributed-timeout-minutes 1 --log-interval 1"
)


def launch(kind: str, folder: Path) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    argv += ["--rdzv-endpoint", "localhost:0", "-m", "tests.runs.troubled", kind, *FLAGS.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(argv, capture_output=True, text=True, timeout=150, env=environment, cwd=folder)


def test_a_rank_that_dies_ends_the_run_with_its_reason(tmp_path: Path) -> None:
    done = launch("die", tmp_path)
    assert done.returncode == 1
    assert "the disk of rank 1 is on fire" in done.stderr
    assert "iteration        2/" in done.stdout and "iteration        3/" not in done.stdout


def test_a_rank_that_hangs_ends_the_run_with_who_waited_for_whom(tmp_path: Path) -> None:
    done = launch("hang", tmp_path)
    assert done.returncode == 1
    said = [
        line
        for line in done.stderr.splitlines()
        if line.startswith("error: rank 0: --distributed-timeout-minutes")
    ]
    assert len(said) == 1, done.stderr[-3000:]
    assert "waited for another one" in said[0] and "(megatron/" in said[0]
    assert "Rank 1 was in wait_for_a_file_system" in said[0] and "troubled.py" in said[0]
    assert "rank 1 was here" in done.stderr and "in troubled_forward_step" in done.stderr


@pytest.mark.slow
def test_a_rank_that_waits_for_its_device_asks_before_the_limit_ends_it(tmp_path: Path) -> None:
    done = launch("stall", tmp_path)
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if "no step has ended for 4 s" in line]
    assert len(said) == 1, done.stderr[-3000:]
    assert "(megatron/" in said[0], "where rank 0 waits"
    assert "was in wait_for_a_file_system" in said[0] and "troubled.py" in said[0], "where rank 1 is"
    assert "rank 0 was here" in done.stderr and "rank 1 was here" in done.stderr


def test_only_ranks_that_wait_for_a_device_ask_by_themselves() -> None:
    assert watch.patience_s("gloo", 10) is None
    assert watch.patience_s("nccl", 10) == watch.patience_s("cpu:gloo,cuda:nccl", 10) == 540


def test_the_thread_ends_before_the_interpreter() -> None:
    """One that still asks its store while the interpreter ends would abort the process."""
    program = """
import atexit, threading
import torch.distributed as dist
from megatron.training import watch
store = dist.TCPStore("localhost", 0, 1, True)
atexit.register(lambda: print([thread.name for thread in threading.enumerate()]))
watch.start(store, 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY)
    assert (done.returncode, done.stdout) == (0, "['MainThread']\n"), done.stderr
