"""What a mixer draws, what it stores and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, apply_factory_merges
from megatron.core.models.mamba import MambaModel
from megatron.core.optimizer.param_groups import default_no_weight_decay
from megatron.core.ssm.mamba_mixer import ExtendedRMSNorm, MambaMixer, MambaMixerSubmodules
from megatron.core.ssm.sections import cut_sections, join_sections, mixer_sizes
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.training.checkpointing.legacy import adapt_weights
from tests.unit.ssm.support import stack_spec

PARTS = MambaMixerSubmodules(ColumnParallelLinear, RowParallelLinear)


def mixer(
    hidden: int = 64, layers: int = 4, config: dict[str, Any] | None = None, **changes: Any
) -> MambaMixer:
    fields = {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": 4, **(config or {})}
    sizes = {"d_state": 16, "headdim": 4, "ngroups": 2}
    return MambaMixer(TransformerConfig(**fields), PARTS, hidden, **{**sizes, **changes})


@pytest.mark.parametrize("on_host", [True, False])
def test_initial_values(on_host: bool) -> None:
    """Ranges and spreads of v0.9's; none depends on --init-method-std."""
    config = {"use_cpu_initialization": on_host, "init_method_std": 9.0}
    ours = mixer(hidden=256, layers=9, config=config)
    spread = {
        name: (p.detach().float().std().item(), p.detach().abs().max().item())
        for name, p in ours.named_parameters()
    }
    bound = 1 / math.sqrt(256)
    assert spread["in_proj.weight"][0] == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert spread["in_proj.weight"][1] <= bound
    assert spread["conv1d.weight"][0] == pytest.approx(0.5 / math.sqrt(3), rel=0.05)
    assert spread["conv1d.weight"][1] <= 0.5 and spread["conv1d.bias"][1] <= 0.5
    assert spread["out_proj.weight"][0] == pytest.approx(0.02 / 3, rel=0.02)
    assert torch.equal(ours.D, torch.ones(128)) and torch.equal(ours.norm.weight, torch.ones(512))
    rates = ours.A_log.exp()
    assert rates.min() >= 1 and rates.max() <= 16 and rates.mean().item() == pytest.approx(8.5, rel=0.15)
    steps = F.softplus(ours.dt_bias)
    assert steps.min() > 0.000999 and steps.max() < 0.1001
    assert steps.log().mean().item() == pytest.approx((math.log(0.1) + math.log(0.001)) / 2, rel=0.1)


def test_small_vectors_stay_in_single_precision_and_do_not_decay() -> None:
    ours = mixer(config={"params_dtype": torch.bfloat16, "bf16": True})
    assert ours.A_log.dtype is ours.D.dtype is torch.float32
    assert ours.in_proj.weight.dtype is ours.conv1d.weight.dtype is torch.bfloat16
    kept = {name for name, p in ours.named_parameters() if default_no_weight_decay(name, p)}
    assert kept == {"A_log", "D", "dt_bias", "conv1d.bias", "norm.weight"}


def test_initialisation_can_be_left_out() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    mixer(config={"perform_initialization": False})
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("norm_before_gate", [True, False])
def test_norm_of_groups(norm_before_gate: bool) -> None:
    x, z = torch.randn(3, 12), torch.randn(3, 12)
    norm = ExtendedRMSNorm(12, group_size=4, norm_before_gate=norm_before_gate)
    torch.nn.init.normal_(norm.weight)
    gate = F.silu(z)
    inside = x if norm_before_gate else x * gate
    parts = [F.rms_norm(part, (4,), eps=1e-5) for part in inside.split(4, -1)]
    expected = torch.cat(parts, -1) * norm.weight * (gate if norm_before_gate else 1)
    torch.testing.assert_close(norm(x, z), expected)


@pytest.mark.parametrize(
    "changes", [{"D_has_hdim": True}, {"rmsnorm": False}, {"bias": True}, {"conv_bias": False}]
)
def test_variants_run(changes: dict[str, Any]) -> None:
    """Every parameter of a variant takes part."""
    ours = mixer(**changes)
    output, bias = ours(torch.randn(9, 2, 64))
    assert (bias is not None) == ("bias" in changes)
    (output if bias is None else output + bias).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in ours.parameters())


@pytest.mark.parametrize("ranks", [1, 2])
def test_sections_are_divided_one_by_one(ranks: int) -> None:
    sizes = mixer_sizes(64, 16, 2, 4, 2)
    assert sum(sizes.in_proj.values()) == 2 * 128 + 2 * 2 * 16 + 32
    whole = torch.arange(float(sum(sizes.in_proj.values())))
    pieces = [cut_sections(whole, list(sizes.in_proj.values()), rank, ranks) for rank in range(ranks)]
    z = 128 // ranks
    assert all(torch.equal(piece[:z], whole[rank * z : (rank + 1) * z]) for rank, piece in enumerate(pieces))
    assert all(
        torch.equal(piece[-32 // ranks :], whole[-32:].chunk(ranks)[rank])
        for rank, piece in enumerate(pieces)
    )
    assert torch.equal(join_sections(pieces, list(sizes.per_rank(ranks).in_proj.values())), whole)


def test_stacked_parameters_are_stored_in_sections() -> None:
    """Names as v0.9 writes them, a flattened slice included; joined they are the parameter again."""
    ours = mixer()
    described = ours.sharded_state_dict("m.")
    factories = {name: described[f"m.{name}"] for name in ("in_proj.weight", "conv1d.weight", "conv1d.bias")}
    apply_factories(described)
    pieces = {piece.key: piece for name in factories for piece in described[f"m.{name}"]}
    assert [key.removeprefix("m.") for key in pieces] == [
        *(f"in_proj.weight.{part}" for part in ("z", "x", "B", "C", "dt")),
        *(f"conv1d.weight.{part}" for part in ("x", "B", "C")),
        *(f"conv1d.bias.{part}" for part in ("x", "B", "C")),
    ]
    assert pieces["m.in_proj.weight.dt"].global_shape == (32, 64)
    weights = dict(ours.named_parameters())
    loaded = {name: [piece.data for piece in described[f"m.{name}"]] for name in factories}
    for name, joined in apply_factory_merges(loaded, factories).items():
        assert torch.equal(joined, weights[name])

    flat, held = ours.in_proj.weight.detach().flatten(), slice(64 * 100, 64 * 300 + 7)
    parts = factories["in_proj.weight"].build_fn("k", flat[held], 0, held)
    assert [part.key for part in parts] == ["k.z", "k.x", "k.B", "k.C"]
    assert torch.equal(torch.cat([part.data for part in parts]), flat[held])
    assert all(isinstance(part, ShardedTensor) and part.flattened_range is not None for part in parts)


def test_names_in_checkpoints_are_those_of_fused_norms() -> None:
    fields = TransformerConfig(num_layers=3, hidden_size=64, num_attention_heads=4, normalization="RMSNorm")
    model = MambaModel(
        fields, stack_spec(headdim=4, d_state=16), 96, 64, mamba_ssm_ngroups=2, hybrid_override_pattern="M*-"
    )
    described = model.sharded_state_dict()
    apply_factories(described)
    keys = {
        piece.key for value in described.values() for piece in (value if isinstance(value, list) else [value])
    }
    assert {
        "embedding.word_embeddings.weight",
        "decoder.layers.0.mixer.in_proj.layer_norm_weight",
        "decoder.layers.0.mixer.in_proj.weight.z",
        "decoder.layers.0.mixer.A_log",
        "decoder.layers.0.mixer.norm.weight",
        "decoder.layers.0.mixer.conv1d.bias.C",
        "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.1.self_attention.linear_proj.weight",
        "decoder.layers.2.mlp.linear_fc1.layer_norm_weight",
        "decoder.final_norm.weight",
        "output_layer.weight",
    } <= keys
    assert not any(key.startswith("decoder.layers.0.norm") for key in keys)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"context_parallel_size": 2}, "--context-parallel-size"),
        ({"virtual_pipeline_model_parallel_size": 1}, "--num-layers-per-virtual-pipeline-stage"),
        ({"hidden_size": 36}, "--hidden-size"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], flag: str) -> None:
    fields = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    with pytest.raises(ValueError, match=flag):
        MambaModel(
            TransformerConfig(**{**fields, **changes}), stack_spec(headdim=16), 96, 64, mamba_ssm_ngroups=2
        )


def test_heads_and_groups_must_divide_over_ranks() -> None:
    with pytest.raises(ValueError, match="--tensor-model-parallel-size: 2 groups"):
        mixer_sizes(64, 16, 2, 4, 2).per_rank(4)


def test_fused_norms_of_other_checkpoints_are_known() -> None:
    """v0.9's files have the norm before a mixer inside its projection."""
    wanted = ["decoder.layers.0.norm.weight", "decoder.layers.0.mixer.norm.weight"]
    held = {"decoder.layers.0.mixer.in_proj.layer_norm_weight": 1, wanted[1]: 2}
    assert adapt_weights(held, wanted, 3.0, 4) == {wanted[0]: 1, wanted[1]: 2}
