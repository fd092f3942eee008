"""Every checkpoint that v0.9 was recorded to write, of every age and layout: loaded, evaluated and trained on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.gang import recorded_checkpoints as recorded
from tests.gang.harness import run_gang
from tests.unit.checkpointing.zarr_files import zarr_copy

# (model, directory, ranks, flags in addition to the recorded ones)
_OLD = ["--no-load-rng"]
_SPANS = ["--vocab-extra-ids", "6"]
_SINKHORN = ["--moe-router-topk", "1", "--moe-router-load-balancing-type", "sinkhorn"]
CHECKPOINTS: list[tuple[str, str, int, list[str]]] = [
    ("gpt", "tp1pp1", 1, []),
    ("gpt", "tp2pp2", 4, []),
    ("gpt", "torch_dist", 1, []),
    ("llama", "tp1pp1", 1, []),
    ("llama", "tp2pp2", 4, []),
    ("llama", "torch_dist", 1, []),
    ("bert", "tp1pp1", 1, []),
    ("bert", "tp2pp2", 4, []),
    ("bert", "torch_dist", 1, []),
    ("t5", "tp1pp1", 1, _SPANS),
    ("t5", "tp2pp1", 2, _SPANS),
    ("t5", "tp2enc1dec1", 4, _SPANS),
    ("t5", "torch_dist", 1, _SPANS),
    ("moe", "tp1pp1", 1, []),
    ("moe", "tp1pp2ep2", 4, []),
    ("moe", "torch_dist", 1, []),
    ("vpp", "tp1pp1", 1, []),
    ("vpp", "tp1pp2vpp2", 2, ["--global-batch-size", "4"]),
    ("vpp", "torch_dist", 1, []),
    ("legacy_gpt", "tp1pp1", 1, []),
    ("legacy_gpt", "tp2pp2", 4, []),
    ("legacy_gpt", "v3_layernorm", 1, _OLD),
    ("legacy_gpt", "v0", 1, _OLD),
    ("legacy_gpt", "v1", 1, _OLD),
    ("legacy_bert", "tp1pp1", 1, []),
    ("legacy_bert", "v3_layernorm", 1, _OLD),
    ("legacy_bert", "v0", 1, _OLD),
    ("legacy_bert", "v1", 1, _OLD),
    ("legacy_llama", "tp1pp1", 1, []),
    ("legacy_t5", "tp1pp1", 1, _SPANS),
    ("legacy_moe", "tp1pp1", 1, _SINKHORN),
]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recorded")
    for model in {model for model, _, _, _ in CHECKPOINTS}:
        recorded.unpack(model, root)
    return root


def _losses(result: dict[str, Any]) -> list[dict[str, float]]:
    return [losses for losses, _ in result["rows"]]


@pytest.mark.parametrize(("model", "layout", "world", "extra"), CHECKPOINTS)
def test_recorded_checkpoint(unpacked: Path, model: str, layout: str, world: int, extra: list[str]) -> None:
    """Recorded logits, losses and gradient norms; further steps are those of the one-process layout."""
    cli = [*recorded.command_line(model, layout), "--load", str(unpacked / model / layout), *extra]
    results = run_gang(world, recorded.run, model, [*cli, "--no-load-optim"])
    release = layout in ("v0", "v1", "v3_layernorm")
    expected = dict(np.load(recorded.GOLDEN / model / "expected.npz"))
    for result in results:
        assert result["iteration"] == (0 if release else 100)
        if result["logits"] is not None:
            assert np.abs(result["logits"] - expected["logits"]).max() <= 1e-5
        for name, value in _losses(result)[0].items():
            assert value == pytest.approx(float(expected[name]), rel=2e-6)
        _compare_norms(model, layout, result)
    last = results[-1]
    assert last["logits"] is not None
    assert sum(_losses(last)[-1].values()) < sum(_losses(last)[0].values()) - 1e-3


@pytest.mark.parametrize(
    ("model", "world", "extra"), [("llama", 2, ["--tensor-model-parallel-size", "2"]), ("moe", 1, [])]
)
def test_recorded_weights_in_the_older_format(
    unpacked: Path, tmp_path: Path, model: str, world: int, extra: list[str]
) -> None:
    """v0.9's distributed checkpoint, rewritten as zarr: the recorded logits, in a layout of one's choice."""
    directory = zarr_copy(unpacked / model / "torch_dist" / "iter_0000100", tmp_path / "iter_0000100")
    (directory.parent / "latest_checkpointed_iteration.txt").write_text("100")
    cli = [*recorded.command_line(model, "torch_dist"), "--load", str(tmp_path), *extra, "--no-load-optim"]
    expected = np.load(recorded.GOLDEN / model / "expected.npz")["logits"]
    for result in run_gang(world, recorded.run, model, cli):
        assert result["iteration"] == 100
        assert np.abs(result["logits"] - expected).max() <= 1e-5


@pytest.mark.parametrize(("layout", "world"), [("grouped", 1), ("tp1pp2ep2", 4)])
def test_recorded_grouped_experts(unpacked: Path, layout: str, world: int) -> None:
    """The grouped product is for bfloat16 alone, in which a few tokens go to another expert: means are compared.

    Saved by a run with --moe-grouped-gemm, or by one without it.
    """
    cli = [*recorded.command_line("moe", layout), "--load", str(unpacked / "moe" / layout), "--bf16"]
    cli += [] if layout == "grouped" else ["--moe-grouped-gemm"]
    *_, result = run_gang(world, recorded.run, "moe", [*cli, "--no-load-optim"])
    expected = np.load(recorded.GOLDEN / "moe" / "expected.npz")
    assert np.abs(result["logits"] - expected["logits"]).mean() < 1e-2
    assert _losses(result)[0]["loss"] == pytest.approx(float(expected["loss"]), rel=2e-3)


def test_recorded_experts_one_by_one_of_such_that_stand_together(unpacked: Path) -> None:
    """The recorded numbers again: a run without --moe-grouped-gemm takes over what one with it saved."""
    cli = [*recorded.command_line("moe", "tp1pp1"), "--load", str(unpacked / "moe" / "grouped")]
    (result,) = run_gang(1, recorded.run, "moe", [*cli, "--no-load-optim"])
    expected = np.load(recorded.GOLDEN / "moe" / "expected.npz")
    assert np.abs(result["logits"] - expected["logits"]).max() <= 1e-5
    _compare_norms("moe", "tp1pp1", result)


def _compare_norms(model: str, layout: str, result: dict[str, Any]) -> None:
    """Gradient norms of the first step against those recorded for the layout, or else of all parameters together."""
    whole = json.loads((recorded.GOLDEN / model / "grad_norms.json").read_text())
    own = recorded.GOLDEN / model / f"grad_norms_{layout}.json"
    found = result["norms"]
    if own.exists():
        wanted = json.loads(own.read_text())
        wanted = wanted.get(result["place"], wanted)
    elif layout in ("tp2pp2", "tp1pp2vpp2"):
        # Not recorded. The clipped norm counts every parameter once.
        total = math.sqrt(sum(norm**2 for norm in whole.values()))
        assert result["rows"][0][1] == pytest.approx(total, rel=1e-5)
        return
    else:
        wanted = whole
    if layout == "tp2enc1dec1":
        # Recorded before the stages' shares of it were summed.
        del found["embedding.position_embeddings.weight"], wanted["embedding.position_embeddings.weight"]
    if model.startswith("legacy"):
        # Named otherwise then; as many, and as large.
        found, wanted = (dict(enumerate(sorted(norms.values()))) for norms in (found, wanted))
    assert found.keys() == wanted.keys()
    for name, norm in found.items():
        assert norm == pytest.approx(wanted[name], rel=1e-4, abs=1e-6), name
