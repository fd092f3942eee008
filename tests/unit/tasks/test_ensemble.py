"""The ensemble tool against recordings of v0.9: what it prints and writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron.core.errors import DataError, FlagError
from tasks import ensemble_classifier
from tests.unit.tasks.support import expected


@pytest.fixture(params=["a", "b"])
def runs(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, list[str]]:
    paths = []
    for number, predictions in enumerate(expected(f"ensemble/{request.param}/predictions.json")):
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        torch.save(predictions, folder / "test_predictions.pt")
        paths.append(str(folder))
    return request.param, paths


def test_recorded_runs(
    runs: tuple[str, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, paths = runs
    for number, case in enumerate(expected(f"ensemble/{name}/expected.json")):
        target = tmp_path / f"out{number}"
        ensemble_classifier.main(["--paths", *paths, "--outdir", str(target), *case["args"]])
        assert capsys.readouterr().out == case["stdout"]
        written = {p.relative_to(target).as_posix(): p.read_text() for p in target.rglob("*") if p.is_file()}
        assert written == case["files"]


@pytest.mark.parametrize("runs", ["b"], indirect=True)
def test_one_threshold_for_all(runs: tuple[str, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    ensemble_classifier.main(["--paths", *runs[1], "--eval", "--calc-threshold", "--one-threshold"])
    assert capsys.readouterr().out == "threshold [0.16]\n0.75\n0.75\n"


@pytest.mark.parametrize("runs", ["a"], indirect=True)
def test_what_it_refuses(runs: tuple[str, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    paths = runs[1]
    for words, flag in (
        (["--one-threshold"], "--one-threshold"),
        (["--calc-threshold"], "--calc-threshold"),
        (["--threshold", "0.1"], "--threshold"),
    ):
        with pytest.raises(FlagError, match=f"^{flag}:"):
            ensemble_classifier.main(["--paths", *paths, *words])
    with pytest.raises(DataError, match=r"readable none\.pt"):
        ensemble_classifier.main(["--paths", *paths, "--prediction-name", "none.pt"])
    assert "none.pt" in capsys.readouterr().out
