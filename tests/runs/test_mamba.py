"""Hybrid pretraining: every layout computes what one process does, resumes bit for bit, and refuses what it cannot do."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.training.config import rules
from tests.gang.harness import GangError, run_gang
from tests.runs.pretraining import Observed, compare, observe, read_records, run_script
from tests.runs.test_bert import refused
from tests.runs.test_resume import assert_same_runs, stop_and_resume

STEPS = 3
TOY = "--spec tests.unit.ssm.support toy_stack_spec "
COMMON = (
    "--hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 --micro-batch-size 2 "
    "--global-batch-size 8 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --mock-data --tokenizer-type NullTokenizer "
    "--vocab-size 100 --num-workers 0 --attention-dropout 0 --hidden-dropout 0 --eval-iters 0 --log-interval 1 "
    f"--adam-eps 1e-3 --train-iters {STEPS} --log-num-zeros-in-grad --distributed-backend gloo "
    f"--normalization RMSNorm {TOY}"
)
HYBRID = (
    "--num-layers 8 --hybrid-override-pattern M*-MM-*M --position-embedding-type none "
    "--untie-embeddings-and-output-weights --disable-bias-linear "
)
PLAIN = "--num-layers 4 "  # Mamba alone, tied and with a table of positions
GATED = (
    "--num-layers 4 --hybrid-attention-ratio 0.25 --hybrid-mlp-ratio 0.25 --position-embedding-type rope --swiglu "
    "--group-query-attention --num-query-groups 2 "
)
#: The padded vocabulary must not depend on the layout, or other logits would enter the softmax.
VOCABULARY = 128
SCRIPT = "pretrain_mamba"


def flags(layout: str = "", tp: int = 1) -> list[str]:
    return (f"{COMMON} --make-vocab-size-divisible-by {VOCABULARY // tp} {layout}").split()


@functools.cache
def one_process(model: str, dtype: torch.dtype | None) -> Observed:
    return run_gang(1, observe, flags(model), SCRIPT, dtype=dtype)[0]


TP2, PP2 = "--tensor-model-parallel-size 2 ", "--pipeline-model-parallel-size 2 "
FULL = "--recompute-granularity full --recompute-method "
# name: (ranks, tp, model, layout)
CASES = {
    "tp2": (2, 2, HYBRID, TP2),
    "tp4": (4, 4, HYBRID, "--tensor-model-parallel-size 4"),
    "tp2 + sp": (2, 2, HYBRID, TP2 + "--sequence-parallel"),
    "pp2": (2, 1, HYBRID, PP2),
    "pp2 deferred": (2, 1, HYBRID, PP2 + "--defer-embedding-wgrad-compute"),
    "pp4": (4, 1, HYBRID, "--pipeline-model-parallel-size 4"),
    "pp2 uneven": (2, 1, HYBRID, PP2 + "--decoder-first-pipeline-num-layers 3"),
    "embedding stage": (2, 1, HYBRID, PP2 + "--standalone-embedding-stage"),
    "dp2": (2, 1, HYBRID, ""),
    "dp2 + distopt + overlap": (
        2, 1, HYBRID,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 5000",
    ),
    "tp2 + sp x pp2": (4, 2, HYBRID, TP2 + PP2 + "--sequence-parallel"),
    "tp2 + sp x dp2 + distopt": (4, 2, HYBRID, TP2 + "--sequence-parallel --use-distributed-optimizer"),
    "recompute uniform": (1, 1, HYBRID, FULL + "uniform --recompute-num-layers 3"),
    "recompute block": (2, 1, HYBRID, PP2 + FULL + "block --recompute-num-layers 2"),
    "recompute selective": (2, 2, HYBRID, TP2 + "--sequence-parallel --recompute-activations"),
    "tp2 distributed activations": (
        2, 2, HYBRID, TP2 + FULL + "uniform --recompute-num-layers 1 --distribute-saved-activations"
    ),
    "plain tp2": (2, 2, PLAIN, TP2),
    "plain pp2": (2, 1, PLAIN, PP2),
    "gated tp2 + sp x pp2": (4, 2, GATED, TP2 + PP2 + "--sequence-parallel"),
}  # fmt: skip
IN_SINGLE_PRECISION = ("tp2 + sp x pp2", "dp2 + distopt + overlap")
#: One case per mechanism; the others are combinations and variants of them.
QUICK = (
    "pp2", "pp2 deferred", "dp2 + distopt + overlap", "tp2 + sp x pp2", "recompute uniform", "recompute selective",
    "plain tp2", "gated tp2 + sp x pp2",
)  # fmt: skip
slow = pytest.mark.slow


@pytest.mark.parametrize("case", [pytest.param(c, marks=[] if c in QUICK else [slow]) for c in CASES])
def test_layout_equals_one_process(case: str) -> None:
    check(case, torch.float64, 1e-12)


@slow
@pytest.mark.parametrize("case", IN_SINGLE_PRECISION)
def test_layout_equals_one_process_in_single_precision(case: str) -> None:
    """Measured: 1.7e-5 at most, of A_log, whose gradient is a difference of sums over the sequence."""
    check(case, None, 4e-5)


def check(case: str, dtype: torch.dtype | None, bound: float) -> None:
    ranks, tp, model, layout = CASES[case]
    expected = one_process(model, dtype)
    assert len(expected.gradients) == STEPS
    argv = flags(f"{model} {layout}", tp)
    for rank, worst in enumerate(run_gang(ranks, compare, argv, expected, SCRIPT, dtype=dtype)):
        worst.check(bound, f"rank {rank}")


#: Overrides what the parity runs have: dropout, twice the steps, evaluation on the way.
RESUME = "--attention-dropout 0.1 --hidden-dropout 0.1 --train-iters 6 --eval-iters 1 --eval-interval 2 --save-interval 3"
RESUMED = [
    ("torch", 2, TP2 + "--sequence-parallel --bf16"),
    ("torch_dist", 2, PP2 + "--bf16"),
    pytest.param("torch", 2, PP2, marks=slow),
    pytest.param("torch_dist", 4, TP2 + "--use-distributed-optimizer --bf16", marks=slow),
]


@pytest.mark.parametrize(("ckpt_format", "ranks", "layout"), RESUMED)
def test_resumed_run_is_the_uninterrupted_run(
    tmp_path: Path, ckpt_format: str, ranks: int, layout: str
) -> None:
    argv = [*flags(HYBRID + layout), *RESUME.split(), "--ckpt-format", ckpt_format]
    run_gang(ranks, stop_and_resume, str(tmp_path), argv, SCRIPT)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


DISTOPT = " --use-distributed-optimizer "


@pytest.mark.parametrize(
    ("ranks", "tp", "layout"),
    [
        (1, 1, ""),
        (2, 1, PP2),
        pytest.param(4, 4, "--tensor-model-parallel-size 4 --sequence-parallel", marks=slow),
    ],
    ids=["tp1", "pp2", "tp4"],
)
@pytest.mark.parametrize(
    "optimizer", [pytest.param("", marks=slow), DISTOPT], ids=["adam", "distributed"], scope="module"
)
def test_goes_on_in_another_layout(
    tmp_path: Path, saved: Path, ranks: int, tp: int, layout: str, optimizer: str
) -> None:
    """From a torch_dist checkpoint of two tensor-parallel ranks: the losses of the run that stayed there."""
    argv = [
        *flags(HYBRID + layout + optimizer, tp),
        "--load",
        str(saved),
        "--ckpt-step",
        "2",
        "--train-iters",
        "4",
    ]
    run_gang(ranks, run_script, [*argv, "--metrics-file", str(tmp_path / "own.jsonl")], SCRIPT)
    own, expected = losses(tmp_path / "own.jsonl"), losses(saved / "metrics.jsonl")
    assert sorted(own) == [3, 4]
    assert own == pytest.approx({step: expected[step] for step in own}, rel=1e-5)


@pytest.mark.parametrize("optimizer", [DISTOPT], ids=["distributed"], scope="module")
def test_checkpoint_says_what_its_layers_are(tmp_path: Path, saved: Path) -> None:
    """--use-checkpoint-args takes the pattern over too."""
    model = HYBRID.replace("--hybrid-override-pattern M*-MM-*M ", "")
    words = [
        "--load",
        str(saved),
        "--use-checkpoint-args",
        "--train-iters",
        "5",
        "--no-load-optim",
        "--finetune",
    ]
    layout = [*TP2.split(), "--metrics-file", str(tmp_path / "own.jsonl")]
    [printed, _] = run_gang(2, run_script, [*flags(model, 2), *words, *layout], SCRIPT)
    assert "Setting hybrid_override_pattern to M*-MM-*M from checkpoint" in printed
    assert max(losses(tmp_path / "own.jsonl")) == 5


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, optimizer: str) -> Path:
    """Four steps with two tensor-parallel ranks, saved after two."""
    folder = tmp_path_factory.mktemp("saved")
    argv = [*flags(HYBRID + TP2 + optimizer, 2), "--save", str(folder), "--save-interval", "2"]
    ranks = 4 if optimizer else 2
    run_gang(ranks, run_script, [*argv, "--train-iters", "4", "--ckpt-format", "torch_dist"], SCRIPT)
    return folder


def losses(metrics: Path) -> dict[int, float]:
    return {line["iteration"]: line["lm loss"] for line in read_records(metrics) if line["kind"] == "train"}


@pytest.mark.parametrize("rule", rules.HYBRID, ids=lambda rule: rule.bad)
def test_refuses_what_it_cannot_do(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(rule, COMMON + HYBRID, rules.HYBRID, monkeypatch)


@pytest.mark.parametrize("rule", rules.GPT, ids=lambda rule: rule.bad)
def test_other_models_refuse_hybrid_flags(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    common = COMMON.replace(TOY, "")
    refused(rule, common + "--num-layers 4 ", rules.GPT, monkeypatch)
    assert rule in rules.BERT and rule in rules.T5


def test_refuses_what_is_no_stack() -> None:
    gpt = "--spec megatron.core.models.gpt.gpt_layer_specs get_gpt_layer_local_spec"
    with pytest.raises(GangError, match=r"FlagError: --spec .* no ModuleSpec of a stack"):
        run_gang(1, run_script, flags(f"{PLAIN} {gpt}"), SCRIPT)


@pytest.mark.parametrize("script", [pytest.param(SCRIPT, marks=slow), "pretrain_gpt"])
def test_a_wide_residual_stream_crosses_stages(script: str) -> None:
    """bf16 parameters, fp32 between the layers: two stages compute what one process computes."""
    model = "--num-layers 4 --bf16 --fp32-residual-connection "
    words = flags(model) if script == SCRIPT else " ".join(flags(model)).replace(TOY.strip(), "").split()
    expected = run_gang(1, observe, words, script)[0]
    for worst in run_gang(2, compare, [*words, *PP2.split()], expected, script):
        assert worst.gradient[0] < 1e-2 and worst.token_loss[0] < 1e-3, worst


def test_flags_that_do_nothing_are_named() -> None:
    [printed] = run_gang(
        1, run_script, [*flags(PLAIN), "--transformer-impl", "local", "--train-iters", "1"], SCRIPT
    )
    assert "--transformer-impl has no effect on hybrid models" in printed
