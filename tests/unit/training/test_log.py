"""Log lines, scalars and reports, character for character as v0.9 recorded them."""

from __future__ import annotations

import json
import math
import re
from argparse import Namespace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron.training import log, progress, theoretical_memory_usage
from megatron.training.context import TrainContext
from megatron.training.flops import num_floating_point_operations

GOLDEN = Path(__file__).parents[2] / "golden/training"


def cases(name: str) -> list[dict[str, Any]]:
    return json.loads((GOLDEN / f"{name}.json").read_text())["cases"]


def number(value: Any) -> float | str:
    """As the recording writes it: non-finite numbers as text."""
    return float(value) if math.isfinite(value) else str(float(value))


class Writer:
    """Stands for TensorBoard and W&B: keeps what is written."""

    def __init__(self) -> None:
        self.scalars: list[list[Any]] = []
        self.logged: list[list[Any]] = []

    def add_scalar(self, tag: str, value: Any, step: int) -> None:
        self.scalars.append([tag, number(value), step])

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append([{key: number(value) for key, value in values.items()}, step])


class FixedTimers:
    """Timers whose interval is given and that note what is asked of them."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.calls: list[list[Any]] = []

    def __call__(self, name: str, log_level: int | None = None) -> FixedTimers:
        return self

    def elapsed(self, barrier: bool = False) -> float:
        return self.seconds

    def log(self, names: list[str], normalizer: float = 1.0) -> None:
        self.calls.append(["log", names, normalizer])

    def write(self, names: list[str], writer: Any, iteration: int, normalizer: float = 1.0) -> None:
        self.calls.append(["write_timers", names, iteration, normalizer])


BASE = {
    "train_iters": 100, "log_interval": 1, "tensorboard_log_interval": 1, "log_timers_to_tensorboard": False,
    "log_throughput": False, "log_world_size_to_tensorboard": False, "log_loss_scale_to_tensorboard": True,
    "log_memory_to_tensorboard": False, "decoupled_lr": None, "micro_batch_size": 2, "data_parallel_size": 2,
    "world_size": 4, "mfu_peak_tflops": None, "seq_length": 32, "num_layers": 2, "hidden_size": 64,
    "num_attention_heads": 4, "kv_channels": 16, "ffn_hidden_size": 256, "padded_vocab_size": 5120,
    "group_query_attention": False, "num_query_groups": 1, "num_experts": None, "moe_router_topk": 2, "swiglu":
    False, "log_validation_ppl_to_tensorboard": False,
}  # fmt: skip


@pytest.mark.parametrize("case", cases("train_log_lines"), ids=lambda case: case["name"])
def test_training_lines_and_scalars(case: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    args = Namespace(**{**BASE, **case["args"]})
    timers, writer, wandb = FixedTimers(case["interval_time_elapsed_s"]), Writer(), Writer()
    ctx = TrainContext(args, timers, tensorboard=writer, wandb=wandb)  # type: ignore[arg-type]
    totals: dict[str, Any] = {}
    for step in case["steps"]:
        given = step["input"]
        args.consumed_train_samples = given["consumed_train_samples"]
        args.skipped_train_samples = given.get("skipped_train_samples", 0)
        writer.scalars, wandb.logged, timers.calls = [], [], []
        with mock.patch.object(log, "get_num_microbatches", return_value=case["num_microbatches"]):
            log.training_log(
                {key: torch.tensor([float(value)]) for key, value in given["loss_dict"].items()},
                totals,
                given["lr"],
                given.get("dlr"),
                given["iteration"],
                given.get("loss_scale", 1.0),
                False,
                given.get("skipped", given.get("skipped_iter", 0)),
                given.get("grad_norm"),
                given.get("params_norm"),
                given.get("num_zeros"),
                ctx=ctx,
            )
        printed = [
            re.sub(r"\[\d{4}-.*?\]", "[YYYY-MM-DD HH:MM:SS]", x) for x in capsys.readouterr().out.splitlines()
        ]
        assert printed == step["lines"]
        assert close(writer.scalars, step["tensorboard"])
        assert close(wandb.logged, step["wandb"])
        assert timers.calls == step["timer_calls"]


def close(ours: list[list[Any]], theirs: list[list[Any]]) -> bool:
    """Equal but for FLOP figures, which the recording took from another model."""

    def plain(rows: list[list[Any]]) -> list[list[Any]]:
        return [row for row in rows if row[0] != "throughput" and "throughput" not in str(row[0])]

    assert plain(ours) == plain(theirs)
    return len(ours) == len(theirs)


@pytest.mark.parametrize(
    "case", cases("eval_log_lines"), ids=lambda case: f"{case['name']}-{case['write_to_tensorboard']}"
)
def test_validation_lines_and_scalars(case: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    args = Namespace(
        **{**BASE, **{k: case[k] for k in ("log_validation_ppl_to_tensorboard", "consumed_train_samples")}}
    )
    writer, wandb = Writer(), Writer()
    ctx = TrainContext(args, FixedTimers(0.0), tensorboard=writer, wandb=wandb)  # type: ignore[arg-type]
    log.evaluation_log(
        case["prefix"], case["losses"], case["iteration"], case["write_to_tensorboard"], ctx=ctx
    )
    assert capsys.readouterr().out.splitlines() == case["lines"]
    assert writer.scalars == case["tensorboard"]
    assert wandb.logged == case["wandb"]


@pytest.mark.parametrize("case", cases("flops_and_memory"), ids=lambda case: case["name"])
def test_flops_and_memory(case: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    args = Namespace(**case["args"])
    for batch, expected in case["num_floating_point_operations"].items():
        assert num_floating_point_operations(args, int(batch)) == pytest.approx(expected, rel=1e-12)
    weights = theoretical_memory_usage.compute_weight_and_optimizer_memory(args)
    assert weights == pytest.approx(case["weight_and_optimizer_bytes"], rel=1e-12)
    for microbatches, expected in case["activation_bytes_by_num_microbatches"].items():
        number = None if microbatches == "None" else int(microbatches)
        ours = theoretical_memory_usage.compute_activation_memory(args, number)
        assert ours == pytest.approx(expected, rel=1e-12)
    capsys.readouterr()
    theoretical_memory_usage.report_theoretical_memory(args, case["report_num_microbatches"], verbose=True)
    assert capsys.readouterr().out == case["report_verbose_stdout"]
    theoretical_memory_usage.report_theoretical_memory(args)
    assert capsys.readouterr().out == case["report_quiet_no_microbatches_stdout"]


@pytest.mark.parametrize("case", cases("progress_log"), ids=lambda case: case["name"])
def test_start_time_from_progress_log(case: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "progress.txt").write_text(case["progress_txt"])
    ctx = TrainContext(Namespace(save=str(tmp_path), world_size=case["world_size"]), FixedTimers(0.0))  # type: ignore[arg-type]
    if "error" in case:
        with pytest.raises(Exception, match="Starting job"):
            progress.get_start_time_from_progress_log(ctx=ctx)
        return
    start, flops = progress.get_start_time_from_progress_log(ctx=ctx)
    assert str(start) == case["start_time"]
    assert flops == case["start_flops"]
