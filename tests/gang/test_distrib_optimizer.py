"""The distributed optimizer: bitwise equal to the replicated one, its memory, and its state in every format."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core import parallel_state
from megatron.core.errors import CheckpointError
from megatron.core.optimizer import DistributedOptimizer
from tests.gang import data_parallel as dp
from tests.gang.harness import run_gang

SHARDED = {"use_distributed_optimizer": True}
VARIANTS = {
    "plain": {},
    "overlap": {"overlap_grad_reduce": True, "bucket_size": 300},
    "sharded": SHARDED,
    "sharded_overlap": {**SHARDED, "overlap_grad_reduce": True, "bucket_size": 300},
    "sharded_overlap_gather": {
        **SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True, "bucket_size": 300,
    },
    "sharded_overlap_gather_aligned": {
        **SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True, "align_param_gather": True,
    },
}  # fmt: skip


def _run(dtype: torch.dtype, ddp: dict[str, Any], steps: int) -> tuple[dict[str, torch.Tensor], list[Any]]:
    dp.init()
    model, optimizer = dp.build(dtype, ddp)
    results = dp.train(model, optimizer, range(steps), dtype)
    return dp.weights(model), results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_variant_gives_the_same_bytes(dtype):
    """A sum of two has one order, so nothing may differ, clipping included."""
    reference, results = run_gang(2, _run, dtype, VARIANTS["plain"], 4)[0]
    assert [success for success, _, _ in results] == [True] * 4
    for name, ddp in VARIANTS.items():
        for weights, again in run_gang(2, _run, dtype, ddp, 4):
            for key, value in reference.items():
                assert torch.equal(value, weights[key]), f"{name}: {key}"
            assert [zeros for _, _, zeros in again] == [zeros for _, _, zeros in results]
            assert [norm for _, norm, _ in again] == pytest.approx(
                [norm for _, norm, _ in results], rel=1e-14
            )


@pytest.mark.parametrize("variant", VARIANTS)
def test_four_ranks_repeat_their_bytes(variant):
    """Among four, the order of a sum depends on where in a bucket an element lies, but not on the run."""
    reference = run_gang(4, _run, torch.float32, VARIANTS["plain"], 4)[0][0]
    once = run_gang(4, _run, torch.float32, VARIANTS[variant], 4)
    twice = run_gang(4, _run, torch.float32, VARIANTS[variant], 4)
    for (first, _), (second, _) in zip(once, twice):
        for key, value in reference.items():
            assert torch.equal(first[key], second[key]) and torch.equal(first[key], once[0][0][key])
            # Adam's first steps divide by |g|: where a gradient is all but zero a reordered sum shows.
            torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_float64_equals_one_process(variant):
    (reference, results), *_ = run_gang(1, _run, torch.float64, {}, 5)
    for weights, again in run_gang(2, _run, torch.float64, VARIANTS[variant], 5):
        for key, value in reference.items():
            torch.testing.assert_close(weights[key], value, rtol=1e-12, atol=1e-14)
        assert [norm for _, norm, _ in again] == pytest.approx([norm for _, norm, _ in results], rel=1e-12)


def _live_bytes(dtype: torch.dtype, in_fp32: bool, sharded: bool) -> float:
    """Bytes per parameter on this rank while it updates: distinct storages, padding left out."""
    dp.init()
    model, optimizer = dp.build(dtype, {"grad_reduce_in_fp32": in_fp32, "use_distributed_optimizer": sharded})
    dp.train(model, optimizer, range(1), dtype)
    model.zero_grad_buffer()
    dp.accumulate(model, 1, dtype, optimizer.scale_loss)
    model.finish_grad_sync()
    optimizer.prepare_grads()
    params = list(model.module.parameters())
    buffers = model.buffers
    padding = sum(buffer.numel for buffer in buffers) - sum(param.numel() for param in params)
    tensors = [param.data for param in params] + [param.main_grad for param in params]
    for param in optimizer.get_parameters():
        tensors += [param.data, param.grad, *optimizer.state[param].values()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    total = sum(storages.values())
    for buffer in buffers:
        total -= padding * buffer.grad_dtype.itemsize
        total -= padding * buffer.param_dtype.itemsize if sharded else 0
    return total / sum(param.numel() for param in params)


@pytest.mark.parametrize(
    "dtype,in_fp32,whole,fixed,divided",
    [
        (torch.float16, False, 20, 4, 16),
        (torch.bfloat16, True, 18, 6, 12),
        (torch.float32, True, 16, 8, 8),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_bytes_per_parameter(dtype, in_fp32, whole, fixed, divided, ranks):
    """Counted from live tensors, against the table: d ranks hold fixed + divided / d. Averaged over the ranks,
    because padding makes one rank's part of the parameters a little smaller than another's."""
    replicated = run_gang(ranks, _live_bytes, dtype, in_fp32, False)
    assert replicated == [whole] * ranks
    sharded = run_gang(ranks, _live_bytes, dtype, in_fp32, True)
    assert sum(sharded) / ranks == pytest.approx(fixed + divided / ranks, rel=1e-12)


# State ------------------------------------------------------------------------------------------------------------


def _save(dtype: torch.dtype, ddp: dict[str, Any], path: str) -> dict[str, torch.Tensor]:
    """Two steps, save, two more: the weights at the end."""
    dp.init()
    model, optimizer = dp.build(dtype, ddp)
    dp.train(model, optimizer, range(2), dtype)
    weights = dp.weights(model)
    if dist.get_rank() == 0:
        torch.save({"model": weights, "optimizer": optimizer.state_dict()}, f"{path}/model.pt")
    optimizer.save_parameter_state(f"{path}/optim.pt")
    dp.train(model, optimizer, range(2, 4), dtype)
    return dp.weights(model)


def _resume(dtype: torch.dtype, ddp: dict[str, Any], path: str) -> dict[str, torch.Tensor]:
    dp.init()
    model, optimizer = dp.build(dtype, ddp)
    state = torch.load(f"{path}/model.pt", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    optimizer.load_parameter_state(f"{path}/optim.pt")
    dp.train(model, optimizer, range(2, 4), dtype)
    return dp.weights(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_resuming_from_a_file_is_bitwise(dtype, tmp_path):
    straight = run_gang(2, _save, dtype, SHARDED, str(tmp_path))[0]
    for variant in ("sharded", "sharded_overlap_gather"):
        for resumed in run_gang(2, _resume, dtype, VARIANTS[variant] | {"bucket_size": None}, str(tmp_path)):
            assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_the_file_does_not_depend_on_the_number_of_ranks(tmp_path):
    states = []
    for ranks in (1, 2, 4):
        (tmp_path / str(ranks)).mkdir()
        run_gang(ranks, _save, torch.float64, SHARDED, str(tmp_path / str(ranks)))
        states.append(torch.load(tmp_path / str(ranks) / "optim.pt", weights_only=True))
    for state in states:
        assert state["buckets_coalesced"] is True
        entry = state[0][torch.float64, torch.float64]
        assert list(entry) == ["param", "exp_avg", "exp_avg_sq", "numel_unpadded"]
        for key in ("param", "exp_avg", "exp_avg_sq"):
            assert entry[key].shape == (entry["numel_unpadded"],)
            torch.testing.assert_close(
                entry[key], states[0][0][torch.float64, torch.float64][key], rtol=1e-11, atol=1e-16
            )
    resumed = run_gang(4, _resume, torch.float64, SHARDED, str(tmp_path / "2"))[0]
    straight = run_gang(1, _resume, torch.float64, SHARDED, str(tmp_path / "1"))[0]
    for name in straight:
        torch.testing.assert_close(resumed[name], straight[name], rtol=1e-11, atol=1e-14)


def _load_foreign(change: str) -> str:
    dp.init()
    _, optimizer = dp.build(torch.float32, SHARDED)
    state = optimizer.get_parameter_state_dp_zero()
    if state is not None and change == "short":
        entry = state[0][torch.float32, torch.float32]
        state[0][torch.float32, torch.float32] = {
            key: value[:-1] if isinstance(value, torch.Tensor) else value for key, value in entry.items()
        }
    if state is not None and change == "old":
        state = {0: {torch.float32: {k: [v] for k, v in state[0][torch.float32, torch.float32].items()}}}
    if state is not None and change == "none":
        del state[0]
    try:
        optimizer.load_parameter_state_from_dp_zero(state)
    except CheckpointError as error:
        return str(error)
    return "loaded"


@pytest.mark.parametrize(
    "change,words",
    [("short", "elements in the file"), ("old", "update-legacy"), ("none", "0 gradient buffers")],
)
def test_a_foreign_state_is_refused_on_every_rank(change, words):
    assert all(words in message for message in run_gang(2, _load_foreign, change))


def _legacy() -> bool:
    dp.init()
    model, optimizer = dp.build(torch.float32, SHARDED)
    dp.train(model, optimizer, range(1), torch.float32)
    state = optimizer.get_parameter_state_dp_zero()
    if state is not None:
        entry = state[0][torch.float32, torch.float32]
        cut = {key: list(entry[key].split(200)) for key in ("param", "exp_avg", "exp_avg_sq")}
        state = {0: {torch.float32: cut}}
    before = [piece.main.clone() for piece in optimizer.owned_pieces()]
    moments = [optimizer.state[piece.main]["exp_avg"].clone() for piece in optimizer.owned_pieces()]
    for piece in optimizer.owned_pieces():
        piece.main.zero_()
        optimizer.state[piece.main]["exp_avg"].zero_()
    optimizer.load_parameter_state_from_dp_zero_legacy(state)
    return all(
        torch.equal(piece.main, value) and torch.equal(optimizer.state[piece.main]["exp_avg"], moment)
        for piece, value, moment in zip(optimizer.owned_pieces(), before, moments)
    )


def test_files_with_one_tensor_per_bucket_load():
    assert run_gang(2, _legacy) == [True, True]


def _refuse_sgd() -> None:
    dp.init()
    dp.build(torch.float32, SHARDED, {"optimizer": "sgd"})


def test_only_adam_is_sharded():
    with pytest.raises(AssertionError, match="--optimizer sgd"):
        run_gang(1, _refuse_sgd)


def _reload() -> bool:
    dp.init()
    model, optimizer = dp.build(torch.bfloat16, SHARDED)
    assert isinstance(optimizer, DistributedOptimizer)
    with torch.no_grad():
        for param in model.module.parameters():
            param.fill_(0.5)
    optimizer.reload_model_params()
    return all(bool((piece.main == 0.5).all()) for piece in optimizer.owned_pieces())


def test_reloading_takes_the_models_weights():
    assert run_gang(2, _reload) == [True, True]


class _Tied(torch.nn.Module):
    """Parameters whose sizes leave the tied one at an offset that no shard edge divides."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(torch.ones(5, 3))
        self.weight = torch.nn.Parameter(torch.ones(7, 8))
        self.b = torch.nn.Parameter(torch.ones(9))
        self.weight.shared_embedding = True


def _tied_shard() -> tuple[int, int]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    config = TransformerConfig(
        num_layers=2, hidden_size=8, num_attention_heads=1, pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float32,
    )  # fmt: skip
    module = _Tied()
    if parallel_state.is_pipeline_last_stage():
        module.extra = torch.nn.Parameter(torch.ones(77))
    model = DistributedDataParallel(config, DistributedDataParallelConfig(**SHARDED), module)
    start, end, bucket = model.buffers[0].param_index_map[module.weight]
    return start - model.buffers[0].buckets[bucket].offset, end - start


def test_tied_weights_are_cut_alike_on_both_stages():
    assert run_gang(4, _tied_shard) == [(0, 56)] * 4
