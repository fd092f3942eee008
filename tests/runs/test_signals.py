"""When runs stop on demand: signals, durations and intervals; and what each way of stopping leaves behind.

Whatever stopped a run, the resumed one ends with the bits of a run that never stopped.
"""

from __future__ import annotations

import math
import os
import re
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron.training import evaluate as evaluation
from megatron.training import training
from tests.gang.harness import run_gang
from tests.runs.pretraining import read_records, run_script
from tests.runs.test_resume import STEPS, assert_same_runs, forget, log_of

COMMON = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 "
    "--micro-batch-size 2 --global-batch-size 8 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --mock-data "
    "--tokenizer-type NullTokenizer --vocab-size 100 --transformer-impl local --num-workers 0 --ckpt-format torch "
    f"--train-iters {STEPS} --eval-iters 3 --eval-interval 2 --log-interval 1 --distributed-backend gloo "
    "--save-interval 100 --attention-dropout 0.1 --hidden-dropout 0.1 "
).split()
#: The same, without evaluation.
QUIET = ["0" if before == "--eval-iters" else word for before, word in zip(["", *COMMON], COMMON)]


def tracked(folder: Path) -> str:
    return (folder / "latest_checkpointed_iteration.txt").read_text()


def interrupted(argv: list[str], where: str, at: int, rank: int) -> str:
    """Body: a run whose rank `rank` gets SIGTERM in its training step or evaluation pass number `at`."""
    calls = 0

    def counted(real: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at and int(os.environ.get("RANK", "0")) == rank:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(*args, **kwargs)

        return wrapper

    module, name = (training, "train_step") if where == "step" else (evaluation, "_forward")
    with mock.patch.object(module, name, counted(getattr(module, name))):
        return run_script(argv)


def stop_by_signal(folder: str, where: str, at: int) -> str:
    """Body: a whole run in `whole`; one in `parts` that is told to end, and goes on."""
    run_script([*COMMON, "--save", f"{folder}/whole", "--exit-signal-handler"])
    forget()
    parts = ["--save", f"{folder}/parts", "--load", f"{folder}/parts", "--exit-signal-handler"]
    printed = interrupted([*COMMON, *parts], where, at, rank=0)
    stopped_at = tracked(Path(folder) / "parts")
    forget()
    run_script([*COMMON, *parts])
    return f"{stopped_at}\n{printed}"


@pytest.mark.parametrize(("where", "at", "saved"), [("step", 3, "3"), ("evaluation", 2, "2")])
def test_sigterm_saves_within_one_step(tmp_path: Path, where: str, at: int, saved: str) -> None:
    """In the third step, and in the second batch of the evaluation that follows the second step."""
    ranks = 2 if where == "step" else 1
    stopped_at, _, printed = run_gang(ranks, stop_by_signal, str(tmp_path), where, at)[0].partition("\n")
    assert stopped_at == saved
    assert "exiting program after receiving SIGTERM." in printed
    if where == "step":
        assert_same_runs(tmp_path / "whole", tmp_path / "parts")
        return
    # The evaluation that was cut short is not repeated; all that follows is as it would have been.
    cut = [line for line in log_of(tmp_path / "whole") if line != evaluations(tmp_path / "whole")[0]]
    assert log_of(tmp_path / "parts") == cut
    assert_same_runs(tmp_path / "whole", tmp_path / "parts", logs=False)


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [line for line in log_of(folder) if "at" in line]


def in_three_parts(folder: str, argv: list[str], ways: list[list[str]]) -> list[str]:
    """Body: a run in `whole` and one in `parts` that is stopped in each of `ways` first; what the parts printed."""
    run_script([*argv, "--save", f"{folder}/whole"])
    printed = []
    for way in [*ways, []]:
        forget()
        with mock.patch.object(training, "_PROCESS_STARTED", 0.0):  # time is up by now
            printed.append(
                run_script([*argv, "--save", f"{folder}/parts", "--load", f"{folder}/parts", *way])
            )
    return printed


def test_intervals_and_durations_end_a_run_with_a_checkpoint(tmp_path: Path) -> None:
    """`--exit-interval` at a multiple; `--exit-duration-in-mins` after the first step that ends too late."""
    ways = [["--exit-interval", "2"], ["--exit-duration-in-mins", "1"]]
    first, second, third = run_gang(1, in_three_parts, str(tmp_path), [*QUIET, "--log-progress"], ways)[0]
    assert "exiting program at iteration 2" in first and "iteration        3/" not in first
    assert "exiting program after" in second and "iteration        3/" in second
    assert "iteration        4/" not in second and "iteration        6/" in third
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")
    progress = (tmp_path / "parts" / "progress.txt").read_text().splitlines()
    kinds = [line.split("\t")[3] for line in progress]
    # The checkpoint of the last iteration is saved after the loop, and not noted.
    assert kinds == ["Starting job", "Saved checkpoint", "Starting job", "Saved checkpoint", "Starting job"]
    assert [line.split("\t")[4] for line in progress[1::2]] == ["Iteration: 2", "Iteration: 3"]


def test_the_newest_non_persistent_checkpoint_is_resumed(tmp_path: Path) -> None:
    """Saved every step beside a persistent one every third; only the newest is kept, and it wins when it is newer."""
    often = [
        "--non-persistent-save-interval",
        "1",
        "--non-persistent-ckpt-type",
        "global",
        "--ckpt-format",
        "torch_dist",
    ]
    argv = [*QUIET, *often, "--save-interval", "3"]
    run_gang(1, killed_run, argv, str(tmp_path), 5)
    kept = sorted(path.name for path in (tmp_path / "parts" / "non_persistent").glob("iter_*"))
    assert kept[-1] == "iter_0000005" and len(kept) <= 2 and tracked(tmp_path / "parts") == "3"
    run_gang(1, run_script, [*argv, "--save", f"{tmp_path}/parts", "--load", f"{tmp_path}/parts"])
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


def killed_run(argv: list[str], folder: str, after: int) -> None:
    """Body: a whole run, and one that fails in the step after `after`."""
    run_script([*argv, "--save", f"{folder}/whole"])
    forget()
    with pytest.raises(KeyboardInterrupt), mock.patch.object(training, "train_step", failing(after + 1)):
        run_script([*argv, "--save", f"{folder}/parts"])


def failing(at: int) -> Any:
    real, calls = training.train_step, 0

    def train_step(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    return train_step


def test_a_growing_batch_is_saved_before_it_grows(tmp_path: Path) -> None:
    """From 4 to 8 samples after 8 samples: a checkpoint of iteration 2, from which the run goes on alike."""
    argv = [*QUIET, "--rampup-batch-size", "4", "4", "8", "--train-samples", "32"]
    argv = without(argv, "--train-iters", "--lr-decay-style", "--save-interval")
    argv += ["--lr-decay-style", "linear", "--save-interval", "100"]
    sizes, names = run_gang(1, ramp_up, argv, str(tmp_path))[0]
    assert sizes == [4, 4, 8, 8, 8] and names[0] == "iter_0000002"


def ramp_up(argv: list[str], folder: str) -> tuple[list[int], list[str]]:
    """Body: batch sizes of a run with ramp-up, and its checkpoints."""
    run_script([*argv, "--save", folder])
    sizes = [line["global_batch_size"] for line in read_records(Path(folder) / "metrics.jsonl")]
    return sizes, sorted(path.name for path in Path(folder).glob("iter_*"))


def without(argv: list[str], *flags: str) -> list[str]:
    """A command line less some flags and their one value."""
    dropped = {i + k for i, word in enumerate(argv) if word in flags for k in (0, 1)}
    return [word for i, word in enumerate(argv) if i not in dropped]


def reuse(folder: str) -> dict[str, str]:
    """Body: what `--skip-train`, `--finetune`, `--ckpt-step` and the schedule's overrides make of a finished run."""
    saved = ["--save", folder, "--save-interval", "2"]
    run_script([*without(QUIET, "--save-interval"), *saved])
    load = [*without(COMMON, "--save-interval", "--lr"), "--load", folder, "--lr", "5e-4"]
    printed = {}
    for name, flags in {
        "skip": ["--skip-train", "--no-load-optim"],
        "finetune": ["--finetune"],
        "step": ["--ckpt-step", "4", "--override-opt_param-scheduler"],
        "recorded": ["--ckpt-step", "4", "--use-checkpoint-opt_param-scheduler"],
    }.items():
        forget()
        printed[name] = run_script([*load, *flags])
    return printed


def test_a_checkpoint_can_be_used_in_other_ways(tmp_path: Path) -> None:
    printed = run_gang(1, reuse, str(tmp_path))[0]
    assert "skipping training (--skip-train is on)" in printed["skip"]
    assert "validation loss at iteration 6 on validation set" in printed["skip"]
    assert " iteration " not in "".join(
        line[:30] for line in printed["skip"].splitlines() if "elapsed" in line
    )
    assert [iteration for iteration, _ in rates(printed["finetune"])][:1] == [1]
    assert [iteration for iteration, _ in rates(printed["step"])] == [5, 6]

    def cosine(peak: float, *done: int) -> list[float]:
        """The rates that lines show: those in force once as many of the six steps are taken."""
        return [1e-4 + (peak - 1e-4) * 0.5 * (math.cos(math.pi * n / STEPS) + 1) for n in done]

    # One starts anew; two go on at the fifth step, under the new peak and under the recorded one.
    for name, expected in {
        "finetune": cosine(5e-4, *range(1, STEPS + 1)),
        "step": cosine(5e-4, 5, 6),
        "recorded": cosine(1e-3, 5, 6),
    }.items():
        assert [rate for _, rate in rates(printed[name])] == pytest.approx(expected, rel=1e-5)


def rates(printed: str) -> list[tuple[int, float]]:
    """Iteration and learning rate of each iteration line."""
    found = re.findall(r" iteration +(\d+)/.*learning rate: (\S+) ", printed)
    return [(int(iteration), float(rate)) for iteration, rate in found]
