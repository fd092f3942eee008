"""Wrong files and directories end a run with one line that names the flag or file, the reason and the fix."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from tests.gang.harness import run_gang
from tests.runs.pretraining import run_script

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY / "tests" / "golden" / "data"
MODEL = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16 "
    "--micro-batch-size 1 --global-batch-size 2 --lr 1e-3 --train-iters 2 --eval-iters 0 --transformer-impl local "
    "--num-workers 0 --distributed-backend gloo --make-vocab-size-divisible-by 32 "
)
NULL = "--tokenizer-type NullTokenizer --vocab-size 30 "
MOCK = NULL + "--mock-data "
BPE = f"--tokenizer-type GPT2BPETokenizer --mock-data --vocab-file {DATA}/vocab/gpt2-vocab.json "

#: (flags, words of the message, exit status); `{dir}` is a folder with the files of `bad_files`.
CASES = {
    "no data": (NULL + "--data-path {dir}/nowhere", "nowhere .idx .bin", 1),
    "no .bin": (NULL + "--data-path {dir}/lonely", "lonely .bin", 1),
    "empty .idx": (NULL + "--data-path {dir}/empty", "empty.idx 0 bytes", 1),
    "foreign .idx": (NULL + "--data-path {dir}/foreign", "foreign.idx MMIDIDX", 1),
    "short .bin": (NULL + "--data-path {dir}/short", "short.idx .bin", 1),
    "cut .idx": (NULL + "--data-path {dir}/cut", "cut.idx", 1),
    "no vocabulary": (BPE.replace("gpt2-vocab", "no") + "--merge-file x", "--vocab-file no.json", 2),
    "no merges": (BPE + "--merge-file {dir}/no.txt", "--merge-file no.txt", 2),
    "foreign vocabulary": (
        "--tokenizer-type GPT2BPETokenizer --mock-data --vocab-file {dir}/foreign.bin --merge-file {dir}/foreign.bin",
        "foreign.bin", None,
    ),
    "foreign merges": (BPE + "--merge-file {dir}/foreign.bin", "foreign.bin", None),
    "foreign model": (
        "--tokenizer-type SentencePieceTokenizer --mock-data --tokenizer-model {dir}/foreign.bin", "foreign.bin", 1,
    ),
    "no tokenizer": (
        "--tokenizer-type HuggingFaceTokenizer --mock-data --tokenizer-model {dir}/none", "--tokenizer-model none", 2,
    ),
    "save below a file": (MOCK + "--save {dir}/afile --save-interval 1", "--save afile", 2),
    "save nowhere": (MOCK + "--save /proc/nowhere --save-interval 1", "--save /proc/nowhere", 2),
    "load nothing": (MOCK + "--load {dir}/none --exit-on-missing-checkpoint", "--load none", 1),
    "load damage": (MOCK + "--load {dir}/damaged", "damaged", 1),
    "load another shape": (MOCK + "--load {dir}/narrow --ckpt-format torch", "--hidden-size checkpoint", 1),
    "no cache": (MOCK + "--data-cache-path /proc/nowhere", "--data-cache-path /proc/nowhere", 1),
    "no TensorBoard": (MOCK + "--tensorboard-dir /proc/nowhere", "--tensorboard-dir /proc/nowhere", 2),
    "no metrics": (MOCK + "--metrics-file /proc/nowhere/m.jsonl", "--metrics-file /proc/nowhere", 2),
    "no YAML": (MOCK + "--yaml-cfg {dir}/no.yaml", "--yaml-cfg no.yaml", 2),
    "no layers": (MOCK + "--spec no.module thing", "--spec no.module", 2),
    "half a layer": (MOCK + "--spec no.module", "--spec no.module a module and a name in it", 2),
    "no settings of nccl": (MOCK + "--nccl-communicator-config-path {dir}/no.yaml", "--nccl-communicator-config-path", 2),
    "nccl settings that are none": (MOCK + "--nccl-communicator-config-path {dir}/list.yaml", "list.yaml per group", 1),
    "no config log": (MOCK + "--config-logger-dir /proc/nowhere", "--config-logger-dir /proc/nowhere", 2),
}  # fmt: skip


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    good = DATA / "bin" / "null32_text_document"
    index, content = good.with_suffix(".idx").read_bytes(), good.with_suffix(".bin").read_bytes()
    foreign = bytes(range(1, 256)) * 4
    files = {
        "lonely.idx": index, "empty.idx": b"", "empty.bin": b"", "foreign.idx": foreign, "foreign.bin": foreign,
        "short.idx": index, "short.bin": content[:20], "cut.idx": index[:-30], "cut.bin": content, "afile": b"",
        "list.yaml": b"- 1",
    }  # fmt: skip
    for name, data in files.items():
        (folder / name).write_bytes(data)
    for name, extra in (("damaged", ""), ("narrow", "--ckpt-format torch --hidden-size 8")):
        run_gang(1, run_script, f"{MODEL}{MOCK}--save {folder / name} --save-interval 2 {extra}".split())
    for path in (folder / "damaged").glob("iter_*/*"):
        path.write_bytes(foreign)
    return folder


def attempt(argv: list[str]) -> tuple[int | None, str]:
    """Body: the entry point's `main`, as a user starts it: its exit status and what it said."""
    script = importlib.import_module("pretrain_gpt")
    with (
        mock.patch.object(sys, "argv", ["pretrain_gpt.py", *argv]),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as said,
    ):
        try:
            script.main()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 0, said.getvalue()
    return 0, said.getvalue()


@pytest.mark.parametrize("case", CASES)
def test_bad_files_end_with_one_line(bad_files: Path, case: str) -> None:
    flags, words, status = CASES[case]
    code, said = run_gang(1, attempt, (MODEL + flags.format(dir=bad_files)).split())[0]
    assert code in ((1, 2) if status is None else (status,)), said
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in said, said
    assert all(word in lines[0] for word in words.split()), lines[0]
    assert re.search(r"Fix: \w", lines[0]) or case == "foreign model", lines[0]


def test_every_rank_ends_at_once(tmp_path: Path) -> None:
    """Under torchrun: a bad file stops both ranks; each says why at most once, and no traceback is ours."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    argv += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(REPOSITORY / "pretrain_gpt.py")]
    argv += (MODEL + NULL + f"--data-path {tmp_path}/nowhere").split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
    assert done.returncode == 1
    ours = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert 1 <= len(ours) <= 2 and all("nowhere" in line and "Fix:" in line for line in ours), done.stderr
    assert 'pretrain_gpt.py", line' not in done.stderr


def test_a_run_without_training_data_says_that_it_only_evaluates(tmp_path: Path) -> None:
    data = f"--tokenizer-type NullTokenizer --vocab-size 70000 --data-path {DATA}/bin/null32_text_document "
    (said,) = run_gang(
        1, run_script, (MODEL + data + f"--split 0,1,0 --eval-iters 1 --data-cache-path {tmp_path}").split()
    )
    assert "WARNING: nothing is trained, the train split has no data" in said
    assert "on validation set" in said and "iteration        1/" not in said
