"""Initial weights are v0.9's draw for draw: sums over every parameter as recorded from its runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig

RECORDED = json.loads(
    (Path(__file__).parents[2] / "golden" / "models" / "initial_param_sums.json").read_text()
)
BASE: dict[str, Any] = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
CASES: dict[str, dict[str, Any]] = {
    "fp32_w1": {},
    "w1_cpu_init": {"use_cpu_initialization": True},
    "rope_swiglu_gqa_untied_w1": {
        "activation_func": F.silu,
        "gated_linear_unit": True,
        "num_query_groups": 2,
        "add_bias_linear": False,
        "ffn_hidden_size": 96,
    },
    "moe4_w1": {"num_moe_experts": 4, "moe_router_topk": 2, "add_bias_linear": False},
}


@pytest.mark.parametrize("name", CASES)
def test_initial_weights(name: str) -> None:
    config = TransformerConfig(**BASE, **CASES[name])
    rope = name.startswith("rope")
    torch.manual_seed(1234)
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(config.num_moe_experts),
        vocab_size=5120,
        max_sequence_length=32,
        share_embeddings_and_output_weights=not rope,
        position_embedding_type="rope" if rope else "learned_absolute",
    )
    own = [
        [key, list(p.shape), p.double().sum().item(), p.double().abs().sum().item()]
        for key, p in model.named_parameters()
    ]
    expected = RECORDED[name]
    assert [row[:2] for row in own] == [row[:2] for row in expected]
    for mine, theirs in zip(own, expected):
        assert mine[2:] == pytest.approx(theirs[2:], rel=1e-5, abs=1e-4), mine[0]


@pytest.mark.parametrize(("method", "bound"), [("normal", None), ("xavier", 1.0)])
def test_init_method_reaches_every_matrix(method: str, bound: float | None) -> None:
    """An initialiser of the user's is used for all weights but the output projections, which have their own."""
    changes = {} if method == "normal" else {"init_method": torch.nn.init.xavier_uniform_}
    get_cuda_rng_tracker()
    model = GPTModel(TransformerConfig(**BASE, **changes), get_gpt_layer_local_spec(), 512, 32)
    fc1 = model.decoder.layers[0].mlp.linear_fc1.weight
    limit = (6 / (64 + 256)) ** 0.5
    if bound is not None:
        assert fc1.abs().max().item() <= limit
        assert fc1.std().item() == pytest.approx(limit / 3**0.5, rel=0.05)
    else:
        assert fc1.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.decoder.layers[0].mlp.linear_fc2.weight.std().item() == pytest.approx(
        0.02 / 4**0.5, rel=0.05
    )
