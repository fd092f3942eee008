"""`--fp8-param-gather`: the run without it, bit for bit, with weights that are kept and sent as bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron.core.collectives import all_gather_single
from megatron.core.distributed import param_and_grad_buffer
from tests.gang.harness import run_gang
from tests.runs.pretraining import run_script
from tests.runs.test_resume import COMMON, STEPS, STOP, assert_same_runs, forget, log_of, stop_and_resume

FLAGS = COMMON + "--bf16 --use-distributed-optimizer "
DELAYED = "--fp8-format hybrid --fp8-amax-history-len 3 --fp8-amax-compute-algo max "
TENSORWISE = "--fp8-format e4m3 --fp8-recipe tensorwise "
KEPT = "--fp8-param-gather "


def logged(ranks: int, flags: str, folder: Path) -> list[dict[str, Any]]:
    run_gang(ranks, run_script, [*(FLAGS + flags).split(), "--save", str(folder), "--no-save-optim"])
    return log_of(folder)


#: Logged sums of the whole model that may differ, and by how much: fp8 parameters have buffers of their own, so float64
#: sums over gradients are reordered; norms of parameters are those of the rounded weights (measured: 1.1e-4).
CLOSE = {"grad_norm": 1e-14, "params_norm": 2e-4}


def assert_same_log(got: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Equal bits but for the entries of CLOSE."""
    for line, other in zip(got, expected, strict=True):
        assert line.keys() == other.keys()
        for key, value in line.items():
            assert value == (pytest.approx(other[key], rel=CLOSE[key]) if key in CLOSE else other[key]), key


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, DELAYED),
        (1, DELAYED + "--no-gradient-accumulation-fusion "),
        pytest.param(
            2, DELAYED + "--no-gradient-accumulation-fusion --no-fp8-wgrad ", marks=pytest.mark.slow
        ),
        pytest.param(2, TENSORWISE, marks=pytest.mark.slow),
        (
            2,
            DELAYED
            + "--overlap-grad-reduce --overlap-param-gather --first-last-layers-bf16 --data-parallel-random-init "
            "--log-params-norm --check-weight-hash-across-dp-replicas-interval 2 ",
        ),
        (4, DELAYED + "--tensor-model-parallel-size 2 --sequence-parallel "),
        pytest.param(
            2,
            TENSORWISE + "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 ",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_everything_logged_is_what_it_is_without(tmp_path: Path, ranks: int, flags: str) -> None:
    """Training losses, gradient norms and validation losses."""
    without = logged(ranks, flags, tmp_path / "without")
    assert sum(line["kind"] == "train" for line in without) == STEPS
    assert_same_log(logged(ranks, flags + KEPT, tmp_path / "kept"), without)


def gathered_bytes(argv: list[str]) -> dict[torch.dtype, int]:
    """Body: a run; bytes of parameters gathered in it, by dtype."""
    sent: dict[torch.dtype, int] = {}

    def counting(output: Tensor, *rest: Any, **options: Any) -> Any:
        sent[output.dtype] = sent.get(output.dtype, 0) + output.nbytes
        return all_gather_single(output, *rest, **options)

    with mock.patch.object(param_and_grad_buffer, "all_gather_single", counting):
        run_script(argv)
    return sent


def test_weights_of_fp8_layers_are_sent_as_bytes() -> None:
    """4 layers of 12 x 32 x 32 weights are kept as bytes, the rest (words, positions, norms, biases) in bf16."""
    argv = (FLAGS.replace(f"--save-interval {STOP}", "") + DELAYED).split()
    without, kept = (run_gang(2, gathered_bytes, [*argv, *more])[0] for more in ([], KEPT.split()))
    weights = STEPS * 4 * 12 * 32 * 32
    assert kept[torch.uint8] == weights
    assert without[torch.bfloat16] - kept[torch.bfloat16] == pytest.approx(2 * weights, rel=0.02)  # filling


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (2, DELAYED + "--ckpt-format torch"),
        (4, DELAYED + "--ckpt-format torch_dist --tensor-model-parallel-size 2 --swiglu"),
        pytest.param(
            2,
            TENSORWISE + "--ckpt-format torch_dist --overlap-grad-reduce --overlap-param-gather",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path: Path, ranks: int, flags: str) -> None:
    run_gang(ranks, stop_and_resume, str(tmp_path), (FLAGS + KEPT + flags).split())
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


def stop_and_switch(folder: str, argv: list[str], first: str, then: str) -> None:
    """Body: a run with the flags `first`, and another that stops half way and goes on with the flags `then`."""
    whole, parts = Path(folder) / "whole", Path(folder) / "parts"
    run_script([*argv, *first.split(), "--save", str(whole)])
    forget()
    run_script([*argv, *first.split(), "--save", str(parts), "--exit-interval", str(STOP)])
    forget()
    run_script([*argv, *then.split(), "--save", str(parts), "--load", str(parts)])


@pytest.mark.parametrize(
    ("flags", "first", "then"),
    [
        (DELAYED + "--ckpt-format torch", "", KEPT),
        (TENSORWISE + "--ckpt-format torch_dist", KEPT, ""),
        pytest.param(TENSORWISE + "--ckpt-format torch_dist", "", KEPT, marks=pytest.mark.slow),
    ],
)
def test_it_may_be_switched_between_runs(tmp_path: Path, flags: str, first: str, then: str) -> None:
    """The weights in the file differ by fp8's rounding, the optimizer's copies do not, and training follows those."""
    run_gang(2, stop_and_switch, str(tmp_path), (FLAGS + flags).split(), first, then)
    assert_same_log(log_of(tmp_path / "parts"), log_of(tmp_path / "whole"))


def finetune_both_ways(folder: str, argv: list[str]) -> None:
    """Body: a run whose weights alone two others start from, with and without fp8 parameters."""
    trained = Path(folder) / "trained"
    run_script([*argv, "--save", str(trained)])
    for name, more in (("without", []), ("kept", KEPT.split())):
        forget()
        run_script([*argv, *more, "--load", str(trained), "--save", str(Path(folder) / name), "--finetune"])


def test_main_copies_of_loaded_weights_keep_what_fp8_rounds_away(tmp_path: Path) -> None:
    """Copies made of the rounded weights would train to other losses."""
    run_gang(1, finetune_both_ways, str(tmp_path), (FLAGS + DELAYED + "--ckpt-format torch").split())
    assert_same_log(log_of(tmp_path / "kept"), log_of(tmp_path / "without"))
