"""Dialogue prompting by a model of one's own: what plain PyTorch says greedily, on one process and on a pipeline."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from unittest import mock

from megatron.core.errors import FlagError
from tasks.msdp import main as msdp_main
from tests.gang.harness import run_gang
from tests.runs.test_tasks import GPT, logits_of, save_gpt
from tests.unit.tasks.support import tokenizer

NEW_TOKENS = 9


def run_prompting(argv: list[str]) -> str:
    """Body: the task; what this rank printed, or why it refuses."""
    printed = io.StringIO()
    with mock.patch("sys.argv", ["main.py", *argv]), contextlib.redirect_stdout(printed):
        try:
            msdp_main.run()
        except FlagError as error:
            return str(error)
    return printed.getvalue()


def test_lines_are_those_of_plain_pytorch(tmp_path: Path) -> None:
    weights = run_gang(1, save_gpt, str(tmp_path / "gpt"))[0]
    samples, examples, output = (tmp_path / name for name in ("samples", "examples", "out"))
    topics = ["boat", "at dawn", "keeper", "tea", "Q"]
    samples.write_text("".join(f"{topic}\thi [SEP] why\n" for topic in topics))
    rows = [{f"{topic} why": ["x => y"] * (number % 2)} for number, topic in enumerate(topics)]
    examples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = []
    for number, topic in enumerate(topics):
        tokens = tokenizer("gpt").tokenize("x => y \n" * (number % 2) + f"( why ) {topic} =>")
        said: list[int] = []
        while len(said) < NEW_TOKENS:
            token = int(logits_of(weights, tokens + said)[-1].argmax())
            if token == tokenizer("gpt").eod:
                break
            said.append(token)
        wanted.append(tokenizer("gpt").detokenize(said).partition("\n")[0].strip())
    assert len(set(wanted)) > 1
    words = f"--task MSDP-PROMPT --prompt-type knowledge --out-seq-length {NEW_TOKENS} --load {tmp_path}/gpt"
    argv = [*GPT.split(), *words.split(), "--prompt-file", str(examples), "--sample-input-file", str(samples)]
    argv += ["--sample-output-file", str(output)]
    for ranks, layout in (
        (1, ""),
        (2, "--pipeline-model-parallel-size 2"),
        (2, "--tensor-model-parallel-size 2"),
    ):
        output.unlink(missing_ok=True)
        run_gang(ranks, run_prompting, [*argv, *layout.split()])
        assert output.read_text().split("\n") == [*wanted, ""]
    (refusal,) = run_gang(1, run_prompting, [*argv, "--out-seq-length", "30"])
    assert refusal.startswith("--max-position-embeddings: ") and "30 new ones exceed its 32" in refusal
