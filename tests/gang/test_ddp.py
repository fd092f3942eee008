"""The data-parallel wrapper: reduced gradients against one process, the overlap's bookkeeping, NaN reports."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.errors import TrainingError
from megatron.core.replicas import differing_parameters
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.gang import data_parallel as dp
from tests.gang.harness import run_gang


def _full_batch_gradients() -> dict[str, torch.Tensor]:
    """Float64 gradients of the mean over the whole group's batch, by plain autograd in one process."""
    model = dp.Network(torch.float64)
    for microbatch in range(dp.MICROBATCHES):
        dp.loss_of(model, dp.batch(0, microbatch, torch.float64), 0, 1).backward()
    return {name: param.grad for name, param in model.named_parameters()}


def _reduced_gradients(dtype: torch.dtype, ddp: dict[str, Any]) -> dict[str, torch.Tensor]:
    dp.init()
    model, optimizer = dp.build(dtype, ddp)
    model.zero_grad_buffer()
    dp.accumulate(model, 0, dtype)
    model.finish_grad_sync()
    if not ddp.get("use_distributed_optimizer"):
        return {name: param.main_grad.clone() for name, param in model.module.named_parameters()}
    result = {}
    names = {param: name for name, param in model.module.named_parameters()}
    for piece in optimizer.owned_pieces():
        whole = torch.full_like(piece.param.main_grad, float("nan")).view(-1)
        whole[piece.flat_slice] = piece.of_gradient()
        result[names[piece.param]] = whole.view_as(piece.param)
    return result


VARIANTS = {
    "plain": {},
    "overlap": {"overlap_grad_reduce": True, "bucket_size": 300},
    "average": {"average_in_collective": True},
    "sharded": {"use_distributed_optimizer": True},
    "sharded_overlap": {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "bucket_size": 300},
    "sharded_average": {"use_distributed_optimizer": True, "average_in_collective": True},
}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_those_of_one_process(variant, ranks):
    expected = _full_batch_gradients()
    seen = {name: torch.zeros_like(grad, dtype=torch.bool) for name, grad in expected.items()}
    for gradients in run_gang(ranks, _reduced_gradients, torch.float64, VARIANTS[variant]):
        for name, grad in gradients.items():
            known = ~grad.isnan()
            torch.testing.assert_close(grad[known], expected[name][known], rtol=1e-12, atol=1e-15)
            seen[name] |= known
    assert all(mask.all() for mask in seen.values()), "every element was reduced on some rank"


def _buffer_dtypes(dtype: torch.dtype, in_fp32: bool) -> set[torch.dtype]:
    dp.init()
    model, _ = dp.build(dtype, {"grad_reduce_in_fp32": in_fp32})
    return {param.main_grad.dtype for param in model.parameters()}


@pytest.mark.parametrize(
    "dtype,in_fp32,expected",
    [
        (torch.bfloat16, True, torch.float32),
        (torch.bfloat16, False, torch.bfloat16),
        (torch.float32, True, torch.float32),
        (torch.float64, True, torch.float64),
    ],
)
def test_gradient_dtype(dtype, in_fp32, expected):
    assert run_gang(1, _buffer_dtypes, dtype, in_fp32) == [{expected}]


def _bookkeeping(sharded: bool) -> list[str]:
    dp.init()
    ddp = {"overlap_grad_reduce": True, "use_distributed_optimizer": sharded, "bucket_size": 300}
    model, _ = dp.build(torch.float32, ddp)
    refusals = []

    def refused(action: Any, *args: Any) -> None:
        try:
            action(*args)
        except AssertionError as error:
            refusals.append(str(error))

    model.zero_grad_buffer()
    refused(model.finish_grad_sync)
    group = model.bucket_groups[0]
    params = list(group.buckets[0].params_list)
    with model.no_sync():
        group.register_grad_ready(params[0])  # counts for nothing before the last microbatch
    group.register_grad_ready(params[0])
    refused(group.register_grad_ready, params[0])
    refused(group.register_grad_ready, torch.nn.Parameter(torch.ones(1)))
    for param in params[1:]:
        group.register_grad_ready(param)
    refused(group.start_grad_sync)
    group.finish_grad_sync()
    return refusals


@pytest.mark.parametrize("sharded", [False, True])
def test_the_overlaps_bookkeeping_refuses_misuse(sharded):
    first, *_ = run_gang(2, _bookkeeping, sharded)
    assert [words in text for words, text in zip(
        ("never started: ", "twice in the last microbatch", "does not belong", "already being reduced"), first
    )] == [True] * 4  # fmt: skip


def _nan_on_rank_1(ddp: dict[str, Any], value: float) -> str | None:
    dp.init()
    model, _ = dp.build(torch.float32, {"check_for_nan_in_grad": True, **ddp})
    model.zero_grad_buffer()
    for param in model.module.parameters():
        param.main_grad.fill_(1.0)
    if dist.get_rank() == 1:
        model.module.norm.bias.main_grad[3] = value
    message = None
    try:
        for group in model.bucket_groups:
            group.check_for_nan_in_grad()
    except TrainingError as error:
        message = str(error)
        assert isinstance(error, AssertionError)
    dist.barrier()
    return message


@pytest.mark.parametrize("ddp", [{}, {"overlap_grad_reduce": True, "bucket_size": 300}])
def test_nan_is_reported_with_rank_and_parameter_and_inf_passes(ddp):
    quiet, loud = run_gang(2, _nan_on_rank_1, ddp, float("nan"))
    assert quiet is None
    assert loud.startswith("norm.bias: the gradient is NaN on rank 1")
    assert run_gang(2, _nan_on_rank_1, ddp, float("inf")) == [None, None]


def _broadcast() -> tuple[list[str], list[str], bool]:
    dp.init()
    model, _ = dp.build()
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.module.layers[1].weight[2, 3] += 1e-3
    drifted = [name for name, ranks in differing_parameters([model]) if ranks == [1]]
    model.broadcast_params()
    left = [name for name, _ in differing_parameters([model])]
    return (
        drifted,
        left,
        torch.equal(model.module.layers[1].weight, dp.Network(torch.float32).layers[1].weight),
    )


def test_broadcast_mends_a_drifted_replica():
    for drifted, left, mended in run_gang(2, _broadcast):
        assert len(drifted) == 1 and drifted[0].endswith("layers.1.weight")
        assert left == [] and mended


class _Stage(torch.nn.Module):
    """One end of a two-stage model that ties its embedding."""

    share_embeddings_and_output_weights = True
    pre_process = True

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = torch.nn.Parameter(torch.ones(4, 3))
        self.norm = torch.nn.Parameter(torch.ones(5))
        self.norm.sequence_parallel = True
        self.body = torch.nn.Parameter(torch.ones(2))

    def shared_embedding_or_output_weight(self) -> torch.nn.Parameter:
        return self.embedding


def _finalize(tp: int, pp: int, tokens: bool) -> dict[str, float]:
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    config = TransformerConfig(
        num_layers=pp, hidden_size=8, num_attention_heads=2, tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp, pipeline_dtype=torch.float32, sequence_parallel=tp > 1,
        calculate_per_token_loss=tokens,
    )  # fmt: skip
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), _Stage(config))
    model.zero_grad_buffer()
    for param in model.module.parameters():
        param.main_grad.fill_(float(dist.get_rank() + 1))
    count = torch.tensor(10 * (dist.get_rank() + 1), dtype=torch.int) if tokens else None
    finalize_model_grads([model], count)
    return {name: param.main_grad.mean().item() for name, param in model.module.named_parameters()}


def test_finalize_sums_what_is_shared_and_divides_by_tokens():
    """By hand; rank r starts with r + 1 everywhere. World 4 = tp 2 x pp 2, tp fastest: stages {0, 1} and {2, 3}."""
    for rank, grads in enumerate(run_gang(4, _finalize, 2, 2, False)):
        value = float(rank + 1)
        assert grads["body"] == value
        assert grads["norm"] == {0: 3.0, 1: 3.0, 2: 7.0, 3: 7.0}[rank]
        assert grads["embedding"] == {0: 4.0, 1: 6.0, 2: 4.0, 3: 6.0}[rank]
    # dp 2 x pp 2: replicas {0, 1} and {2, 3}. Ranks 2 and 3 are the last stage and have counted 30 and 40 tokens.
    for rank, grads in enumerate(run_gang(4, _finalize, 1, 2, True)):
        assert grads["body"] == pytest.approx((3.0 if rank < 2 else 7.0) / 70)
        assert grads["embedding"] == pytest.approx(10.0 / 70)


def _averaging_twice() -> None:
    dp.init()
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, calculate_per_token_loss=True
    )
    DistributedDataParallel(
        config, DistributedDataParallelConfig(average_in_collective=True), torch.nn.Linear(2, 2)
    )


def test_contradicting_settings_are_refused():
    with pytest.raises(AssertionError, match="--ddp-average-in-collective"):
        run_gang(1, _averaging_twice)
