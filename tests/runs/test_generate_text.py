"""tools/generate_text.py: a checkpoint says the same on one process and on a pipeline, whatever it was trained on."""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from unittest import mock

from megatron.core.errors import FlagError
from tests.gang.harness import run_gang
from tests.runs.pretraining import run_script

MODEL = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 48 "
    "--micro-batch-size 2 --lr 1e-2 --mock-data --tokenizer-type NullTokenizer --vocab-size 50 "
    "--transformer-impl local --distributed-backend gloo --ckpt-format torch_dist "
)
TRAINING = "--train-iters 4 --global-batch-size 4 --eval-iters 0 --num-workers 0 --save-interval 4 "
PROMPTS = ["--prompt", "5 6 7", "--prompt", "9 10 11 12 13", "--out-seq-length", "8", "--top-k", "1"]


def continue_prompts(argv: list[str]) -> list[str] | str:
    """Body: what the tool prints at the end, a line per prompt; or why it refuses."""
    from tools import generate_text

    printed = io.StringIO()
    with mock.patch.object(sys, "argv", ["generate_text.py", *argv]), contextlib.redirect_stdout(printed):
        try:
            generate_text.main()
        except FlagError as error:
            return str(error)
    return [line for line in printed.getvalue().splitlines() if line and line.replace(" ", "").isdigit()]


def test_a_pipeline_continues_as_one_process_does(tmp_path: Path) -> None:
    run_gang(1, run_script, [*(MODEL + TRAINING).split(), "--save", str(tmp_path)])
    argv = [*MODEL.split(), "--load", str(tmp_path), *PROMPTS]
    (expected,) = run_gang(1, continue_prompts, argv)
    assert [line[:6] for line in expected] == ["5 6 7 ", "9 10 1"]
    assert [len(line.split()) for line in expected] == [3 + 8, 5 + 8]
    for cut in ("1000", "8"):  # the batch whole, and row by row
        layout = ["--pipeline-model-parallel-size", "2", "--inference-batch-times-seqlen-threshold", cut]
        first, second = run_gang(2, continue_prompts, [*argv, *layout])
        assert (first, second) == (expected, [])
    for words, flag, reason in (
        (["--out-seq-length", "60"], "--max-position-embeddings", "5 prompt tokens and 60 new ones"),
        (["--max-tokens-to-oom", "20"], "--max-tokens-to-oom", "would hold 26 tokens"),
        (["--prompt", "hello"], "--prompt", "'hello' is not a list of ids"),
    ):
        (refusal,) = run_gang(1, continue_prompts, [*argv, *words])
        assert refusal.startswith(flag) and reason in refusal
