"""Real runs: continue the recorded v0.9 checkpoints, and stop and resume our own, in every layout and format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.core.dist_checkpointing.safe_load import load_file
from megatron.core.dist_checkpointing.strategies.resharding import Box
from megatron.core.dist_checkpointing.strategies.torch import StoredTensors
from tests.gang import training_run
from tests.gang.harness import run_gang

ITERATION = "iter_0000002"
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


def _leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """Every value of nested dicts and lists by its path; empty ones too."""
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, (list, tuple))
        else None
    )
    if items is None:
        return {path: tree}
    found = {path: type(tree)}
    for name, value in items:
        found.update(_leaves(value, f"{path}/{name}"))
    return found


@pytest.mark.parametrize(
    ("variant", "world", "distopt"), [("torch_dp1", 1, False), ("torch_dp2_distopt", 2, True)]
)
def test_what_is_written_is_what_was_read(
    recorded: Path, tmp_path: Path, variant: str, world: int, distopt: bool
) -> None:
    """v0.9's files loaded and saved again: the same entries in the same order, types, shapes, dtypes and bits."""
    cli = [*training_run.recorded_cli(), *_layout(distopt=distopt), "--ckpt-format", "torch"]
    cli += ["--global-batch-size", str(2 * world), "--load", str(recorded / variant), "--save", str(tmp_path)]
    run_gang(world, training_run.run, cli, 0, [2])
    names = ["model_optim_rng.pt", *(["distrib_optim.pt"] if distopt else [])]
    for name in names:
        _assert_same_file(
            *(load_file(root / ITERATION / "mp_rank_00" / name) for root in (tmp_path, recorded / variant))
        )


def _assert_same_file(ours: Any, theirs: Any) -> None:
    if "args" in theirs:
        missing = set(vars(theirs.pop("args"))) - set(vars(ours.pop("args")))
        assert not missing, missing
    ours, theirs = _leaves(ours), _leaves(theirs)
    assert list(ours) == list(theirs)
    for path, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert ours[path].dtype == value.dtype and torch.equal(ours[path], value), path
        elif isinstance(value, np.ndarray):
            assert np.array_equal(ours[path], value), path
        else:
            assert type(ours[path]) is type(value) and ours[path] == value, path


@pytest.mark.parametrize(
    ("variant", "world", "distopt", "extra"),
    [
        ("td_dp1", 1, False, []),
        ("td_dp2_distopt", 2, True, []),
        ("td_dp2_dpzero", 2, True, ["--no-ckpt-fully-parallel-save"]),
    ],
)
def test_torch_dist_is_written_as_it_was_read(
    recorded: Path, tmp_path: Path, variant: str, world: int, distopt: bool, extra: list[str]
) -> None:
    """v0.9's directory loaded and saved again: the same keys, shapes, dtypes, tensors and common values."""
    cli = [
        *training_run.recorded_cli(),
        *_layout(distopt=distopt),
        *extra,
        "--global-batch-size",
        str(2 * world),
    ]
    cli += ["--load", str(recorded / variant), "--save", str(tmp_path)]
    run_gang(world, training_run.run, cli, 0, [2])
    places = [root / ITERATION for root in (tmp_path, recorded / variant)]
    _assert_same_file(*(load_file(place / "common.pt") for place in places))
    ours, theirs = (StoredTensors(place) for place in places)
    assert sorted(ours.keys()) == sorted(theirs.keys())
    for key in filter(theirs.is_tensor, theirs.keys()):
        shape = theirs.shape(key)
        assert ours.shape(key) == shape and ours.dtype(key) == theirs.dtype(key), key
        one, other = (torch.zeros(shape, dtype=theirs.dtype(key)) for _ in places)
        ours.read_box(key, Box((0,) * len(shape), shape), one)
        theirs.read_box(key, Box((0,) * len(shape), shape), other)
        assert torch.equal(one, other), key


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


_EXPERTS = ["--expert-model-parallel-size", "2"]


@pytest.mark.parametrize("precision", [[], ["--bf16"]])
@pytest.mark.parametrize("saved", [(2, [*_layout(distopt=True), *_EXPERTS]), (1, _layout())])
def test_experts_continue_divided_or_not(
    tmp_path: Path, saved: tuple[int, list[str]], precision: list[str]
) -> None:
    """Divided experts have an optimizer of their own, others do not: master weights, moments and steps move between."""
    base = [*training_run.recorded_cli(), *precision, "--global-batch-size", "4", "--no-load-rng"]
    base += ["--num-experts", "4", "--moe-router-topk", "2", "--moe-router-load-balancing-type", "none"]
    save = ["--save", str(tmp_path)]
    straight = run_gang(saved[0], training_run.run, [*base, *saved[1], *save], 4, [2])
    others = [
        (1, _layout(distopt=True)),
        (2, [*_layout(), *_EXPERTS]),
        (4, [*_layout(1, 2, True), *_EXPERTS]),
    ]
    tolerance = 2e-2 if precision else 2e-6
    for world, layout in others:
        results = run_gang(world, training_run.run, [*base, *layout, "--load", str(tmp_path)], 2)
        for result in results:
            for (loss, norm), wanted in zip(result["trajectory"], straight[0]["trajectory"][2:]):
                assert (norm if loss is None else (loss, norm)) == pytest.approx(
                    wanted[1] if loss is None else wanted, rel=tolerance
                ), layout
