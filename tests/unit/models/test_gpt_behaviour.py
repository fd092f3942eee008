"""What a GPT does besides its numbers: cache, dropout under recomputation, half precision, refusals."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.inference_params import InferenceParams
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer

VOCAB, LENGTH = 64, 16
BASE: dict[str, Any] = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
PLAIN = {"hidden_dropout": 0.0, "attention_dropout": 0.0}


def build(positions: str = "learned_absolute", **changes: Any) -> GPTModel:
    config = TransformerConfig(**{**BASE, **changes})
    torch.manual_seed(7)
    return GPTModel(config, get_gpt_layer_local_spec(), VOCAB, LENGTH, position_embedding_type=positions)


def batch(rows: int = 3) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(1))
    return ids, torch.arange(LENGTH).expand_as(ids)


@pytest.mark.parametrize("steps", [[10, 1, 1, 1, 1, 1, 1], [6, 4, 1, 5]], ids=["token by token", "in pieces"])
@pytest.mark.parametrize("kind", ["learned_absolute", "rope"])
def test_cached_decoding_equals_the_full_forward(kind: str, steps: list[int]) -> None:
    model = build(kind, num_query_groups=2, **PLAIN).eval()
    ids, positions = batch()
    with torch.no_grad():
        whole = model(ids, positions, None)
        cache = InferenceParams(max_batch_size=4, max_sequence_length=LENGTH + 3)
        for n in steps:
            now = slice(cache.sequence_len_offset, cache.sequence_len_offset + n)
            part = model(ids[:, now], positions[:, now], None, inference_params=cache)
            torch.testing.assert_close(part, whole[:, now], rtol=1e-5, atol=1e-5)
            cache.sequence_len_offset += n
    keys, values = cache.key_value_memory_dict[2]
    assert keys.shape == values.shape == (LENGTH + 3, 4, 2, 8)


def test_cache_overflow_is_refused() -> None:
    model = build(**PLAIN).eval()
    ids, positions = batch()
    with torch.no_grad(), pytest.raises(ValueError, match="InferenceParams with larger maxima"):
        model(ids, positions, None, inference_params=InferenceParams(3, LENGTH - 1))


@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
        {"recompute_granularity": "selective"},
    ],
    ids=["uniform", "block", "selective"],
)
@pytest.mark.parametrize("fused", [False, True])
def test_recomputation_repeats_dropout_exactly(recompute: dict[str, Any], fused: bool) -> None:
    """Loss and gradients with dropout on, bit for bit, and the random states after the step."""
    results = []
    ids, positions = batch()
    for changes in ({}, recompute):
        get_cuda_rng_tracker().set_states(
            {"model-parallel-rng": torch.Generator().manual_seed(9).get_state()}
        )
        model = build(bias_dropout_fusion=fused, bias_activation_fusion=fused, **changes)
        get_cuda_rng_tracker().set_states(
            {"model-parallel-rng": torch.Generator().manual_seed(9).get_state()}
        )
        torch.manual_seed(3)
        loss = model(ids, positions, None, labels=ids).mean()
        loss.backward()
        state = get_cuda_rng_tracker().get_states()["model-parallel-rng"]
        results.append(([loss, *(p.grad for p in model.parameters())], torch.get_rng_state(), state))
    (plain, *states), (again, *states_again) = results
    assert all(torch.equal(a, b) for a, b in zip(plain, again))
    assert all(torch.equal(a, b) for a, b in zip(states, states_again))


def test_fp32_residual_stream() -> None:
    """bf16 weights and branches, fp32 sums: the block's output before the last norm is fp32 and closer to
    fp32's.
    """
    ids, positions = batch()
    outputs, weights = {}, {}
    for name, changes in (
        ("exact", {}),
        ("half", {"bf16": True, "params_dtype": torch.bfloat16}),
        ("wide", {"bf16": True, "params_dtype": torch.bfloat16, "fp32_residual_connection": True}),
    ):
        model = build(num_layers=2, **PLAIN, **changes).eval()
        if "bf16" in changes:
            model.bfloat16().load_state_dict(weights)
        else:
            weights = model.state_dict()
        streams: list[Tensor] = []
        model.decoder.layers[-1].register_forward_hook(lambda *a, s=streams: s.append(a[-1][0]))
        with torch.no_grad():
            outputs[name] = model(ids, positions, None).float()
        assert streams[0].dtype == (torch.bfloat16 if name == "half" else torch.float32)
    error = {name: (outputs[name] - outputs["exact"]).norm() for name in ("half", "wide")}
    assert error["wide"] < error["half"]


def test_spec_parameters_win_and_errors_name_the_class() -> None:
    class Needs:
        def __init__(self, size: int) -> None:
            self.size = size

    assert build_module(ModuleSpec(Needs, params={"size": 3}), size=5).size == 3
    with pytest.raises(TypeError, match="when instantiating Needs"):
        build_module(Needs, width=3)
    with pytest.raises(ValueError, match=r"no\.such\.module"):
        build_module(ModuleSpec(("no.such.module", "Thing")))


class AsInV09(TransformerLayer):
    """A layer as users' programs derive it: the forward pass is their own, its parts are the base's."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, **others: Any
    ) -> tuple[Tensor, None]:
        for norm, part, joint in (
            (
                self.input_layernorm,
                partial(self.self_attention, attention_mask=attention_mask),
                self.self_attn_bda,
            ),
            (self.pre_mlp_layernorm, self.mlp, self.mlp_bda),
        ):
            changed = part(norm(hidden_states))
            with self.bias_dropout_add_exec_handler():
                add = joint(self.training, self.config.bias_dropout_fusion)
                hidden_states = add(changed, hidden_states, self.hidden_dropout)
        return hidden_states, None


def test_a_derived_layer_finds_the_parts_of_v09() -> None:
    config = TransformerConfig(
        num_layers=2, hidden_size=16, num_attention_heads=4, recompute_granularity="selective"
    )
    spec = get_gpt_layer_local_spec()
    block = TransformerBlock(config, spec).eval()
    derived = TransformerBlock(config, ModuleSpec(AsInV09, submodules=spec.submodules)).eval()
    derived.load_state_dict(block.state_dict())
    assert block.checkpoint_core_attention and all(isinstance(layer, AsInV09) for layer in derived.layers)
    hidden = torch.randn(5, 2, 16)
    torch.testing.assert_close(derived(hidden, None), block(hidden, None))


def test_tokentypes_and_inputs_are_checked() -> None:
    model = build(**PLAIN)
    ids, positions = batch()
    with pytest.raises(ValueError, match="num_tokentypes"):
        model.embedding(ids, positions, tokentype_ids=ids)
    with pytest.raises(ValueError, match="one input tensor"):
        model.set_input_tensor([None, None])


@pytest.mark.parametrize("fused", [False, True])
def test_a_joint_takes_a_bias_of_any_shape(fused: bool) -> None:
    """A bias per token, or one expanded to the stream's shape, as experts and older layers give them."""
    x, bias, residual = torch.randn(3, 4, 2, 8, dtype=torch.float64).requires_grad_().unbind()
    torch.manual_seed(3)
    output = get_bias_dropout_add(True, fused)((x, bias), residual, 0.25)
    added = (output - residual).detach()
    kept = added != 0
    torch.testing.assert_close(added, (x + bias).detach() / 0.75 * kept)
    assert 0 < kept.double().mean() < 1
    (gradient,) = torch.autograd.grad(output.sum(), bias)
    torch.testing.assert_close(gradient, kept.double() / 0.75)
