"""The same weights in HuggingFace's Mamba-2: outputs and every gradient."""

from __future__ import annotations

import pytest
import torch

from megatron.core.models.mamba import MambaModel
from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import TransformerConfig
from tests.unit.models.test_against_huggingface import assert_close, check, seeded
from tests.unit.ssm.support import stack_spec

transformers = pytest.importorskip("transformers")

HIDDEN, HEAD, STATE, CHUNK, VOCAB, LAYERS = 24, 8, 10, 8, 96, 2


def their_config(groups: int, **changes: object) -> object:
    return transformers.Mamba2Config(
        hidden_size=HIDDEN, expand=2, head_dim=HEAD, num_heads=2 * HIDDEN // HEAD, state_size=STATE, n_groups=groups,
        conv_kernel=4, chunk_size=CHUNK, num_hidden_layers=LAYERS, vocab_size=VOCAB, layer_norm_epsilon=1e-5,
        use_bias=False, use_conv_bias=True, tie_word_embeddings=False, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        **changes,
    )  # fmt: skip


def our_config(**changes: object) -> TransformerConfig:
    fields = {"num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": 4, "normalization": "RMSNorm",
              "add_bias_linear": False, "hidden_dropout": 0.0}  # fmt: skip
    return TransformerConfig(**{**fields, **changes})


def parameters(module: torch.nn.Module, seed: int) -> None:
    """Values in general position; decay rates and step sizes in a range where all positions matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise if parameter.dim() > 1 else noise.abs() + 0.1)
            if name.endswith("dt_bias"):
                parameter.copy_(noise - 2)


@pytest.mark.parametrize("use_mem_eff_path", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("length", [5, 16, 19])
def test_mixer(length: int, groups: int, use_mem_eff_path: bool) -> None:
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    theirs = Mamba2Mixer(their_config(groups), layer_idx=0)
    parameters(theirs, 1)
    ours = MambaMixer(
        our_config(), MambaMixerSubmodules(ColumnParallelLinear, RowParallelLinear), HIDDEN, d_state=STATE,
        headdim=HEAD, ngroups=groups, chunk_size=CHUNK, use_mem_eff_path=use_mem_eff_path,
    )  # fmt: skip
    mapping = {name: lambda w, name=name: w[name] for name, _ in ours.named_parameters()}
    hidden = torch.randn(2, length, HIDDEN)
    inputs = [hidden.clone().requires_grad_(), hidden.transpose(0, 1).clone().requires_grad_()]
    check(ours, theirs, mapping, lambda: ours(inputs[1])[0].transpose(0, 1), lambda: theirs(inputs[0]))
    assert_close(inputs[1].grad.transpose(0, 1), inputs[0].grad, "input")


def models(groups: int) -> tuple[MambaModel, torch.nn.Module]:
    theirs = seeded(transformers.Mamba2ForCausalLM(their_config(groups, residual_in_fp32=False)))
    spec = stack_spec(d_state=STATE, headdim=HEAD, chunk_size=CHUNK)
    return MambaModel(our_config(), spec, VOCAB, 64, mamba_ssm_ngroups=groups), theirs


@pytest.mark.parametrize("groups", [1, 3])
def test_model(groups: int) -> None:
    ours, theirs = models(groups)
    tokens = torch.randint(0, VOCAB, (3, 21), generator=torch.Generator().manual_seed(1))
    check(ours, theirs, mapping(), lambda: ours(tokens, None, None), lambda: theirs(tokens).logits)


def mapping() -> dict:
    own = {
        "embedding.word_embeddings.weight": lambda w: w["backbone.embeddings.weight"],
        "decoder.final_norm.weight": lambda w: w["backbone.norm_f.weight"],
        "output_layer.weight": lambda w: w["lm_head.weight"],
    }
    for i in range(LAYERS):
        for part in ("norm.weight", "mixer.dt_bias", "mixer.A_log", "mixer.D", "mixer.in_proj.weight",
                     "mixer.conv1d.weight", "mixer.conv1d.bias", "mixer.norm.weight", "mixer.out_proj.weight"):  # fmt: skip
            own[f"decoder.layers.{i}.{part}"] = lambda w, n=f"backbone.layers.{i}.{part}": w[n]
    return own
