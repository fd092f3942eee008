"""FLOPs of hybrid models: a transformer's where layers are its, and counted from the mixer's own sizes where not."""

from __future__ import annotations

from argparse import Namespace

import pytest

from megatron.core.models.mamba import MambaModel
from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
from megatron.core.transformer import TransformerConfig
from megatron.training.flops import is_hybrid, num_floating_point_operations

HIDDEN, LENGTH, VOCAB = 256, 32, 512


def arguments(layers: int, **changes: object) -> Namespace:
    fields = {
        "num_layers": layers, "hidden_size": HIDDEN, "seq_length": LENGTH, "num_attention_heads": 8, "kv_channels": 40,
        "group_query_attention": True, "num_query_groups": 2, "ffn_hidden_size": 700, "swiglu": True, "num_experts": None,
        "padded_vocab_size": VOCAB, "hybrid_attention_ratio": 0.0, "hybrid_mlp_ratio": 0.0,
        "hybrid_override_pattern": None, "spec": None,
    }  # fmt: skip
    return Namespace(**{**fields, **changes})


def test_halves_of_layers_make_a_transformer() -> None:
    hybrid = arguments(6, hybrid_override_pattern="*-*-*-")
    assert is_hybrid(hybrid) and not is_hybrid(arguments(3))
    expected = num_floating_point_operations(arguments(3), 5)
    assert num_floating_point_operations(hybrid, 5) == pytest.approx(expected, rel=1e-12)


def test_a_mamba_layer_is_counted_by_its_parameters() -> None:
    """Two per element of its matrices and of the convolution, five per number of its state."""
    config = TransformerConfig(num_layers=1, hidden_size=HIDDEN, num_attention_heads=8)
    mixer = MambaModel(config, mamba_stack_spec, VOCAB, LENGTH).decoder.layers[0].mixer
    conv_state, state = mixer.allocate_inference_cache(1, LENGTH)
    matrices = mixer.in_proj.weight.numel() + mixer.out_proj.weight.numel() + conv_state.numel()
    per_token = 2 * matrices + 5 * state.numel() + 2 * HIDDEN * VOCAB
    found = num_floating_point_operations(arguments(1, spec=["m", "mamba_stack_spec"]), 3)
    assert found == pytest.approx(3 * 3 * LENGTH * per_token, rel=1e-12)
