"""Chained optimizers on gloo: experts divided over ranks, and the first chunk's gather overlapped with the update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.gang import data_parallel as dp
from tests.gang.harness import run_gang

EXPERTS = 2


class _Experts(torch.nn.Module):
    """A dense layer and, of two expert layers, those this rank owns; every sample visits both experts' owners."""

    def __init__(self, dtype: torch.dtype, owned: range) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.dense = torch.nn.Linear(6, 10, dtype=dtype)
        everyone = [torch.nn.Linear(10, 4, dtype=dtype) for _ in range(EXPERTS)]
        self.experts = torch.nn.ModuleDict({str(i): everyone[i] for i in owned})
        for param in self.experts.parameters():
            param.allreduce = len(owned) == EXPERTS

    def forward(self, x: torch.Tensor, expert: str) -> torch.Tensor:
        return self.experts[expert](torch.tanh(self.dense(x)))


def _samples(step: int, expert: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * step + expert)
    return torch.randn(4, 6, generator=generator, dtype=torch.float64).to(dtype)


def _build(dtype: torch.dtype, sharded: bool, ep: int) -> tuple[DistributedDataParallel, Any]:
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ep)
    first = parallel_state.get_expert_model_parallel_rank() * EXPERTS // ep
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, num_moe_experts=EXPERTS,
        expert_model_parallel_size=ep, add_bias_linear=True,
    )  # fmt: skip
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=sharded)
    model = DistributedDataParallel(config, ddp_config, _Experts(dtype, range(first, first + EXPERTS // ep)))
    settings = OptimizerConfig(
        lr=0.01, min_lr=0.0, weight_decay=0.1, clip_grad=0.1, bf16=dtype is torch.bfloat16, params_dtype=dtype,
        use_distributed_optimizer=sharded,
    )  # fmt: skip
    return model, get_megatron_optimizer(settings, [model])


def _train(model: DistributedDataParallel, optimizer: Any, steps: range, dtype: torch.dtype) -> list[float]:
    """Each rank feeds its expert that expert's samples, so that the average over ranks is the one over experts."""
    norms = []
    for step in steps:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        for expert in model.module.experts:
            model(_samples(step, int(expert), dtype), expert).square().sum().backward()
        finalize_model_grads([model])
        success, norm, zeros = optimizer.step()
        assert success and (zeros == 0 or zeros is None)
        norms.append(norm)
    return norms


def _run(dtype: torch.dtype, sharded: bool, ep: int) -> tuple[dict[str, torch.Tensor], list[float], bool]:
    model, optimizer = _build(dtype, sharded, ep)
    norms = _train(model, optimizer, range(3), dtype)
    weights = {name: param.detach().clone() for name, param in model.module.named_parameters()}
    return weights, norms, isinstance(optimizer, ChainedOptimizer)


def _reference() -> tuple[dict[str, torch.Tensor], list[float]]:
    """Plain torch in float64: two experts' losses averaged over two ranks, AdamW, one norm for everything."""
    model = _Experts(torch.float64, range(EXPERTS))
    # Without a scheduler, which applies the groups' multipliers, everything decays.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    norms = []
    for step in range(3):
        optimizer.zero_grad()
        for expert in range(EXPERTS):
            (model(_samples(step, expert, torch.float64), str(expert)).square().sum() / EXPERTS).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1).item())
        optimizer.step()
    return {name: param.detach() for name, param in model.named_parameters()}, norms


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
def test_divided_experts_train_as_in_one_process(sharded, ranks):
    expected, expected_norms = _reference()
    seen = set()
    for weights, norms, chained in run_gang(ranks, _run, torch.float64, sharded, EXPERTS):
        assert chained
        assert norms == pytest.approx(expected_norms, rel=1e-12)
        for name, value in weights.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-14)
        seen |= set(weights)
    assert seen == set(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharded_and_replicated_state_give_the_same_bytes(dtype):
    for (plain, norms, _), (sharded, again, _) in zip(
        run_gang(2, _run, dtype, False, EXPERTS), run_gang(2, _run, dtype, True, EXPERTS)
    ):
        assert norms == pytest.approx(again, rel=1e-14)
        assert all(torch.equal(value, sharded[name]) for name, value in plain.items())


def _save_and_resume(directory: str) -> tuple[bool, list[bool]]:
    model, optimizer = _build(torch.bfloat16, True, EXPERTS)
    _train(model, optimizer, range(2), torch.bfloat16)
    expert_rank = parallel_state.get_expert_model_parallel_rank()
    path = Path(directory) / f"optim_{expert_rank}.pt"
    weights = {name: param.detach().clone() for name, param in model.module.named_parameters()}
    state = optimizer.state_dict()
    optimizer.save_parameter_state(path)
    dist.barrier()
    written = [part is not None for part in torch.load(path, weights_only=True)]
    _train(model, optimizer, range(2, 4), torch.bfloat16)
    parallel_state.destroy_model_parallel()
    other, resumed = _build(torch.bfloat16, True, EXPERTS)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    resumed.load_parameter_state(path)
    _train(other, resumed, range(2, 4), torch.bfloat16)
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters())), written


def test_the_file_of_an_expert_rank_holds_none_where_another_writes(tmp_path):
    assert run_gang(2, _save_and_resume, str(tmp_path)) == [(True, [True, True]), (True, [False, True])]


def _two_chunks(with_step: bool) -> dict[str, torch.Tensor]:
    parallel_state.initialize_model_parallel()
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True
    )
    networks = [dp.Network(torch.float32), torch.nn.Linear(5, 5)]
    chunks = [
        DistributedDataParallel(config, ddp_config, network, disable_bucketing=with_step or index > 0)
        for index, network in enumerate(networks)
    ]
    settings = OptimizerConfig(
        lr=0.01, min_lr=0.0, clip_grad=0.5, use_distributed_optimizer=True, overlap_grad_reduce=True,
        overlap_param_gather=True, overlap_param_gather_with_optimizer_step=with_step,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(settings, chunks)
    assert isinstance(optimizer, ChainedOptimizer) is with_step
    for step in range(3):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        x, y = (
            part.chunk(dist.get_world_size())[dist.get_rank()] for part in dp.batch(step, 0, torch.float32)
        )
        (chunks[1](chunks[0](x)) - y).square().mean().backward()
        finalize_model_grads(chunks)
        optimizer.step()
    for chunk in chunks:
        chunk.disable_forward_pre_hook()
    return {
        f"{index}.{name}": param.detach().clone()
        for index, chunk in enumerate(chunks)
        for name, param in chunk.module.named_parameters()
    }


def test_gathering_during_the_update_changes_nothing():
    plain, overlapped = (run_gang(2, _two_chunks, with_step) for with_step in (False, True))
    for expected, got in zip(plain, overlapped):
        assert all(torch.equal(value, got[name]) for name, value in expected.items())
