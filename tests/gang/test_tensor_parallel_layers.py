"""Column, Row, Embedding and loss on 2 and 4 ranks against plain torch on one, in fp32 and fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
    vocab_parallel_cross_entropy,
)
from megatron.core.utils import drain_embedding_wgrad_compute
from tests.gang.harness import run_gang

S, B, H, FF, V = 8, 2, 12, 16, 24
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13}


def _config(tp: int, dtype: torch.dtype, **changes: Any) -> ModelParallelConfig:
    return ModelParallelConfig(
        tensor_model_parallel_size=tp, params_dtype=dtype, use_cpu_initialization=True, **changes
    )


def _init(weight: Tensor) -> None:
    torch.nn.init.normal_(weight, std=0.5)


def _error(mine: Tensor, reference: Tensor) -> float:
    assert mine.shape == reference.shape, (mine.shape, reference.shape)
    return ((mine - reference).abs().max() / reference.abs().max()).item()


def _start() -> tuple[int, int]:
    tp = dist.get_world_size()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    return tp, dist.get_rank()


def _gather_shards(shard: Tensor, dim: int) -> Tensor:
    parts = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, shard.contiguous())
    return torch.cat(parts, dim=dim)


def _model(
    dtype: torch.dtype, sequence_parallel: bool, fused: bool, skip_bias_add: bool, **fields: Any
) -> dict[str, float]:
    """ids -> embedding -> column -> gelu -> row -> logits -> loss, and every gradient, against plain torch."""
    tp, rank = _start()
    config = _config(
        tp, dtype, sequence_parallel=sequence_parallel, gradient_accumulation_fusion=fused, **fields
    )
    torch.manual_seed(1)
    embedding = VocabParallelEmbedding(
        V, H, init_method=_init, config=config, reduce_scatter_embeddings=sequence_parallel
    )
    column = ColumnParallelLinear(H, FF, config=config, init_method=_init, skip_bias_add=skip_bias_add)
    row = RowParallelLinear(
        FF,
        H,
        config=config,
        init_method=_init,
        bias=True,
        input_is_parallel=True,
        skip_bias_add=skip_bias_add,
    )
    head = ColumnParallelLinear(H, V, config=config, init_method=_init, bias=False)
    wide = torch.promote_types(dtype, torch.float32)
    torch.manual_seed(1)
    references = {}
    for name, shape in (("embedding", (V, H)), ("column", (FF, H)), ("row", (H, FF)), ("head", (V, H))):
        whole = torch.empty(shape, dtype=wide)
        _init(whole)
        references[name] = whole.to(dtype).requires_grad_()
    torch.manual_seed(2)
    for name, size in (("column_bias", FF), ("row_bias", H)):
        references[name] = torch.randn(size, dtype=dtype).requires_grad_()
    with torch.no_grad():
        column.bias.copy_(references["column_bias"].chunk(tp)[rank])
        row.bias.copy_(references["row_bias"])
    ids, labels = torch.randint(V, (B, S)), torch.randint(V, (S, B))
    weights = torch.randn(S, B, dtype=dtype)
    sharded = {"embedding": embedding.weight, "column": column.weight, "row": row.weight, "head": head.weight}
    if fused:
        for parameter in sharded.values():
            parameter.main_grad = torch.full_like(parameter, 3.0)

    hidden = embedding(ids)
    if not sequence_parallel:
        hidden = hidden.transpose(0, 1)
    up, up_bias = column(hidden)
    assert (up_bias is None) != skip_bias_add
    down, down_bias = row(F.gelu(up if up_bias is None else up + up_bias))
    logits, _ = head(down if down_bias is None else down + down_bias)
    losses = vocab_parallel_cross_entropy(logits, labels)
    (losses * weights).sum().backward()

    plain = F.embedding(ids, references["embedding"]).transpose(0, 1)
    plain = F.gelu(F.linear(plain, references["column"], references["column_bias"]))
    plain_logits = F.linear(F.linear(plain, references["row"], references["row_bias"]), references["head"])
    plain_losses = F.cross_entropy(plain_logits.flatten(0, 1), labels.flatten(), reduction="none").view(S, B)
    (plain_losses * weights).sum().backward()

    errors = {
        "loss": _error(losses, plain_losses),
        "logits": _error(_gather_shards(logits.detach(), 2), plain_logits),
    }
    dims = {"embedding": 0, "column": 0, "row": 1, "head": 0}
    assert not fused or all(parameter.grad is None for parameter in sharded.values())
    for name, parameter in sharded.items():
        gradient = parameter.main_grad - 3.0 if hasattr(parameter, "main_grad") else parameter.grad
        errors[name] = _error(_gather_shards(gradient, dims[name]), references[name].grad)
    errors["column_bias"] = _error(_gather_shards(column.bias.grad, 0), references["column_bias"].grad)
    row_bias = row.bias.grad
    if sequence_parallel:  # each rank saw its tokens; gradient finalisation sums them
        assert row.bias.sequence_parallel
        dist.all_reduce(row_bias)
    errors["row_bias"] = _error(row_bias, references["row_bias"].grad)
    return errors


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sp"])
@pytest.mark.parametrize(("fused", "skip_bias_add"), [(False, False), (True, True)], ids=["", "fused"])
def test_small_model(
    tp: int, dtype: torch.dtype, sequence_parallel: bool, fused: bool, skip_bias_add: bool
) -> None:
    if sequence_parallel and tp == 1:
        sequence_parallel = False
    for errors in run_gang(tp, _model, dtype, sequence_parallel, fused, skip_bias_add):
        bound = TOLERANCE[dtype] * (5 if fused else 1)  # main_grad started at 3
        assert all(error < bound for error in errors.values()), errors


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("dgrad", [False, True], ids=["", "rs_dgrad"])
@pytest.mark.parametrize(("fused", "skip_bias_add"), [(False, False), (True, True)], ids=["", "fused"])
def test_transfers_piece_by_piece(tp: int, dgrad: bool, fused: bool, skip_bias_add: bool) -> None:
    fields = {"tp_comm_overlap": True, "tp_comm_overlap_rs_dgrad": dgrad, "tp_comm_bulk_dgrad": not dgrad}
    for errors in run_gang(tp, _model, torch.float64, True, fused, skip_bias_add, **fields):
        bound = TOLERANCE[torch.float64] * (5 if fused else 1)  # main_grad started at 3
        assert all(error < bound for error in errors.values()), errors


def _input_gradients(sequence_parallel: bool, frozen: bool) -> list[float]:
    """The gradient that leaves the layers, with trained and with frozen weights, gathered and scattered ends."""
    tp, _ = _start()
    dtype = torch.float64
    config = _config(tp, dtype, sequence_parallel=sequence_parallel)
    torch.manual_seed(1)
    column = ColumnParallelLinear(
        H, FF, config=config, init_method=_init, gather_output=not sequence_parallel
    )
    row = RowParallelLinear(
        FF,
        H,
        config=config,
        init_method=_init,
        bias=False,
        input_is_parallel=sequence_parallel,
        skip_bias_add=False,
    )
    if frozen:
        for module in (column, row):
            module.requires_grad_(False)
    torch.manual_seed(3)
    x = torch.randn(S, B, H, dtype=dtype, requires_grad=True)
    direction = torch.randn(S, B, H, dtype=dtype)
    entered = scatter_to_sequence_parallel_region(x) if sequence_parallel else x
    output, _ = row(column(entered)[0])
    if sequence_parallel:
        output = gather_from_sequence_parallel_region(output, tensor_parallel_output_grad=False)
    output.backward(direction)
    up, down = (_gather_shards(module.weight.detach(), dim) for module, dim in ((column, 0), (row, 1)))
    y = x.detach().clone().requires_grad_()
    expected = F.linear(F.linear(y, up), down)
    expected.backward(direction)
    assert all(module.weight.grad is None for module in (column, row)) or not frozen
    return [_error(output, expected), _error(x.grad, y.grad)]


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sp"])
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_input_gradients(sequence_parallel: bool, frozen: bool) -> None:
    for errors in run_gang(2, _input_gradients, sequence_parallel, frozen):
        assert max(errors) < 1e-13, errors


def _deferred(sequence_parallel: bool, limit: int, fused: bool) -> list[float]:
    tp, rank = _start()
    config = _config(
        tp,
        torch.float64,
        sequence_parallel=sequence_parallel,
        pipeline_model_parallel_size=2,
        pipeline_dtype=torch.float64,
        gradient_accumulation_fusion=True,
        defer_embedding_wgrad_compute=True,
        wgrad_deferral_limit=limit,
    )
    activations: list[Tensor] = []
    gradients: list[Tensor] = []
    torch.manual_seed(1)
    head = ColumnParallelLinear(
        H,
        V,
        config=config,
        init_method=_init,
        bias=False,
        embedding_activation_buffer=activations,
        grad_output_buffer=gradients,
    )
    head.weight.main_grad = torch.zeros_like(head.weight)
    whole = _gather_shards(head.weight.detach(), 0).requires_grad_()
    torch.manual_seed(2)
    inputs = [torch.randn(S, B, H, dtype=torch.float64, requires_grad=True) for _ in range(5)]
    directions = [torch.randn(S, B, V, dtype=torch.float64) for _ in range(5)]
    for x, direction in zip(inputs, directions):
        entered = scatter_to_sequence_parallel_region(x) if sequence_parallel else x
        logits, _ = head(entered)
        logits.backward(direction.chunk(tp, dim=2)[rank])
    waiting = len(gradients)
    assert waiting == len(activations) == (limit or 5)
    drain_embedding_wgrad_compute(config, activations, gradients, head.weight)
    assert not activations and not gradients
    errors = []
    for x, direction in zip(inputs, directions):
        y = x.detach().clone().requires_grad_()
        F.linear(y, whole).backward(direction)
        errors.append(_error(x.grad, y.grad))
    return [*errors, _error(_gather_shards(head.weight.main_grad, 0), whole.grad)]


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sp"])
@pytest.mark.parametrize("limit", [0, 2])
def test_deferred_output_layer_gradient(sequence_parallel: bool, limit: int) -> None:
    for errors in run_gang(2, _deferred, sequence_parallel, limit, True):
        assert max(errors) < 1e-13, errors


def _losses(dtype: torch.dtype, smoothing: float) -> list[float]:
    tp, rank = _start()
    torch.manual_seed(4)
    logits = (torch.randn(S, B, V, dtype=torch.float64) * 5).to(dtype)
    labels, weights = torch.randint(V, (S, B)), torch.randn(S, B, dtype=torch.float64)
    mine = logits.chunk(tp, dim=-1)[rank].clone().requires_grad_()
    before = mine.detach().clone()
    losses = vocab_parallel_cross_entropy(mine, labels, smoothing)
    (losses * weights).sum().backward()
    assert torch.equal(mine, before), "the logits are not to be modified"
    whole = logits.double().requires_grad_()
    log_probs = F.log_softmax(whole, dim=-1)
    others = smoothing / (V - 1)  # each wrong word's share; the right one keeps 1 - smoothing
    target = torch.full_like(whole, others).scatter_(-1, labels.unsqueeze(-1), 1.0 - smoothing)
    expected = -(target * log_probs).sum(-1)
    (expected * weights).sum().backward()
    grads = _gather_shards(mine.grad, 2)
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    return [_error(losses.double(), expected), _error(grads.double(), whole.grad)]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_vocab_parallel_cross_entropy(tp: int, smoothing: float) -> None:
    for dtype, loss_bound, grad_bound in (
        (torch.float64, 1e-13, 1e-13),
        (torch.float32, 1e-6, 1e-6),
        (torch.bfloat16, 1e-6, 4e-3),  # the loss is computed in fp32, the gradient rounded to bf16
    ):
        for errors in run_gang(tp, _losses, dtype, smoothing):
            assert errors[0] < loss_bound and errors[1] < grad_bound, (dtype, errors)


def _initial_weights(stride: int) -> tuple[Tensor, Tensor, Tensor]:
    tp, _ = _start()
    config = _config(tp, torch.float32)
    torch.manual_seed(9)
    column = ColumnParallelLinear(H, FF, config=config, init_method=_init, stride=stride)
    row = RowParallelLinear(
        FF, H, config=config, init_method=_init, bias=True, input_is_parallel=True, skip_bias_add=True
    )
    return column.weight.detach(), row.weight.detach(), torch.rand(1)


@pytest.mark.parametrize("stride", [1, 2])
def test_host_initialisation_does_not_depend_on_the_number_of_ranks(stride: int) -> None:
    torch.manual_seed(9)
    up, down = torch.empty(FF, H), torch.empty(H, FF)
    _init(up)
    _init(down)
    following = torch.rand(1)
    for rank, (column, row, draw) in enumerate(run_gang(2, _initial_weights, stride)):
        halves = [part.chunk(2)[rank] for part in up.chunk(stride)]
        assert torch.equal(column, torch.cat(halves))
        assert torch.equal(row, down.chunk(2, dim=1)[rank])
        assert torch.equal(draw, following)


def _tied(hooked: list[str]) -> dict[str, Any]:
    """One weight looked up, multiplied with in the fused layer, and used once more by plain torch."""
    tp, rank = _start()
    config = _config(tp, torch.float64, gradient_accumulation_fusion=True)
    torch.manual_seed(1)
    embedding = VocabParallelEmbedding(V, H, init_method=_init, config=config)
    head = ColumnParallelLinear(
        H, V, config=config, init_method=_init, bias=False, skip_weight_param_allocation=True
    )
    weight = embedding.weight
    whole = _gather_shards(weight.detach(), 0).requires_grad_()
    weight.main_grad = torch.zeros_like(weight)
    accumulation = weight.expand_as(weight).grad_fn.next_functions[0][0]
    accumulation.register_hook(lambda *_: hooked.append("hook"))
    ids = torch.randint(V, (B, S), generator=torch.Generator().manual_seed(2))
    direction = torch.randn(S, B, V, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    logits, _ = head(torch.tanh(embedding(ids).transpose(0, 1)), weight)
    ((logits * direction.chunk(tp, dim=2)[rank]).sum() + weight.square().sum()).backward()
    expected = F.linear(torch.tanh(F.embedding(ids, whole).transpose(0, 1)), whole)
    ((expected * direction).sum() + whole.square().sum()).backward()
    plain = weight.grad  # the rest, which the data-parallel wrapper adds
    gradient = _gather_shards(weight.main_grad + plain, 0)
    return {
        "error": _error(gradient, whole.grad),
        "plain": _error(plain, 2 * weight.detach()),
        "flag": weight.grad_added_to_main_grad,
        "hooked": hooked,
    }


@pytest.mark.parametrize("tp", [1, 2])
def test_tied_weight_adds_up_in_main_grad(tp: int) -> None:
    for found in run_gang(tp, _tied, []):
        assert found["error"] < 1e-13 and found["plain"] < 1e-15
        assert found["flag"] and found["hooked"] == ["hook"]
