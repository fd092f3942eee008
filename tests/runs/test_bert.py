"""BERT pretraining: every layout computes what one process computes, resumes bit for bit, and refuses what it cannot do."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from tests.gang.harness import run_gang
from tests.runs.pretraining import Observed, compare, observe

DATA = Path(__file__).resolve().parents[1] / "golden" / "data"
STEPS = 3
COMMON = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32 "
    "--micro-batch-size 2 --global-batch-size 8 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine "
    f"--data-path {DATA}/bin/bert_text_sentence --vocab-file {DATA}/vocab/bert-vocab.txt --split 949,50,1 "
    "--num-workers 0 --attention-dropout 0 --hidden-dropout 0 --eval-iters 0 --log-interval 1 --adam-eps 1e-3 "
    f"--train-iters {STEPS} --log-num-zeros-in-grad --distributed-backend gloo "
)
#: The padded vocabulary must not depend on the layout, or other logits would enter the softmax.
VOCABULARY = 1536
SCRIPT = "pretrain_bert"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def flags(cache: str, layout: str = "", tp: int = 1) -> list[str]:
    padding = f" --make-vocab-size-divisible-by {VOCABULARY // tp} --data-cache-path {cache} "
    return (COMMON + padding + layout).split()


@functools.cache
def one_process(cache: str, model: str, dtype: torch.dtype | None) -> Observed:
    return run_gang(1, observe, flags(cache, model), SCRIPT, dtype=dtype)[0]


# name: (ranks, tp, model, layout)
CASES = {
    "tp2": (2, 2, "", "--tensor-model-parallel-size 2"),
    "tp4 + sp": (4, 4, "", "--tensor-model-parallel-size 4 --sequence-parallel"),
    "pp2": (2, 1, "", "--pipeline-model-parallel-size 2"),
    "pp4": (4, 1, "", "--pipeline-model-parallel-size 4"),
    "pp2 x vpp2": (2, 1, "", "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"),
    "dp2": (2, 1, "", ""),
    "dp2 + distopt + overlap": (
        2, 1, "",
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 5000",
    ),
    "tp2 + sp x pp2": (
        4, 2, "", "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel"
    ),
    "tp2 x pp2 x dp2": (
        8, 2, "",
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer",
    ),
    "recompute full": (
        1, 1, "", "--recompute-granularity full --recompute-method uniform --recompute-num-layers 2"
    ),
    "recompute selective": (2, 2, "", "--tensor-model-parallel-size 2 --sequence-parallel --recompute-activations"),
    "no binary head tp2 x pp2": (
        4, 2, "--bert-no-binary-head", "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"
    ),
    "untied, post-LN, rope tp2 + sp x pp2": (
        4, 2,
        "--untie-embeddings-and-output-weights --apply-residual-connection-post-layernorm --position-embedding-type rope",
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --sequence-parallel",
    ),
}  # fmt: skip
IN_SINGLE_PRECISION = ("tp2 + sp x pp2", "pp2 x vpp2", "dp2 + distopt + overlap")


@pytest.mark.parametrize("case", CASES)
def test_layout_equals_one_process(case: str, cache: str) -> None:
    check(case, cache, torch.float64, 1e-12)


@pytest.mark.parametrize("case", IN_SINGLE_PRECISION)
def test_layout_equals_one_process_in_single_precision(case: str, cache: str) -> None:
    check(case, cache, None, 2e-6)


def check(case: str, cache: str, dtype: torch.dtype | None, bound: float) -> None:
    ranks, tp, model, layout = CASES[case]
    expected = one_process(cache, model, dtype)
    assert len(expected.gradients) == STEPS
    argv = flags(cache, f"{model} {layout}", tp)
    for rank, worst in enumerate(run_gang(ranks, compare, argv, expected, SCRIPT, dtype=dtype)):
        for what in ("gradient", "parameter", "token_loss", "norm"):
            error, where = getattr(worst, what)
            assert error <= bound, f"rank {rank}: {what} differs by {error:.2e} at {where}"
        assert not worst.zeros, f"rank {rank}: number of zeros at {worst.zeros}"
