"""What inspect.py tells of recorded checkpoints and of our own, and of two that differ."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.unit.checkpointing.toy import Run, arguments, one_process
from tests.unit.models import recorded
from tools.checkpoint import inspection


def _inspect(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["inspect.py", *map(str, arguments)])
    status = inspection.main()
    return status, capsys.readouterr().out


@pytest.fixture
def _world() -> Iterator[None]:
    with one_process():
        yield


def test_recorded_rank_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Layout, arguments, and the norm of every tensor; equal layers share a line with the range of their norms."""
    with tarfile.open(recorded.ROOT / "vpp" / "checkpoints.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    status, text = _inspect(monkeypatch, capsys, tmp_path / "tp1pp1")
    assert status == 0
    assert "format      torch, checkpoint version 3.0" in text
    assert "written by  not recorded" in text and "checksums   none" in text
    assert "position    iteration 100, 200 training samples" in text
    assert re.search(r"^  num_layers +4$", text, re.M)
    weights = recorded.weights("vpp")
    name = "mlp.linear_fc2.weight"
    norms = [weights[f"decoder.layers.{layer}.{name}"].norm().item() for layer in range(4)]
    (line,) = (line for line in text.splitlines() if name in line)
    assert line.split() == [
        f"model.decoder.layers.0-3.{name}", "float32", "[32,", "128]", "norm", f"{min(norms):.4g}", "..",
        f"{max(norms):.4g}",
    ]  # fmt: skip
    _, every = _inspect(monkeypatch, capsys, tmp_path / "tp1pp1", "--all")
    assert len(re.findall(r"  norm [\d.]+$", every, re.M)) == len(
        [w for w in weights.values() if isinstance(w, torch.Tensor)]
    )
    _, plain = _inspect(monkeypatch, capsys, tmp_path / "tp1pp2vpp2", "--no-norms")
    assert "pipeline 2, virtual pipeline 2" in plain and "norm " not in plain
    assert "model in mp_rank_00_001" in plain


@pytest.mark.usefixtures("_world")
@pytest.mark.parametrize("ckpt_format", ["torch", "torch_dist"])
def test_own_checkpoints(
    tmp_path: Path, ckpt_format: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which versions wrote it, and exactly what changed from one iteration to the next."""
    run = Run(arguments(tmp_path, ckpt_format=ckpt_format))
    run.step()
    run.save()
    with torch.no_grad():
        run.model.second.bias[3] += 0.5
    run.iteration = 2
    run.args.seed = 7
    run.save()
    capsys.readouterr()
    first, second = tmp_path / "iter_0000001", tmp_path / "iter_0000002"
    status, text = _inspect(monkeypatch, capsys, tmp_path)
    assert status == 0 and str(second) in text
    assert f"torch {torch.__version__}" in text and re.search(r"^  written by  megatron \d", text, re.M)
    assert "optimizer" in text and "rng_state" in text
    status, text = _inspect(monkeypatch, capsys, first, second)
    assert status == 1
    assert re.search(r"^  seed +absent +7$", text, re.M)
    differing = text.partition("tensors that differ: ")[2].splitlines()
    assert differing[0] == "1" and "second.bias: by up to 0.5" in differing[1]
    status, text = _inspect(monkeypatch, capsys, first, first)
    assert status == 0 and "are equal" in text
    monkeypatch.setattr("sys.argv", ["inspect.py", str(tmp_path / "nothing")])
    assert inspection.main() == 1
    assert "neither mp_rank_* files nor metadata.json" in capsys.readouterr().err
