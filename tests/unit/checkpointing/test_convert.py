"""Conversions against recorded checkpoints of other layouts, and against HuggingFace's own models and converters."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron.core.dist_checkpointing.safe_load import load_file
from tools.checkpoint.conversion import main

GOLDEN = Path(__file__).parents[2] / "golden" / "checkpoints"


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recorded")
    for model in ("gpt", "llama", "bert", "vpp", "legacy_gpt"):
        with tarfile.open(GOLDEN / model / "checkpoints.tar.xz") as archive:
            archive.extractall(root / model, filter="data")
    return root


def _convert(model_type: str, loader: str, saver: str, source: Path, target: Path, *extra: str) -> None:
    command = ["--model-type", model_type, "--loader", loader, "--saver", saver]
    assert main([*command, "--load-dir", str(source), "--save-dir", str(target), *extra]) == 0


def _sizes(tp: int, pp: int) -> list[str]:
    return ["--target-tensor-parallel-size", str(tp), "--target-pipeline-parallel-size", str(pp)]


def _model(directory: Path, rank: str = "mp_rank_00") -> dict[str, torch.Tensor]:
    (path,) = directory.glob(f"*/{rank}/model_optim_rng.pt")
    weights = load_file(path)["model"]
    return {n: v for n, v in weights.items() if isinstance(v, torch.Tensor)}


def _assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize(
    ("model", "kind", "source"),
    [
        ("gpt", "GPT", "tp2pp2"),
        ("gpt", "GPT", "torch_dist"),
        ("llama", "GPT", "tp2pp2"),
        ("llama", "GPT", "torch_dist"),
        ("bert", "BERT", "tp2pp2"),
        ("bert", "BERT", "torch_dist"),
        ("vpp", "GPT", "tp1pp2vpp2"),
    ],
)
def test_merging_gives_the_recorded_whole(
    recorded: Path, tmp_path: Path, model: str, kind: str, source: str
) -> None:
    _convert(kind, "mcore", "mcore", recorded / model / source, tmp_path / "out", *_sizes(1, 1))
    _assert_same(_model(tmp_path / "out"), _model(recorded / model / "tp1pp1"))


@pytest.mark.parametrize(("model", "kind"), [("gpt", "GPT"), ("llama", "GPT"), ("bert", "BERT")])
def test_cutting_gives_the_recorded_parts(recorded: Path, tmp_path: Path, model: str, kind: str) -> None:
    _convert(kind, "mcore", "mcore", recorded / model / "tp1pp1", tmp_path / "out", *_sizes(2, 2))
    for rank in ("mp_rank_00_000", "mp_rank_01_000", "mp_rank_00_001", "mp_rank_01_001"):
        _assert_same(_model(tmp_path / "out", rank), _model(recorded / model / "tp2pp2", rank))


@pytest.mark.parametrize("source", ["tp1pp1", "tp2pp2", "v3_layernorm"])
def test_first_generation_round_trip(recorded: Path, tmp_path: Path, source: str) -> None:
    """Nested layouts of several ages become one and the same model, and the layout HuggingFace's scripts read."""
    _convert("GPT", "megatron", "mcore", recorded / "legacy_gpt" / source, tmp_path / "new", *_sizes(1, 1))
    _convert("GPT", "mcore", "megatron", tmp_path / "new", tmp_path / "old", *_sizes(1, 1))
    (path,) = (tmp_path / "old").glob("*/mp_rank_00/model_optim_rng.pt")
    (reference,) = (recorded / "legacy_gpt" / "v3_layernorm").glob("*/mp_rank_00/model_optim_rng.pt")
    ours, theirs = (load_file(p)["model"]["language_model"] for p in (path, reference))
    _assert_same(ours["encoder"], {n: v for n, v in theirs["encoder"].items() if isinstance(v, torch.Tensor)})
    for table in ("word_embeddings", "position_embeddings"):
        assert torch.equal(ours["embedding"][table]["weight"], theirs["embedding"][table]["weight"])


def test_llama_to_huggingface_and_back(recorded: Path, tmp_path: Path) -> None:
    """The exported model computes the recorded logits; importing it again gives the same bits."""
    transformers = pytest.importorskip("transformers")
    source = recorded / "llama" / "tp2pp2"
    _convert("GPT", "mcore", "hf", source, tmp_path / "hf", "--max-shard-megabytes", "1")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    tokens = torch.from_numpy(np.load(GOLDEN / "llama" / "batch.npz")["tokens"])
    expected = torch.from_numpy(np.load(GOLDEN / "llama" / "expected.npz")["logits"])
    with torch.no_grad():
        logits = model(tokens).logits
    assert (logits - expected.view_as(logits)).abs().max() <= 1e-5
    _convert("GPT", "hf", "mcore", tmp_path / "hf", tmp_path / "back")
    _assert_same(_model(tmp_path / "back"), _model(recorded / "llama" / "tp1pp1"))


def test_gpt_to_huggingface_and_back(recorded: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    _convert("GPT", "mcore", "hf", recorded / "gpt" / "torch_dist", tmp_path / "hf")
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    tokens = torch.from_numpy(np.load(GOLDEN / "gpt" / "batch.npz")["tokens"])
    expected = torch.from_numpy(np.load(GOLDEN / "gpt" / "expected.npz")["logits"])
    with torch.no_grad():
        logits = model(tokens).logits
    assert (logits - expected.view_as(logits)).abs().max() <= 1e-5
    _convert("GPT", "hf", "mcore", tmp_path / "hf", tmp_path / "back")
    _assert_same(_model(tmp_path / "back"), _model(recorded / "gpt" / "tp1pp1"))


def test_what_cannot_be_represented_is_refused(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "--model-type",
        "BERT",
        "--loader",
        "mcore",
        "--saver",
        "hf",
        "--load-dir",
        str(recorded / "bert" / "tp1pp1"),
    ]
    assert main([*command, "--save-dir", str(tmp_path / "out")]) == 1
    assert "has no HuggingFace twin" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [["--loader", "nowhere"], ["--saver", "json"]])
def test_unknown_plugins_are_named(
    tmp_path: Path, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model-type", "GPT", "--load-dir", "a", "--save-dir", str(tmp_path), *option]) == 2
    assert option[1] in capsys.readouterr().err
