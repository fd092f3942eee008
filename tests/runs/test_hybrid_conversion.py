"""tools/checkpoint/hybrid_conversion.py against the files that runs in the target layout write of the same weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron.core.dist_checkpointing.safe_load import load_file
from tests.gang.harness import run_gang
from tests.runs.pretraining import read_records, run_script
from tests.runs.test_mamba import GATED, HYBRID, SCRIPT, flags
from tools.checkpoint import conversion
from tools.checkpoint.hybrid_layout import main

MODELS = {"untied": HYBRID, "gated, tied, with biases": GATED}
LAYOUTS = {"tp1": (1, 1), "tp2": (2, 1), "pp2": (1, 2), "tp2 pp2": (2, 2)}
SIZES = "--d-model 32 --mamba-d-state 8 --mamba2-n-groups 4 --mamba2-head-dim 4"


def sizes_of(layout: str) -> str:
    tp, pp = LAYOUTS[layout]
    return f"--tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp} "


@pytest.fixture(
    scope="module", params=[pytest.param("untied", marks=pytest.mark.slow), "gated, tied, with biases"]
)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One trained model as runs of each layout write it in the torch format."""
    folder, model = tmp_path_factory.mktemp("written"), MODELS[request.param]
    save = ["--save", str(folder / "source"), "--save-interval", "3", "--ckpt-format", "torch_dist"]
    run_gang(1, run_script, [*flags(model), *save], SCRIPT)
    result = {}
    for layout, (tp, pp) in LAYOUTS.items():
        words = ["--load", str(folder / "source"), "--ckpt-convert-format", "torch"]
        words += ["--ckpt-convert-save", str(folder / layout)]
        run_gang(tp * pp, run_script, [*flags(model + sizes_of(layout), tp), *words], SCRIPT)
        result[layout] = folder / layout / "torch"
    return result


def convert(source: Path, target: Path, layout: str, *more: str) -> int:
    tp, pp = LAYOUTS[layout]
    words = ["--load-dir", str(source), "--save-dir", str(target), *SIZES.split()]
    return main([*words, "--target-tp-size", str(tp), "--target-pp-size", str(pp), *more])


def files(directory: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: load_file(path) for path in directory.glob("*/mp_rank_*/model_optim_rng.pt")}


@pytest.mark.parametrize(
    ("source", "target"),
    [("tp1", "tp2 pp2"), ("tp2 pp2", "tp1"), ("tp2", "pp2"), ("pp2", "tp2"), ("tp2 pp2", "tp2 pp2")],
)
def test_files_are_those_of_a_run_in_the_target_layout(
    written: dict[str, Path], tmp_path: Path, source: str, target: str
) -> None:
    assert convert(written[source], tmp_path, target) == 0
    ours, theirs = files(tmp_path), files(written[target])
    assert ours.keys() == theirs.keys()
    for name, state in theirs.items():
        expected = {key: value for key, value in state["model"].items() if isinstance(value, torch.Tensor)}
        weights = {
            key: value for key, value in ours[name]["model"].items() if isinstance(value, torch.Tensor)
        }
        assert weights.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(weights[key], value), f"{name}: {key}"
        assert ours[name]["iteration"] == state["iteration"] == 3
        assert ours[name]["args"].tensor_model_parallel_size == LAYOUTS[target][0]
        assert ours[name]["opt_param_scheduler"] == state["opt_param_scheduler"]


@pytest.mark.parametrize(
    "more", [[], pytest.param(["--reset-iterations"], marks=pytest.mark.slow)], ids=["goes on", "begins anew"]
)
def test_a_converted_checkpoint_trains(written: dict[str, Path], tmp_path: Path, more: list[str]) -> None:
    """Without the optimizer, which is not converted; counters of a release begin at zero."""
    target = tmp_path / "converted"
    assert convert(written["tp1"], target, "tp2", *more) == 0
    assert (target / "latest_checkpointed_iteration.txt").read_text() == ("release" if more else "3")
    untied = files(written["tp1"])["mp_rank_00"]["args"].untie_embeddings_and_output_weights
    words = [
        "--load",
        str(target),
        "--no-load-optim",
        "--no-load-rng",
        "--train-iters",
        "5",
        "--ckpt-format",
        "torch",
    ]
    words += ["--metrics-file", str(tmp_path / "metrics.jsonl")]
    run_gang(2, run_script, [*flags((HYBRID if untied else GATED) + sizes_of("tp2"), 2), *words], SCRIPT)
    steps = [
        line["iteration"] for line in read_records(tmp_path / "metrics.jsonl") if line["kind"] == "train"
    ]
    assert steps == ([1, 2, 3, 4, 5] if more else [4, 5])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--d-model 64 --mamba-d-state 8 --mamba2-n-groups 4 --mamba2-head-dim 4", "--d-model"),
        ("--d-model 33 --mamba2-head-dim 4", "--d-model"),
        (f"{SIZES} --target-tp-size 3", "--target-tp-size: 3"),
        (f"{SIZES} --target-pp-size 3", "--target-pp-size"),
        (f"{SIZES} --target-tp-size 0", "--target-tp-size"),
        (f"{SIZES} --mamba-version 1", "--mamba-version"),
    ],
)
def test_refusals_name_the_flag(
    written: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture, words: str, said: str
) -> None:
    target = tmp_path / "target"
    assert main(["--load-dir", str(written["tp1"]), "--save-dir", str(target), *words.split()]) != 0
    message = capsys.readouterr().err
    assert said in message and " Fix: " in message and message.count("\n") == 1
    assert not target.exists() or not list(target.iterdir())


def test_other_checkpoints_are_refused(
    written: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = written["tp1"]
    assert convert(source, source, "tp2") != 0
    assert "--save-dir" in capsys.readouterr().err
    assert convert(source.parent.parent / "source", tmp_path, "tp2") != 0
    assert "distributed checkpoint" in capsys.readouterr().err
    assert convert(tmp_path / "nothing", tmp_path, "tp2") != 0
    assert "nothing" in capsys.readouterr().err


@pytest.mark.parametrize("ckpt_format", ["torch", "torch_dist"])
def test_the_general_converter_refuses_hybrids(
    written: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture, ckpt_format: str
) -> None:
    source = written["pp2"] if ckpt_format == "torch" else written["pp2"].parent.parent / "source"
    words = ["--model-type", "GPT", "--loader", "mcore", "--saver", "mcore", "--load-dir", str(source)]
    assert conversion.main([*words, "--save-dir", str(tmp_path / "target")]) == 1
    assert "it is a hybrid model's" in capsys.readouterr().err
    assert not (tmp_path / "target").exists() or not list((tmp_path / "target").glob("iter_*"))


def test_the_script_runs_from_anywhere(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "tools" / "checkpoint" / "hybrid_conversion.py"
    done = subprocess.run(
        [sys.executable, str(script), "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "--mamba2-n-groups" in done.stdout, done.stderr
