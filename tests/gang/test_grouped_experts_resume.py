"""The distributed optimizer's state of grouped experts, saved by one layout and taken over by another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from tests.gang.harness import run_gang


def _trained(ep: int, seed: int) -> tuple[MoELayer, Any]:
    """A gated mixture of grouped experts and its optimizer after a step."""
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ep)
    model_parallel_cuda_manual_seed(seed)
    config = TransformerConfig(
        num_layers=1, hidden_size=6, num_attention_heads=2, ffn_hidden_size=10, num_moe_experts=4,
        moe_grouped_gemm=True, gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False,
        expert_model_parallel_size=ep, bf16=True, params_dtype=torch.bfloat16,
    )  # fmt: skip
    layer = MoELayer(config)
    model = DistributedDataParallel(
        config, DistributedDataParallelConfig(use_distributed_optimizer=True), layer
    )
    settings = OptimizerConfig(lr=0.1, bf16=True, params_dtype=torch.bfloat16, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(settings, [model])
    for parameter in model.parameters():
        parameter.main_grad.normal_()
    optimizer.step()
    return layer, optimizer


def _move(directory: str, ep_before: int, ep_after: int) -> tuple[int, list[str]]:
    """Body: save, load into the other layout, save again -> stored tensors, and names of those that differ."""
    first, second = Path(directory) / "first", Path(directory) / "second"
    if torch.distributed.get_rank() == 0:
        first.mkdir()
        second.mkdir()
    torch.distributed.barrier()

    def described(layer: MoELayer, optimizer: Any, is_loading: bool = False) -> Any:
        return optimizer.sharded_state_dict(
            layer.sharded_state_dict(), is_loading=is_loading, sharding_type="fully_sharded_model_space"
        )

    dist_checkpointing.save(described(*_trained(ep_before, seed=3)), first)
    parallel_state.destroy_model_parallel()
    layer, optimizer = _trained(ep_after, seed=4)
    optimizer.load_state_dict(dist_checkpointing.load(described(layer, optimizer, is_loading=True), first))
    dist_checkpointing.save(described(layer, optimizer), second)
    before, after = (dist_checkpointing.load_plain_tensors(each) for each in (first, second))
    assert before.keys() == after.keys()
    tensors = {key: value for key, value in before.items() if isinstance(value, torch.Tensor)}
    return len(tensors), [key for key, value in tensors.items() if not torch.equal(value, after[key])]


def test_state_of_grouped_experts_moves_between_layouts(tmp_path: Path) -> None:
    """Two owners of every expert's state, then one: router, both weights, and three tensors for each."""
    assert run_gang(4, _move, str(tmp_path), 2, 4) == [(9, [])] * 4
