"""Models cut over ranks against v0.9's recorded norms and, gradient by gradient in float64, against one
process.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from tests.gang.harness import run_gang
from tests.gang.model_runs import Cut, reference, reference_with_documents, run_cut, run_documents
from tests.unit.models import recorded


@pytest.fixture(autouse=True)
def _random_states() -> None:
    get_cuda_rng_tracker().reset()
    for seed, name in enumerate(("model-parallel-rng", "data-parallel-rng", "expert-parallel-rng")):
        get_cuda_rng_tracker().add(name, seed)


@pytest.mark.parametrize(
    ("name", "layout", "cut"),
    [
        ("gpt", "tp2pp2", Cut(tp=2, pp=2)),
        ("llama", "tp2pp2", Cut(tp=2, pp=2)),
        ("bert", "tp2pp2", Cut(tp=2, pp=2)),
        ("moe", "tp1pp2ep2", Cut(pp=2, ep=2)),
        ("t5", "tp2pp1", Cut(tp=2)),
        # The recording has each stage's own share of the position table's gradient.
        ("t5", "tp2enc1dec1", Cut(tp=2, encoder_pp=1, join_positions=False)),
    ],
)
def test_recorded_layout(name: str, layout: str, cut: Cut) -> None:
    """Every rank's gradient norms are those v0.9 computed in the same layout."""
    weights = {key: t.double() for key, t in recorded.weights(name).items() if isinstance(t, torch.Tensor)}
    results = run_gang(cut.world_size, run_cut, name, cut, weights, None)
    expected = recorded.grad_norms(name, f"_{layout}")
    for rank, result in enumerate(results):
        within, stage = rank % (cut.tp * cut.ep), rank // (cut.tp * cut.ep)
        expert = within // cut.tp
        norms = expected[f"t{within % cut.tp}p{stage}e{expert}d{expert}"]
        assert result["norms"].keys() == norms.keys()
        for key, norm in norms.items():
            assert result["norms"][key] == pytest.approx(norm, rel=1e-5, abs=1e-6), f"rank {rank}: {key}"


#: Transfers of sequence parallelism in pieces, beside the products.
PIECEWISE = {"tp_comm_overlap": True, "tp_comm_overlap_rs_dgrad": True}
#: The same, but for the pieces of the input's gradient and the overlap of whole transfers.
IN_TURN = {"tp_comm_overlap": True, "tp_comm_bulk_dgrad": False, "tp_comm_bulk_wgrad": False}

LAYOUTS = [
    ("gpt", Cut(tp=2)),
    ("gpt", Cut(tp=2, sequence_parallel=True)),
    ("gpt", Cut(tp=4, sequence_parallel=True)),
    ("gpt", Cut(tp=4, sequence_parallel=True, changes=PIECEWISE)),
    ("gpt", Cut(tp=2, sequence_parallel=True, changes=IN_TURN)),
    ("vpp", Cut(pp=4)),
    ("vpp", Cut(pp=2, vpp=2)),
    ("vpp", Cut(pp=2, changes={"first_pipeline_num_layers": 1})),
    ("vpp", Cut(tp=2, pp=2, vpp=2, sequence_parallel=True)),
    ("vpp", Cut(pp=2, changes={"standalone_embedding_stage": True})),
    ("llama", Cut(tp=2, sequence_parallel=True)),
    ("llama", Cut(tp=4)),  # two ranks share each group of keys and values
    ("llama", Cut(tp=4, sequence_parallel=True)),
    ("gpt", Cut(cp=2)),
    ("llama", Cut(cp=2)),
    ("llama", Cut(tp=2, cp=2, sequence_parallel=True)),
    ("llama", Cut(tp=2, cp=2, sequence_parallel=True, changes=PIECEWISE)),
    ("moe", Cut(ep=2)),
    ("moe", Cut(ep=2, changes={"moe_token_dispatcher_type": "alltoall"})),
    ("moe", Cut(tp=2, sequence_parallel=True)),
    ("moe", Cut(tp=2, sequence_parallel=True, changes=PIECEWISE)),
    ("moe", Cut(tp=2, ep=2, sequence_parallel=True)),
    ("moe", Cut(tp=2, ep=2, sequence_parallel=True, changes={"moe_token_dispatcher_type": "alltoall"})),
    ("moe", Cut(pp=2, ep=2)),
    ("bert", Cut(tp=2, sequence_parallel=True)),
    ("bert", Cut(pp=2)),
    ("t5", Cut(tp=2, sequence_parallel=True)),
    ("t5", Cut(tp=2, sequence_parallel=True, changes=PIECEWISE)),
    ("t5", Cut(encoder_pp=1)),
]


@pytest.mark.parametrize(("name", "cut"), LAYOUTS, ids=str)
def test_layout_equals_one_process(name: str, cut: Cut) -> None:
    weights, gradients, result = reference(name)
    for rank in run_gang(cut.world_size, run_cut, name, cut, weights, gradients):
        assert rank["worst"][0] < 1e-11, rank["worst"]
        if rank["loss"] is not None:
            assert rank["loss"] == pytest.approx(result["loss"].item(), rel=1e-12)


@pytest.mark.parametrize("name", ["gpt", "llama"])
@pytest.mark.parametrize("cut", [Cut(cp=2), Cut(tp=2, cp=2, sequence_parallel=True)], ids=str)
def test_documents_with_context_parallelism(name: str, cut: Cut) -> None:
    """A mask that separates documents, its rows cut like the sequence: the loss and gradients of one process."""
    weights, gradients, loss = reference_with_documents(name)
    for total, error in run_gang(cut.world_size, run_documents, name, cut, weights, gradients):
        assert total == pytest.approx(loss, rel=1e-12)
        assert error < 1e-11


def pad_output_layer(
    name: str, tied: bool, tp: int, vocabulary: int, place: Path, save: bool
) -> torch.Tensor:
    """Body: write a model whose output layer counts its rows, or read that file; this rank's rows after that."""
    parallel_state.initialize_model_parallel(tp)
    model_parallel_cuda_manual_seed(1)
    config = recorded.config_of(name, tensor_model_parallel_size=tp)
    model = recorded.build(
        name,
        config,
        vocab_size=vocabulary,
        share_embeddings_and_output_weights=tied,
        position_embedding_type="rope",
    )
    layer = model.lm_head.output_layer if name == "t5" else model.output_layer
    rows = layer.bias if layer.bias is not None else layer.weight
    with torch.no_grad():
        rows.fill_(-1)
        if save:
            rows.copy_((torch.arange(len(rows)) + 1.0).view(-1, *[1] * (rows.dim() - 1)).expand_as(rows))
            dist_checkpointing.save(model.sharded_state_dict(), place)
        else:
            model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), place))
    return rows.detach().reshape(len(rows), -1)[:, 0]


@pytest.mark.parametrize(
    ("name", "tied", "padded"),
    [("t5", True, 288), ("t5", True, 240), ("t5", False, 288), ("bert", True, 288), ("gpt", False, 288)],
)
def test_an_output_layer_takes_as_many_rows_as_its_vocabulary_has(
    tmp_path: Path, name: str, tied: bool, padded: int
) -> None:
    """Of a file whose vocabulary is padded otherwise, because it is divided over fewer ranks: zeros or nothing more."""
    run_gang(1, pad_output_layer, name, tied, 1, 256, tmp_path, True)
    rows = torch.cat(run_gang(2, pad_output_layer, name, tied, 2, padded, tmp_path, False))
    assert rows.tolist() == [float(row + 1) if row < 256 else 0.0 for row in range(padded)]
