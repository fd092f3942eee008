"""Every option of the dense models in float64 against the plain-torch reference: outputs and all gradients."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.activations import squared_relu
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.models.T5.t5_spec import decoder_model_with_local_spec, encoder_model_with_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import TransformerConfig
from tests.reference import models as reference

VOCAB, LENGTH = 64, 20
BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "params_dtype": torch.float64,
}


def shape_of(config: TransformerConfig, **extra: Any) -> reference.Shape:
    return reference.Shape(
        layers=config.num_layers,
        heads=config.num_attention_heads,
        groups=config.num_query_groups,
        head=config.kv_channels,
        eps=config.layernorm_epsilon,
        activation=config.activation_func,
        gated=config.gated_linear_unit,
        rms=config.normalization == "RMSNorm",
        zero_centred=config.layernorm_zero_centered_gamma,
        post_norm_residual=config.apply_residual_connection_post_layernorm,
        rotary_interleaved=config.rotary_interleaved,
        **extra,
    )


def noisy(model: torch.nn.Module) -> torch.nn.Module:
    model.double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def check(
    model: torch.nn.Module, ours: Callable[[], Tensor], theirs: Callable[[reference.State], Tensor]
) -> None:
    """Same values, and the same gradient of every parameter (1e-11 of its largest entry)."""
    twins = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    actual, expected = ours(), theirs(twins)
    close(actual, expected, "output")
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (actual * direction).sum().backward()
    (expected * direction).sum().backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad, twins[name].grad, name)


def close(actual: Tensor, expected: Tensor, name: str) -> None:
    # Some gradients vanish (a key norm's bias shifts all scores of a query alike): those only have to be
    # small.
    error = ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-3)).item()
    assert error < 1e-11, f"{name}: {error:.1e}"


def tokens(length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(1, VOCAB, (3, length), generator=torch.Generator().manual_seed(seed))


def positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.size(1)).expand_as(ids)


TANH = lambda x: F.gelu(x, approximate="tanh")  # noqa: E731  (the form of the fused GELU)
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # name: (configuration, model arguments, what the reference must know besides)
    "plain": ({}, {}, {}),
    "tied": ({}, {"share_embeddings_and_output_weights": True}, {}),
    "no positions": ({}, {"position_embedding_type": "none"}, {}),
    "rotary": ({}, {"position_embedding_type": "rope"}, {"rotary_dim": 8}),
    "rotary fused, base": (
        {"apply_rope_fusion": True},
        {"position_embedding_type": "rope", "rotary_base": 500},
        {"rotary_dim": 8, "rotary_base": 500.0},
    ),
    "rotary half": ({}, {"position_embedding_type": "rope", "rotary_percent": 0.5}, {"rotary_dim": 4}),
    "rotary interleaved": (
        {"rotary_interleaved": True},
        {"position_embedding_type": "rope", "rotary_percent": 0.5},
        {"rotary_dim": 4},
    ),
    "rotary interpolated": (
        {},
        {"position_embedding_type": "rope", "seq_len_interpolation_factor": 2.5},
        {"rotary_dim": 8, "interpolation": 2.5},
    ),
    "grouped": ({"num_query_groups": 2}, {}, {}),
    "one group, wide heads": ({"num_query_groups": 1, "kv_channels": 12}, {}, {}),
    "no bias": ({"add_bias_linear": False}, {}, {}),
    "qkv bias only": ({"add_bias_linear": False, "add_qkv_bias": True}, {}, {}),
    "RMS norm": ({"normalization": "RMSNorm"}, {}, {}),
    "zero-centred": ({"layernorm_zero_centered_gamma": True}, {}, {}),
    "zero-centred RMS norm": ({"layernorm_zero_centered_gamma": True, "normalization": "RMSNorm"}, {}, {}),
    "SwiGLU": ({"activation_func": F.silu, "gated_linear_unit": True, "ffn_hidden_size": 40}, {}, {}),
    "SwiGLU fused": (
        {"activation_func": F.silu, "gated_linear_unit": True, "bias_activation_fusion": True},
        {},
        {},
    ),
    "GEGLU": ({"gated_linear_unit": True}, {}, {}),
    "squared ReLU": ({"activation_func": squared_relu}, {}, {}),
    "post-norm residual": ({"apply_residual_connection_post_layernorm": True}, {}, {}),
    "query-key norm": ({"qk_layernorm": True, "num_query_groups": 2}, {}, {}),
    "query-key scaling": ({"apply_query_key_layer_scaling": True}, {}, {}),
    "masked softmax fused": ({"masked_softmax_fusion": True, "attention_softmax_in_fp32": False}, {}, {}),
    "dropout fused": ({"bias_dropout_fusion": True}, {}, {}),
    "window": ({"window_size": (5, 0)}, {}, {"window": 5}),
    "loss fused": ({"cross_entropy_loss_fusion": True}, {}, {}),
    "full recompute": (
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {},
        {},
    ),
    "block recompute": (
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
        {"position_embedding_type": "rope"},
        {"rotary_dim": 8},
    ),
    "selective recompute": ({"recompute_granularity": "selective"}, {}, {}),
}


def build_gpt(changes: dict[str, Any], arguments: dict[str, Any]) -> tuple[TransformerConfig, GPTModel]:
    config = TransformerConfig(**{**BASE, **changes})
    spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm)
    return config, noisy(GPTModel(config, spec, VOCAB, LENGTH, **arguments))


@pytest.mark.parametrize("option", OPTIONS)
def test_gpt(option: str) -> None:
    changes, arguments, known = OPTIONS[option]
    config, model = build_gpt(changes, arguments)
    ids, shape = tokens(), shape_of(config, **known)
    labels = ids.roll(-1, 1)

    def expected(w: reference.State) -> Tensor:
        return F.cross_entropy(
            reference.gpt(w, shape, ids).flatten(0, 1), labels.flatten(), reduction="none"
        ).view(3, -1)

    logits = model(ids, positions(ids), None)
    close(logits, reference.gpt(dict(model.named_parameters()), shape, ids), "logits")
    check(model, lambda: model(ids, positions(ids), None, labels=labels), expected)


def test_fused_gelu_is_the_tanh_form() -> None:
    config, model = build_gpt({"bias_activation_fusion": True}, {})
    shape = reference.Shape(**{**shape_of(config).__dict__, "activation": TANH})
    ids = tokens()
    own = dict(model.named_parameters())
    error = (model(ids, positions(ids), None) - reference.gpt(own, shape, ids)).abs().max()
    assert error < 1e-6  # v0.9's constants have eight digits


def documents(ids: Tensor, ends: list[list[int]]) -> tuple[Tensor, Tensor]:
    """The mask and positions of documents that end at `ends`, as the dataset makes them with both resets on."""
    hidden = reference.future(ids.size(1)).repeat(ids.size(0), 1, 1)
    where = positions(ids).clone()
    for row, stops in enumerate(ends):
        for stop in stops:
            hidden[row, stop + 1 :, : stop + 1] = True
            where[row, stop + 1 :] = torch.arange(ids.size(1) - stop - 1)
    return hidden, where


@pytest.mark.parametrize("kind", ["learned_absolute", "rope"])
def test_documents_by_mask(kind: str) -> None:
    config, model = build_gpt({"num_query_groups": 2}, {"position_embedding_type": kind})
    ids = tokens()
    hidden, where = documents(ids, [[4, 11], [], [18]])
    shape = shape_of(config, rotary_dim=8 if kind == "rope" else 0)
    check(
        model,
        lambda: model(ids, where, hidden.unsqueeze(1)),
        lambda w: reference.gpt(w, shape, ids, hidden, where),
    )


def test_documents_packed_end_to_end() -> None:
    """Packed parameters: each document is a sequence of its own, rotary positions included."""
    config, model = build_gpt({"num_query_groups": 2}, {"position_embedding_type": "rope"})
    shape, ids = shape_of(config, rotary_dim=8), tokens()[:1]
    borders = [0, 5, 12, LENGTH]
    cu_seqlens = torch.tensor(borders, dtype=torch.int32)
    packed = PackedSeqParams("thd", cu_seqlens, cu_seqlens, 8, 8)
    check(
        model,
        lambda: model(ids, positions(ids), None, packed_seq_params=packed),
        lambda w: torch.cat([reference.gpt(w, shape, ids[:, a:b]) for a, b in pairwise(borders)], dim=1),
    )


def test_a_plain_causal_mask_changes_nothing() -> None:
    _, model = build_gpt({}, {})
    ids = tokens()
    mask = reference.future(LENGTH).unsqueeze(0)
    assert torch.equal(model(ids, positions(ids), mask), model(ids, positions(ids), None))


@pytest.mark.parametrize("post_norm", [False, True])
def test_bert(post_norm: bool) -> None:
    config = TransformerConfig(**BASE, apply_residual_connection_post_layernorm=post_norm)
    model = noisy(
        BertModel(config, 2, bert_layer_local_spec, VOCAB, LENGTH, share_embeddings_and_output_weights=True)
    )
    ids, present = tokens(), torch.ones(3, LENGTH, dtype=torch.long)
    present[0, 13:] = 0
    types = (positions(ids) > 8).long()

    def flat(pair: tuple[Tensor, Tensor]) -> Tensor:
        return torch.cat([t.flatten() for t in pair])

    shape = shape_of(config)
    check(
        model,
        lambda: flat(model(ids, present, types)),
        lambda w: flat(reference.bert(w, shape, ids, types, present)),
    )


def test_bert_embeddings_are_means_over_inner_tokens() -> None:
    config = TransformerConfig(**BASE)
    model = noisy(BertModel(config, 2, bert_layer_local_spec, VOCAB, LENGTH, return_embeddings=True)).eval()
    ids, present = tokens(), torch.ones(3, LENGTH, dtype=torch.long)
    present[1, 7:] = 0
    types = torch.zeros_like(ids)
    w = dict(model.named_parameters())
    hidden = ~(present.bool()[:, :, None] & present.bool()[:, None, :])
    states = reference.stack(w, "encoder", reference.embed(w, ids, types), hidden, shape_of(config))
    expected = torch.stack([states[0, 1:-1].mean(0), states[1, 1:6].mean(0), states[2, 1:-1].mean(0)])
    torch.testing.assert_close(model(ids, present, types).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recompute", [None, "uniform"])
def test_t5(recompute: str | None) -> None:
    changes = (
        {"recompute_granularity": "full", "recompute_method": recompute, "recompute_num_layers": 2}
        if recompute
        else {}
    )
    config = TransformerConfig(**BASE, **changes)
    model = noisy(
        T5Model(
            config,
            config,
            encoder_model_with_local_spec(),
            decoder_model_with_local_spec(),
            VOCAB,
            LENGTH,
            share_embeddings_and_output_weights=True,
        )
    )
    source, target = tokens(), tokens(12, seed=1)
    source_present, target_present = torch.ones_like(source), torch.ones_like(target)
    source_present[0, 15:], target_present[2, 9:] = 0, 0

    def hidden(rows: Tensor, columns: Tensor) -> Tensor:
        return ~(rows.bool()[:, :, None] & columns.bool()[:, None, :])

    masks = (
        hidden(source_present, source_present),
        hidden(target_present, target_present) | reference.future(12),
        hidden(target_present, source_present),
    )
    check(
        model,
        lambda: model(source, target, *masks),
        lambda w: reference.t5(w, shape_of(config), source, target, masks),
    )
