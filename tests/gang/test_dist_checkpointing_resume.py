"""Real runs: continue the recorded v0.9 checkpoints, and stop and resume our own, in every layout and format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.gang import training_run
from tests.gang.harness import run_gang

RECORDED = dict(np.load(training_run.GOLDEN / "resume.npz"))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_run.unpack(tmp_path_factory.mktemp("opt"))


def _layout(tp: int = 1, pp: int = 1, distopt: bool = False) -> list[str]:
    flags = ["--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp)]
    return [*flags, *(["--use-distributed-optimizer"] if distopt else [])]


def _compare(results: list[dict[str, Any]], expected: np.ndarray) -> None:
    """Every rank's gradient norms and the last stage's losses against recorded (loss, norm) rows."""
    for result in results:
        for (loss, norm), (wanted_loss, wanted_norm) in zip(result["trajectory"], expected):
            assert norm == pytest.approx(wanted_norm, rel=2e-6)
            assert loss is None or loss == pytest.approx(wanted_loss, rel=1e-6)
    assert any(loss is not None for result in results for loss, _ in result["trajectory"])


@pytest.mark.parametrize(
    ("variant", "world", "layout", "extra"),
    [
        ("torch_dp1", 1, _layout(), ["--ckpt-format", "torch"]),
        ("torch_dp2_distopt", 2, _layout(distopt=True), ["--ckpt-format", "torch"]),
        ("torch_dp2_distopt", 1, _layout(distopt=True), ["--ckpt-format", "torch"]),
        ("td_dp1", 1, _layout(), []),
        ("td_dp1", 2, _layout(tp=2), []),
        ("td_dp1", 2, _layout(pp=2), []),
        ("td_dp1", 1, _layout(distopt=True), []),
        ("td_dp2_distopt", 2, _layout(distopt=True), []),
        ("td_dp2_distopt", 2, _layout(distopt=True), ["--ckpt-fully-parallel-load"]),
        ("td_dp2_distopt", 2, _layout(tp=2, distopt=True), []),
        ("td_dp2_distopt", 2, _layout(pp=2, distopt=True), []),
        ("td_dp2_distopt", 4, _layout(tp=2, distopt=True), []),
        ("td_dp2_distopt", 1, _layout(), []),
        ("td_dp2_distopt", 2, _layout(pp=2), []),
        ("td_dp2_dpzero", 2, _layout(distopt=True), ["--no-ckpt-fully-parallel-save"]),
    ],
)
def test_recorded_checkpoints_continue(
    recorded: Path, variant: str, world: int, layout: list[str], extra: list[str]
) -> None:
    """Steps 3 and 4 after loading v0.9's iteration 2 equal v0.9's, also in layouts it was not saved in."""
    # The schedule counts samples, so the global batch stays as recorded whatever the layout.
    samples = "4" if "dp2" in variant else "2"
    cli = [*training_run.recorded_cli(), *layout, *extra, "--load", str(recorded / variant)]
    cli += ["--global-batch-size", samples]
    results = run_gang(world, training_run.run, cli, 2)
    assert {result["iteration"] for result in results} == {4}
    _compare(results, RECORDED[f"{variant}/resume/traj"])


@pytest.mark.parametrize(
    ("world", "layout", "extra"),
    [
        (1, _layout(), ["--ckpt-format", "torch"]),
        (1, _layout(), ["--ckpt-format", "torch", "--bf16"]),
        (1, _layout(), ["--ckpt-format", "torch", "--fp16", "--initial-loss-scale", "1024"]),
        (2, _layout(distopt=True), ["--ckpt-format", "torch", "--bf16"]),
        (2, _layout(), ["--ckpt-format", "torch"]),
        (4, _layout(2, 2), ["--ckpt-format", "torch"]),
        (1, _layout(), []),
        (1, _layout(), ["--fp16", "--initial-loss-scale", "1024"]),
        (2, _layout(distopt=True), ["--bf16", "--async-save"]),
        (2, _layout(distopt=True), ["--no-ckpt-fully-parallel-save"]),
        (
            2,
            _layout(2, distopt=True),
            ["--swiglu", "--untie-embeddings-and-output-weights", "--sequence-parallel"],
        ),
        (4, _layout(2, 2), ["--bf16"]),
        (4, _layout(1, 2, True), ["--ckpt-fully-parallel-load"]),
    ],
)
def test_stopping_changes_nothing(tmp_path: Path, world: int, layout: list[str], extra: list[str]) -> None:
    """Two steps, a save, a new process and two more steps give the bits of four steps, dropout and all."""
    cli = [*training_run.recorded_cli(), *layout, *extra, "--save", str(tmp_path), "--global-batch-size", "4"]
    cli += ["--hidden-dropout", "0.1", "--attention-dropout", "0.1"]
    straight = run_gang(world, training_run.run, cli, 4, [2])
    # Another state of the generators shows that those of the checkpoint are used.
    resumed = run_gang(world, training_run.run, [*cli, "--load", str(tmp_path)], 2, (), 17)
    for one, other in zip(straight, resumed):
        assert other.pop("trajectory") == one.pop("trajectory")[2:]
        assert one == other


@pytest.mark.parametrize("precision", [[], ["--bf16"]])
def test_any_layout_continues_in_any_other(tmp_path: Path, precision: list[str]) -> None:
    """Saved in one layout with optimizer, continued in another: the losses of the next steps do not change."""
    base = [*training_run.recorded_cli(), *precision, "--global-batch-size", "4", "--no-load-rng"]
    layouts = [
        (1, _layout()),
        (2, _layout(2)),
        (2, _layout(distopt=True)),
        (4, _layout(2, 2, False)),
        (4, _layout(1, 2, True)),
        (4, _layout(2, 1, True)),
    ]
    tolerance = 2e-2 if precision else 2e-6
    for number, (world, saved) in enumerate(layouts):
        save = ["--save", str(tmp_path / str(number))]
        straight = run_gang(world, training_run.run, [*base, *saved, *save], 4, [2])
        wanted = next(r["trajectory"] for r in straight if r["trajectory"][0][0] is not None)[2:]
        for shift in (1, 3):
            other_world, loaded = layouts[(number + shift) % len(layouts)]
            results = run_gang(other_world, training_run.run, [*base, *loaded, "--load", save[1]], 2)
            for result in results:
                for (loss, norm), (wanted_loss, wanted_norm) in zip(result["trajectory"], wanted):
                    assert norm == pytest.approx(wanted_norm, rel=tolerance), (saved, loaded)
                    assert loss is None or loss == pytest.approx(wanted_loss, rel=tolerance), (saved, loaded)
