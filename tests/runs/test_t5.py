"""T5 pretraining: every layout computes what one process computes, resumes bit for bit, and refuses what it cannot do."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import pretrain_t5
from megatron.training.config import rules
from tests.gang.harness import run_gang
from tests.runs.pretraining import Observed, compare, observe
from tests.runs.test_bert import assert_as_recorded, loaded, refused, unpacked
from tests.runs.test_resume import assert_same_runs, stop_and_resume
from tests.unit.datasets.support import recorded_samples
from tests.unit.models import recorded

DATA = Path(__file__).resolve().parents[1] / "golden" / "data"
STEPS = 3
COMMON = (
    "--hidden-size 32 --num-attention-heads 4 --kv-channels 6 --ffn-hidden-size 80 --encoder-seq-length 32 "
    "--decoder-seq-length 16 --max-position-embeddings 32 --vocab-extra-ids 20 --micro-batch-size 2 "
    "--global-batch-size 8 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine "
    f"--data-path {DATA}/bin/bert_text_sentence --vocab-file {DATA}/vocab/bert-vocab.txt --split 949,50,1 "
    "--num-workers 0 --attention-dropout 0 --hidden-dropout 0 --eval-iters 0 --log-interval 1 --adam-eps 1e-3 "
    f"--train-iters {STEPS} --log-num-zeros-in-grad --distributed-backend gloo "
)
EVEN = "--encoder-num-layers 4 "
UNEVEN = "--encoder-num-layers 3 --decoder-num-layers 4 "
#: The padded vocabulary must not depend on the layout, or other logits would enter the softmax.
VOCABULARY = 1536
SCRIPT = "pretrain_t5"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def flags(cache: str, layout: str = "", tp: int = 1) -> list[str]:
    padding = f" --make-vocab-size-divisible-by {VOCABULARY // tp} --data-cache-path {cache} "
    return (COMMON + padding + layout).split()


@functools.cache
def one_process(cache: str, model: str, dtype: torch.dtype | None) -> Observed:
    return run_gang(1, observe, flags(cache, model), SCRIPT, dtype=dtype)[0]


ENC1 = "--encoder-pipeline-model-parallel-size 1 --pipeline-model-parallel-size "
# name: (ranks, tp, model, layout)
CASES = {
    "tp2": (2, 2, EVEN, "--tensor-model-parallel-size 2"),
    "tp4 + sp": (4, 4, EVEN, "--tensor-model-parallel-size 4 --sequence-parallel"),
    "enc1 + dec1": (2, 1, EVEN, ENC1 + "1"),
    "split rank 1 of 2": (
        2, 1, EVEN, "--pipeline-model-parallel-size 2 --pipeline-model-parallel-split-rank 1"
    ),
    "enc1 + dec2, other depths": (3, 1, UNEVEN, ENC1 + "2"),
    "enc2 + dec2": (
        4, 1, EVEN, "--encoder-pipeline-model-parallel-size 2 --pipeline-model-parallel-size 2"
    ),
    "tp2 + sp x (enc1 + dec1)": (4, 2, EVEN, "--tensor-model-parallel-size 2 --sequence-parallel " + ENC1 + "1"),
    "dp2": (2, 1, EVEN, ""),
    "dp2 + distopt + overlap": (
        2, 1, EVEN,
        "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 5000",
    ),
    "(enc1 + dec1) x dp2 + distopt + overlap": (
        4, 1, EVEN,
        ENC1 + "1 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 5000",
    ),
    "tp2 x (enc1 + dec1) x dp2": (8, 2, EVEN, "--tensor-model-parallel-size 2 --use-distributed-optimizer " + ENC1 + "1"),
    "recompute full": (
        1, 1, EVEN, "--recompute-granularity full --recompute-method uniform --recompute-num-layers 2"
    ),
    "recompute selective": (2, 2, EVEN, "--tensor-model-parallel-size 2 --sequence-parallel --recompute-activations"),
    "untied, rope tp2 x (enc1 + dec1)": (
        4, 2, EVEN + "--untie-embeddings-and-output-weights --position-embedding-type rope ",
        "--tensor-model-parallel-size 2 " + ENC1 + "1",
    ),
    "per-token loss (enc1 + dec1) x dp2": (4, 1, EVEN + "--calculate-per-token-loss ", ENC1 + "1"),
}  # fmt: skip
IN_SINGLE_PRECISION = ("tp2 + sp x (enc1 + dec1)", "enc2 + dec2", "dp2 + distopt + overlap")


@pytest.mark.parametrize("case", CASES)
def test_layout_equals_one_process(case: str, cache: str) -> None:
    check(case, cache, torch.float64, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("case", IN_SINGLE_PRECISION)
def test_layout_equals_one_process_in_single_precision(case: str, cache: str) -> None:
    check(case, cache, None, 1e-5)


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
    ("torch", 1, EVEN + "--bf16"),
    ("torch_dist", 4, EVEN + "--tensor-model-parallel-size 2 --use-distributed-optimizer " + ENC1 + "1"),
]


@pytest.mark.parametrize(("ckpt_format", "ranks", "layout"), RESUMED)
def test_resumed_run_is_the_uninterrupted_run(
    tmp_path: Path, cache: str, ckpt_format: str, ranks: int, layout: str
) -> None:
    argv = flags(cache, layout) + RESUME.split() + ["--ckpt-format", ckpt_format]
    run_gang(ranks, stop_and_resume, str(tmp_path), argv, SCRIPT)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    ("name", "source"), [("t5", "tp1pp1"), ("t5", "torch_dist"), ("legacy_t5", "tp1pp1")]
)
def test_recorded_checkpoint_computes_what_it_did(name: str, source: str, tmp_path: Path) -> None:
    """`--load` with the recorded command line: v0.9's logits, losses and gradient norms."""
    [result] = run_gang(1, loaded, SCRIPT, name, str(unpacked(name, tmp_path) / source), recorded_batch)
    assert_as_recorded(name, *result)


def recorded_batch(model: torch.nn.Module, name: str) -> dict[str, torch.Tensor]:
    batch = recorded.arrays(name, "batch.npz")
    if name == "legacy_t5":
        # v0.9's first T5 did not hand its cross-attention the mask: it looked at the encoder's padding.
        batch["enc_dec_mask"] = torch.ones_like(batch["enc_dec_mask"])
    return recorded.run("t5", model, batch)


@pytest.mark.parametrize("rule", rules.T5, ids=lambda rule: rule.bad)
def test_refuses_what_it_cannot_do(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(rule, COMMON + EVEN, rules.T5, monkeypatch)


def test_masks_are_those_of_recorded_samples() -> None:
    """The masks that get_batch makes from the tokens hide what the recorded datasets' masks hide."""
    samples = {key: torch.tensor(value) for key, value in recorded_samples("t5", "default", "train").items()}
    encoder, decoder = samples["text_enc"] >= 1, samples["text_dec"] >= 1
    assert torch.equal(pretrain_t5.hidden_pairs(encoder, encoder), samples["enc_mask"] < 0.5)
    assert torch.equal(pretrain_t5.hidden_pairs(decoder, encoder), samples["enc_dec_mask"] < 0.5)
    # The decoder gets no mask but looks left: the same for every token that is not padding.
    left = torch.ones_like(samples["dec_mask"][0]).tril().bool()
    for real, mask in zip(decoder, samples["dec_mask"]):
        assert torch.equal(left[real], mask[real].bool())
