"""`--moe-use-upcycling`: experts that are all copies of the dense MLP compute what it computes, from the first step on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron.core.errors import FlagError
from tests.gang.harness import run_gang
from tests.runs.pretraining import read_records, run_script
from tests.runs.test_resume import forget

COMMON = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16 "
    "--micro-batch-size 2 --global-batch-size 4 --lr 1e-2 --lr-decay-iters 8 --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 50 --transformer-impl local --num-workers 0 --train-iters 3 "
    "--eval-iters 0 --log-interval 1 --distributed-backend gloo --attention-dropout 0 --hidden-dropout 0 --save-interval 2 "
)


def dense_and_upcycled(folder: str, layout: str) -> dict[str, Any]:
    """Body: a dense run, its second checkpoint as a mixture of experts, the same again, and what follows the mixture."""
    dense, mixture = Path(folder) / "dense", Path(folder) / "mixture"
    experts = f"--num-experts 4 --moe-use-upcycling --load {dense} --ckpt-step 2 --save {mixture} {layout}"
    run_script([*COMMON.split(), "--save", str(dense)])
    forget()
    run_script([*COMMON.split(), *experts.split()])
    forget()
    refused = ""
    try:
        run_script([*COMMON.split(), *experts.split()])
    except FlagError as error:
        refused = error.subject
    forget()
    resumed = f"--num-experts 4 --load {mixture} --save {mixture} --train-iters 4 {layout}"
    run_script([*COMMON.split(), *resumed.split()])
    return {
        "refused": refused,
        "saved": sorted(path.name for path in mixture.glob("iter_*")),
        "dense": [r for r in read_records(dense / "metrics.jsonl") if r["kind"] == "train"],
        "mixture": [r for r in read_records(mixture / "metrics.jsonl") if r["kind"] == "train"],
    }


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (1, "--ckpt-format torch"),
        pytest.param(2, "--expert-model-parallel-size 2", marks=pytest.mark.slow),
        pytest.param(  # the vocabulary padded as the dense run's
            2,
            "--tensor-model-parallel-size 2 --sequence-parallel --make-vocab-size-divisible-by 64 --bf16",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_starts_where_the_dense_model_was(ranks: int, layout: str, tmp_path: Path) -> None:
    seen = run_gang(ranks, dense_and_upcycled, str(tmp_path), layout)[-1]
    assert seen["refused"] == "--moe-use-upcycling, --save"
    assert seen["saved"] == [f"iter_{step:07d}" for step in (1, 2, 3, 4)]
    # Iteration 1 is the checkpoint itself; the data go on where the dense run had come to.
    first, third = seen["mixture"][0], seen["dense"][2]
    assert (first["iteration"], third["iteration"]) == (2, 3)
    assert first["consumed_samples"] == third["consumed_samples"]
    assert first["lm loss"] == pytest.approx(third["lm loss"], rel=1e-3 if "bf16" in layout else 1e-5)
    assert [record["iteration"] for record in seen["mixture"]] == [2, 3, 4]
