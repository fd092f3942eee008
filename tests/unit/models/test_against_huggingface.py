"""The same weights in HuggingFace's models: logits and every gradient, fp32, to 1e-5 of the largest entry."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.activations import openai_gelu
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.common.embeddings.rotary_pos_embedding import FrequencyScaling
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.models.T5.t5_spec import decoder_model_with_local_spec, encoder_model_with_local_spec
from megatron.core.transformer import TransformerConfig

transformers = pytest.importorskip("transformers")

VOCAB, LENGTH, BATCH, HIDDEN, HEADS, LAYERS = 96, 24, 3, 32, 4, 2
HEAD = HIDDEN // HEADS
PLAIN = {
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
#: (our parameter, what of the other model it holds, as a function of that model's tensors)
Mapping = dict[str, Callable[[dict[str, Tensor]], Tensor]]


def packed(query: Tensor, key: Tensor, value: Tensor, groups: int) -> Tensor:
    """Separate projections [heads * d, ..] -> rows grouped by query group: its queries, its key, its value."""
    parts = [t.reshape(groups, -1, *t.shape[1:]) for t in (query, key, value)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def seeded(model: torch.nn.Module) -> torch.nn.Module:
    """Weights far from special values, so that no term of a gradient hides."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.2 * noise if p.dim() == 1 and "weight" in name else 0.1 * noise)
    return model.train()


def check(
    ours: torch.nn.Module,
    theirs: torch.nn.Module,
    mapping: Mapping,
    our_logits: Callable[[], Tensor],
    their_logits: Callable[[], Tensor],
    gradient_mapping: Mapping | None = None,
) -> None:
    """Copy the weights, compare logits and the gradients of one scalar of them."""
    with torch.no_grad():
        their_weights = dict(theirs.named_parameters())
        own = {name: p for name, p in ours.named_parameters() if p.requires_grad}
        assert own.keys() == mapping.keys()
        for name, parameter in own.items():
            parameter.copy_(mapping[name](their_weights))
    logits, expected = our_logits(), their_logits()
    assert_close(logits, expected, "logits")
    torch.manual_seed(3)
    direction = torch.randn(expected.shape)
    (logits * direction).sum().backward()
    (expected * direction).sum().backward()
    their_gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for name, parameter in own.items():
        assert_close(parameter.grad, (gradient_mapping or mapping)[name](their_gradients), name)


def assert_close(actual: Tensor, expected: Tensor, name: str) -> None:
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < 1e-5, f"{name}: {error.item():.2e}"


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


def positions(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.size(1)).expand_as(tokens)


def test_gpt2(tokens: Tensor) -> None:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=LENGTH, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    theirs = seeded(transformers.GPT2LMHeadModel(config))
    ours = GPTModel(
        TransformerConfig(**PLAIN, activation_func=openai_gelu),
        get_gpt_layer_local_spec(),
        VOCAB,
        LENGTH,
        share_embeddings_and_output_weights=True,
    )
    mapping: Mapping = {
        "embedding.word_embeddings.weight": lambda w: w["transformer.wte.weight"],
        "embedding.position_embeddings.weight": lambda w: w["transformer.wpe.weight"],
        "decoder.final_layernorm.weight": lambda w: w["transformer.ln_f.weight"],
        "decoder.final_layernorm.bias": lambda w: w["transformer.ln_f.bias"],
    }
    for i in range(LAYERS):
        their, own = f"transformer.h.{i}.", f"decoder.layers.{i}."
        for kind in ("weight", "bias"):
            mapping |= {
                f"{own}input_layernorm.{kind}": lambda w, n=f"{their}ln_1.{kind}": w[n],
                f"{own}pre_mlp_layernorm.{kind}": lambda w, n=f"{their}ln_2.{kind}": w[n],
                f"{own}self_attention.linear_proj.{kind}": lambda w, n=f"{their}attn.c_proj.{kind}": w[n].t(),
                f"{own}self_attention.linear_qkv.{kind}": lambda w, n=f"{their}attn.c_attn.{kind}": (
                    packed(*w[n].t().chunk(3, dim=0), HEADS)
                    if w[n].dim() == 2
                    else packed(*w[n].chunk(3), HEADS)
                ),
                f"{own}mlp.linear_fc1.{kind}": lambda w, n=f"{their}mlp.c_fc.{kind}": w[n].t(),
                f"{own}mlp.linear_fc2.{kind}": lambda w, n=f"{their}mlp.c_proj.{kind}": w[n].t(),
            }
    check(ours, theirs, mapping, lambda: ours(tokens, positions(tokens), None), lambda: theirs(tokens).logits)


@pytest.mark.parametrize("scaling", [None, "linear", "llama3"])
def test_llama(tokens: Tensor, scaling: str | None) -> None:
    groups = 2
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if scaling == "linear":
        rope |= {"rope_type": "linear", "factor": 4.0}
    if scaling == "llama3":
        rope |= {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=groups, max_position_embeddings=LENGTH, rms_norm_eps=1e-5, tie_word_embeddings=False,
        rope_parameters=rope, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    theirs = seeded(transformers.LlamaForCausalLM(config))
    ours = GPTModel(
        TransformerConfig(
            **PLAIN,
            activation_func=F.silu,
            gated_linear_unit=True,
            bias_activation_fusion=True,
            normalization="RMSNorm",
            add_bias_linear=False,
            num_query_groups=groups,
            ffn_hidden_size=48,
        ),
        get_gpt_layer_local_spec(),
        VOCAB,
        LENGTH,
        position_embedding_type="rope",
        seq_len_interpolation_factor=4.0 if scaling == "linear" else None,
        rope_scaling=FrequencyScaling(original_length=16) if scaling == "llama3" else None,
    )
    mapping: Mapping = {
        "embedding.word_embeddings.weight": lambda w: w["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": lambda w: w["model.norm.weight"],
        "output_layer.weight": lambda w: w["lm_head.weight"],
    }
    for i in range(LAYERS):
        mapping |= {
            f"decoder.layers.{i}.{own}": of(f"model.layers.{i}.{their}.weight")
            for own, their in (
                ("input_layernorm.weight", "input_layernorm"),
                ("pre_mlp_layernorm.weight", "post_attention_layernorm"),
                ("self_attention.linear_proj.weight", "self_attn.o_proj"),
                ("mlp.linear_fc2.weight", "mlp.down_proj"),
            )
        }
        mapping[f"decoder.layers.{i}.self_attention.linear_qkv.weight"] = lambda w, i=i: packed(
            *(w[f"model.layers.{i}.self_attn.{part}_proj.weight"] for part in "qkv"), groups
        )
        mapping[f"decoder.layers.{i}.mlp.linear_fc1.weight"] = lambda w, i=i: torch.cat(
            [w[f"model.layers.{i}.mlp.{part}_proj.weight"] for part in ("gate", "up")]
        )
    check(ours, theirs, mapping, lambda: ours(tokens, positions(tokens), None), lambda: theirs(tokens).logits)


def of(name: str) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda w: w[name]


def test_bert(tokens: Tensor) -> None:
    """The original, post-norm BERT, by way of the residual that is taken after the norm."""
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=4 * HIDDEN, max_position_embeddings=LENGTH, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, layer_norm_eps=1e-5, attn_implementation="eager",
    )  # fmt: skip
    theirs = seeded(transformers.BertForPreTraining(config))
    ours = BertModel(
        TransformerConfig(**PLAIN, apply_residual_connection_post_layernorm=True),
        2,
        bert_layer_local_spec,
        VOCAB,
        LENGTH,
        share_embeddings_and_output_weights=True,
    )
    layer = "bert.encoder.layer."
    mapping: Mapping = {
        f"embedding.{kind}_embeddings.weight": of(f"bert.embeddings.{their}_embeddings.weight")
        for kind, their in (("word", "word"), ("position", "position"), ("tokentype", "token_type"))
    }
    mapping["output_layer.bias"] = of("cls.predictions.bias")
    for kind in ("weight", "bias"):
        # Norm k of the whole stack sits before part k here and after part k - 1 there.
        norms = ["bert.embeddings.LayerNorm"]
        for i in range(LAYERS):
            norms += [f"{layer}{i}.attention.output.LayerNorm", f"{layer}{i}.output.LayerNorm"]
        for i in range(LAYERS):
            own = f"encoder.layers.{i}."
            mapping |= {
                f"{own}input_layernorm.{kind}": of(f"{norms[2 * i]}.{kind}"),
                f"{own}pre_mlp_layernorm.{kind}": of(f"{norms[2 * i + 1]}.{kind}"),
                f"{own}self_attention.linear_proj.{kind}": of(f"{layer}{i}.attention.output.dense.{kind}"),
                f"{own}self_attention.linear_qkv.{kind}": lambda w, i=i, kind=kind: packed(
                    *(w[f"{layer}{i}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")),
                    HEADS,
                ),
                f"{own}mlp.linear_fc1.{kind}": of(f"{layer}{i}.intermediate.dense.{kind}"),
                f"{own}mlp.linear_fc2.{kind}": of(f"{layer}{i}.output.dense.{kind}"),
            }
        mapping |= {
            f"encoder.final_layernorm.{kind}": of(f"{norms[-1]}.{kind}"),
            f"lm_head.dense.{kind}": of(f"cls.predictions.transform.dense.{kind}"),
            f"lm_head.layer_norm.{kind}": of(f"cls.predictions.transform.LayerNorm.{kind}"),
            f"pooler.dense.{kind}": of(f"bert.pooler.dense.{kind}"),
            f"binary_head.{kind}": of(f"cls.seq_relationship.{kind}"),
        }
    tokens = tokens.clamp_min(1)  # the other model gives its padding token 0 no gradient
    types = (torch.arange(LENGTH) > 9).long().expand_as(tokens)
    padding = torch.ones_like(tokens)
    padding[1, 17:] = 0
    shown = padding.unsqueeze(-1)

    def our_outputs() -> Tensor:
        logits, binary = ours(tokens, padding, types)
        return torch.cat([(logits * shown).flatten(), binary.flatten()])

    def their_outputs() -> Tensor:
        # Padded queries are left out: there they attend to the tokens, here to everything alike.
        result = theirs(tokens, attention_mask=padding, token_type_ids=types)
        return torch.cat(
            [(result.prediction_logits * shown).flatten(), result.seq_relationship_logits.flatten()]
        )

    check(ours, theirs, mapping, our_outputs, their_outputs)


def test_t5(tokens: Tensor) -> None:
    """T5 without its relative position bias: RMS norms, no biases, ReLU, unscaled scores, cross-attention,
    padding.
    """
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=HIDDEN, d_kv=HEAD, d_ff=64, num_layers=LAYERS, num_decoder_layers=LAYERS,
        num_heads=HEADS, dropout_rate=0.0, layer_norm_epsilon=1e-5, tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    theirs = seeded(transformers.T5ForConditionalGeneration(config))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "relative_attention_bias" in name:
                parameter.zero_()
    ours_config = TransformerConfig(
        **PLAIN, activation_func=F.relu, normalization="RMSNorm", add_bias_linear=False, ffn_hidden_size=64
    )
    ours = T5Model(
        ours_config,
        ours_config,
        encoder_model_with_local_spec(),
        decoder_model_with_local_spec(),
        VOCAB,
        LENGTH,
        share_embeddings_and_output_weights=True,
        position_embedding_type="none",
    )
    ours.output_layer.bias.requires_grad_(False)  # zero, and the other model has none

    scale = HEAD**0.5  # our scores are divided by it, so queries carry it

    def mapped(w: dict[str, Tensor], query_factor: float) -> dict[str, Tensor]:
        out = {"embedding.word_embeddings.weight": w["shared.weight"]}
        for stack, parts in (("encoder", 1), ("decoder", 2)):
            out[f"{stack}.final_layernorm.weight"] = w[f"{stack}.final_layer_norm.weight"]
            for i in range(LAYERS):
                own, block = f"{stack}.layers.{i}.", f"{stack}.block.{i}.layer."
                attention = f"{block}0.SelfAttention."
                query, key, value = (w[f"{attention}{part}.weight"] for part in "qkv")
                out |= {
                    f"{own}input_layernorm.weight": w[f"{block}0.layer_norm.weight"],
                    f"{own}self_attention.linear_qkv.weight": packed(query * query_factor, key, value, HEADS),
                    f"{own}self_attention.linear_proj.weight": w[f"{attention}o.weight"],
                    f"{own}pre_mlp_layernorm.weight": w[f"{block}{parts}.layer_norm.weight"],
                    f"{own}mlp.linear_fc1.weight": w[f"{block}{parts}.DenseReluDense.wi.weight"],
                    f"{own}mlp.linear_fc2.weight": w[f"{block}{parts}.DenseReluDense.wo.weight"],
                }
                if stack == "decoder":
                    cross = f"{block}1.EncDecAttention."
                    pair = (w[f"{cross}{part}.weight"].view(HEADS, HEAD, -1) for part in "kv")
                    out |= {
                        f"{own}pre_cross_attn_layernorm.weight": w[f"{block}1.layer_norm.weight"],
                        f"{own}cross_attention.linear_q.weight": w[f"{cross}q.weight"] * query_factor,
                        f"{own}cross_attention.linear_kv.weight": torch.cat(tuple(pair), dim=1).flatten(0, 1),
                        f"{own}cross_attention.linear_proj.weight": w[f"{cross}o.weight"],
                    }
        return out

    names = [name for name, p in ours.named_parameters() if p.requires_grad]

    def mapping(query_factor: float) -> Mapping:
        return {name: lambda w, name=name: mapped(w, query_factor)[name] for name in names}

    decoder_tokens = tokens[:, :15].flip(1)
    padding = torch.ones_like(tokens)
    padding[2, 20:] = 0
    encoder_mask = (padding == 0).unsqueeze(1).expand(-1, LENGTH, -1)
    cross_mask = (padding == 0).unsqueeze(1).expand(-1, 15, -1)
    check(
        ours,
        theirs,
        mapping(scale),
        lambda: ours(tokens, decoder_tokens, encoder_mask, None, cross_mask),
        lambda: theirs(input_ids=tokens, attention_mask=padding, decoder_input_ids=decoder_tokens).logits,
        gradient_mapping=mapping(1 / scale),
    )
