"""BERT pretraining: every layout computes what one process computes, resumes bit for bit, and refuses what it cannot do."""

from __future__ import annotations

import functools
import importlib
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pytest
import torch

import pretrain_bert
from megatron.core.enums import ModelType
from megatron.core.errors import FlagError
from megatron.training import arguments, initialize_megatron
from megatron.training.checkpointing import load_checkpoint
from megatron.training.checkpointing.legacy import adapt_weights
from megatron.training.config import rules
from megatron.training.setup import get_model
from megatron.training.utils import unwrap_model
from tests.gang.harness import run_gang
from tests.runs.pretraining import Observed, amended, compare, observe, records
from tests.runs.test_resume import assert_same_runs, stop_and_resume
from tests.unit.models import recorded

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "checkpoints"
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


@pytest.mark.slow
@pytest.mark.parametrize("case", IN_SINGLE_PRECISION)
def test_layout_equals_one_process_in_single_precision(case: str, cache: str) -> None:
    check(case, cache, None, 2e-6)


def check(case: str, cache: str, dtype: torch.dtype | None, bound: float) -> None:
    ranks, tp, model, layout = CASES[case]
    expected = one_process(cache, model, dtype)
    assert len(expected.gradients) == STEPS
    argv = flags(cache, f"{model} {layout}", tp)
    for rank, worst in enumerate(run_gang(ranks, compare, argv, expected, SCRIPT, dtype=dtype)):
        worst.check(bound, f"rank {rank}")


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


RECORDED = [
    ("bert", "tp1pp1"),
    ("bert", "torch_dist"),
    ("legacy_bert", "tp1pp1"),
    ("legacy_bert", "v0"),
    ("legacy_bert", "v1"),
    ("legacy_bert", "v3_layernorm"),
]


@pytest.mark.parametrize(("name", "source"), RECORDED)
def test_recorded_checkpoint_computes_what_it_did(name: str, source: str, tmp_path: Path) -> None:
    """`--load` of every format and age, with the recorded command line: v0.9's logits, losses and gradient norms."""
    [result] = run_gang(1, loaded, SCRIPT, name, str(unpacked(name, tmp_path) / source), recorded_batch)
    assert_as_recorded(name, *result)


def unpacked(name: str, folder: Path) -> Path:
    with tarfile.open(GOLDEN / name / "checkpoints.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def recorded_batch(model: torch.nn.Module, name: str) -> dict[str, torch.Tensor]:
    return recorded.run("bert", model, recorded.arrays(name, "batch.npz"))


def loaded(
    script: str, name: str, source: str, run: Callable[[torch.nn.Module, str], dict[str, torch.Tensor]]
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Body: the entry script's model with the weights of `source`; what `run` gives, and every gradient's norm."""
    entry = importlib.import_module(script)
    unknown_here = ("--use-legacy-models", "--mock-data")
    cli = json.loads((GOLDEN / name / "config.json").read_text())["cli"]
    argv = [word for word in cli if word not in unknown_here] + [
        "--load",
        source,
        "--metrics-file",
        "/dev/null",
    ]
    with mock.patch("sys.argv", [script, *argv]):
        initialize_megatron()
    # The recorded vocabulary has no tokens for spans, without which one cannot train a T5 but load it.
    kind = ModelType.encoder_and_decoder if script == "pretrain_t5" else ModelType.encoder_or_decoder
    with mock.patch.object(rules, "T5", []):
        model = get_model(entry.model_provider, kind, wrap_with_ddp=False)
    load_checkpoint(model, None, None)
    [plain] = unwrap_model(model)
    results = run(plain, name)
    results["loss"].backward()
    norms = {key: p.grad.norm().item() for key, p in plain.named_parameters()}
    return {key: value.detach().float() for key, value in results.items()}, norms


def assert_as_recorded(name: str, results: dict[str, torch.Tensor], norms: dict[str, float]) -> None:
    for key, value in recorded.arrays(name, "expected.npz").items():
        torch.testing.assert_close(
            results[key], value, rtol=1e-5, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}"
        )
    expected = recorded.grad_norms(name)
    if name.startswith("legacy"):
        nested: dict[str, Any] = {"language_model": {}}
        for key, norm in expected.items():
            nested["language_model"][key.removeprefix("language_model.")] = norm
        renamed = adapt_weights(nested, norms, 3.0, 1)
        expected = {key: renamed[key] for key in norms}
    assert norms.keys() == expected.keys()
    for key, norm in norms.items():
        assert norm == pytest.approx(expected[key], rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("rule", rules.BERT, ids=lambda rule: rule.bad)
def test_refuses_what_it_cannot_do(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(rule, COMMON, rules.BERT, monkeypatch)


def refused(rule: Any, common: str, all_rules: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command line that breaks `rule` and no other; without what breaks it, none is broken."""
    monkeypatch.setenv("WORLD_SIZE", "12")
    for bad in ("", rule.bad):
        words = amended(common.split(), bad)
        args = arguments.validate_args(arguments.parse_args(argv=words))
        if not bad:
            rules.check(args, all_rules)
            continue
        with pytest.raises(FlagError) as error:
            rules.check(args, all_rules)
        assert error.value.subject == ", ".join(rule.flags)
