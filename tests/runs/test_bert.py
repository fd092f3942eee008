"""BERT pretraining: every layout computes what one process computes, resumes bit for bit, and refuses what it cannot do."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
import torch

import pretrain_bert
from megatron.core.errors import FlagError
from megatron.training import arguments
from megatron.training.config import rules
from tests.gang.harness import run_gang
from tests.runs.pretraining import Observed, compare, observe, records
from tests.runs.test_resume import assert_same_runs, stop_and_resume

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


#: Overrides what the parity runs have: dropout, twice the steps, evaluation on the way.
RESUME = "--attention-dropout 0.1 --hidden-dropout 0.1 --train-iters 6 --eval-iters 1 --eval-interval 2 --save-interval 3"
RESUMED = [
    ("torch", 1, "--bf16"),
    (
        "torch_dist",
        4,
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --use-distributed-optimizer",
    ),
]


@pytest.mark.parametrize(("ckpt_format", "ranks", "layout"), RESUMED)
def test_resumed_run_is_the_uninterrupted_run(
    tmp_path: Path, cache: str, ckpt_format: str, ranks: int, layout: str
) -> None:
    argv = flags(cache, layout) + RESUME.split() + ["--ckpt-format", ckpt_format]
    run_gang(ranks, stop_and_resume, str(tmp_path), argv, SCRIPT)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


def captured(argv: list[str]) -> tuple[list[Any], list[dict[str, Any]]]:
    """Body: what each call of the loss function got and gave, and what the run reported."""
    calls: list[Any] = []
    loss_func = pretrain_bert.loss_func

    def watched(loss_mask: Any, order: Any, output: Any) -> Any:
        loss, parts = loss_func(loss_mask, order, output)
        tensors = [t.detach().double().numpy() for t in (loss_mask, order, *output)]
        calls.append((tensors, loss.item(), {name: value.item() for name, value in parts.items()}))
        return loss, parts

    with mock.patch.object(pretrain_bert, "loss_func", watched):
        return calls, records(argv, SCRIPT)


def test_losses_are_means_over_masked_words_and_over_pairs(cache: str) -> None:
    """Each micro-batch: mean over masked words, plus the cross entropy of pairs; the log averages over all."""
    results = run_gang(2, captured, flags(cache))
    steps = [line for line in results[1][1] if line["kind"] == "train"]
    assert len(steps) == STEPS and len(results[0][0]) == 2 * STEPS
    reported: dict[str, list[float]] = {"lm loss": [], "sop loss": []}
    for calls in zip(results[0][0], results[1][0]):
        expected = [by_hand(*call[0]) for call in calls]
        for (_, loss, parts), own in zip(calls, expected):
            assert loss == pytest.approx(sum(own.values()), rel=1e-6)
            for name, values in reported.items():
                assert parts[name] == pytest.approx(sum(e[name] for e in expected) / 2, rel=1e-6)
                values.append(own[name])
    for index, line in enumerate(steps):
        for name, values in reported.items():
            assert line[name] == pytest.approx(sum(values[4 * index : 4 * index + 4]) / 4, rel=1e-6)


def by_hand(mask: Any, order: Any, per_token: Any, logits: Any) -> dict[str, float]:
    log_p = logits - numpy.log(numpy.exp(logits).sum(1, keepdims=True))
    return {
        "lm loss": (per_token * mask).sum() / mask.sum(),
        "sop loss": -log_p[numpy.arange(len(order)), order.astype(int)].mean(),
    }


@pytest.mark.parametrize("rule", rules.BERT, ids=lambda rule: rule.bad)
def test_refuses_what_it_cannot_do(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(rule, COMMON, rules.BERT, monkeypatch)


def refused(rule: Any, common: str, all_rules: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command line that breaks `rule` and no other; without what breaks it, none is broken."""
    monkeypatch.setenv("WORLD_SIZE", "12")
    for bad in ("", rule.bad):
        words = common.split()
        for word in bad.split():
            if word.startswith("-") and not word.startswith("--"):
                at = words.index("-" + word)
                del words[at : at + 2]
            else:
                words.append(word)
        args = arguments.validate_args(arguments.parse_args(argv=words))
        if not bad:
            rules.check(args, all_rules)
            continue
        with pytest.raises(FlagError) as error:
            rules.check(args, all_rules)
        assert error.value.subject == ", ".join(rule.flags)
