"""HuggingFace architectures with an encoder: Megatron-BERT, and Blenderbot for Megatron's T5."""

from __future__ import annotations

from argparse import Namespace

import torch

from tools.checkpoint import names
from tools.checkpoint.hf_rules import Family, Rule, Same, Tensors, both, packed
from tools.checkpoint.hf_settings import (
    Config,
    activation,
    activation_arguments,
    base,
    norm_epsilon,
    plain_problems,
    refuse,
)

# -------------------------------------------------------------------------------------------------------------- BERT


def _bert_arguments(config: Config) -> Config:
    refuse(
        "config.json",
        {
            "one of the types of tokens only": config.get("type_vocab_size", 2) != 2,
            "relative positions": config.get("position_embedding_type", "absolute") != "absolute",
            # Both the layers and the head use hidden_act; here the head's is always exact.
            f"hidden_act {config.get('hidden_act')}": config.get("hidden_act", "gelu") != "gelu",
        },
    )
    architecture = (config.get("architectures") or ["MegatronBertForPreTraining"])[0]
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": config["num_attention_heads"],
        "kv_channels": config["hidden_size"] // config["num_attention_heads"],
        "max_position_embeddings": config["max_position_embeddings"],
        "norm_epsilon": config.get("layer_norm_eps", 1e-12),
        "normalization": "LayerNorm",
        "position_embedding_type": "learned_absolute",
        "add_bias_linear": True,
        "swiglu": False,
        "bias_gelu_fusion": False,
        "openai_gelu": False,
        "bert_binary_head": architecture == "MegatronBertForPreTraining",
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", True),
        "tokenizer_type": "BertWordPieceLowerCase",
    }


def _bert_config(md: Namespace, saved: Namespace, wanted: str | None) -> Config:
    tanh = "tanh GELU in the layers and exact GELU in the head (--bias-gelu-fusion)"
    refuse(
        "--saver hf",
        {**plain_problems(saved, md), tanh: activation(saved) != "gelu"},
        "for a fused activation add --hidden-act gelu, which the published checkpoints use too",
    )
    config = {
        "model_type": "megatron-bert",
        "hidden_size": md.hidden_size,
        "intermediate_size": saved.ffn_hidden_size,
        "num_hidden_layers": md.num_layers,
        "num_attention_heads": md.num_attention_heads,
        "max_position_embeddings": md.max_position_embeddings,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": norm_epsilon(saved),
    }
    return base(
        config, md, saved, "MegatronBertForPreTraining" if md.bert_binary_head else "MegatronBertForMaskedLM"
    )


def _bert_after_read(kind: str, message: Tensors, saved: Namespace) -> None:
    if kind == "embeddings" and not saved.bert_binary_head:
        kinds = message.pop("tokentype embeddings", None)
        refuse(
            "the model", {"types of tokens without a binary head": kinds is not None and bool(kinds.any())}
        )


def _bert_before_write(kind: str, message: Tensors, saved: Namespace) -> None:
    if kind == "embeddings" and "tokentype embeddings" not in message:
        words = message["word embeddings"]
        message["tokentype embeddings"] = torch.zeros(2, words.shape[1], dtype=words.dtype)
    if kind == "pooler" and not getattr(saved, "bert_binary_head", True):
        message.clear()


BERT = Family(
    model_type="BERT",
    types=("megatron-bert",),
    auto_class="AutoModelForPreTraining",
    rules={
        "embeddings": (
            "bert.embeddings.",
            [
                Same("word embeddings", "word_embeddings.weight"),
                Same("position embeddings", "position_embeddings.weight"),
                Same("tokentype embeddings", "token_type_embeddings.weight"),
            ],
        ),
        "transformer layer": (
            "bert.encoder.layer.{}.",
            [
                *both("input norm", "attention.ln"),
                *packed("qkv", "attention.self.query", "attention.self.key", "attention.self.value"),
                *both("dense", "attention.output.dense"),
                *both("post norm", "ln"),
                *both("mlp l0", "intermediate.dense"),
                *both("mlp l1", "output.dense"),
            ],
        ),
        "final norm": ("bert.encoder.", both("", "ln")),
        "output layer": ("cls.predictions.decoder.", [Same("weight", "weight")]),
        "pooler": ("bert.pooler.", both("", "dense")),
        "lm head": (
            "cls.predictions.",
            [*both("dense", "transform.dense"), *both("norm", "transform.LayerNorm"), Same("bias", "bias")],
        ),
        "binary head": ("cls.", both("", "seq_relationship")),
    },
    arguments=_bert_arguments,
    config=_bert_config,
    ignored=("position_ids", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
    after_read=_bert_after_read,
    before_write=_bert_before_write,
)


# ---------------------------------------------------------------------------------------- T5, as Megatron understands it


def _t5_arguments(config: Config) -> Config:
    heads, norms = config["encoder_attention_heads"], config.get("normalize_embedding", False)
    refuse(
        "config.json",
        {
            "encoder and decoder of different width": heads != config["decoder_attention_heads"]
            or config["encoder_ffn_dim"] != config["decoder_ffn_dim"],
            "scaled embeddings (scale_embedding)": config.get("scale_embedding"),
            "normalised embeddings": norms,
            "an untied output layer": not config.get("tie_word_embeddings", True),
        },
    )
    return {
        "num_layers": config["encoder_layers"],
        "encoder_num_layers": config["encoder_layers"],
        "decoder_num_layers": config["decoder_layers"],
        "hidden_size": config["d_model"],
        "ffn_hidden_size": config["encoder_ffn_dim"],
        "num_attention_heads": heads,
        "kv_channels": config["d_model"] // heads,
        "max_position_embeddings": config["max_position_embeddings"],
        "encoder_seq_length": config["max_position_embeddings"],
        "decoder_seq_length": config["max_position_embeddings"],
        "norm_epsilon": 1e-5,
        "normalization": "LayerNorm",
        "position_embedding_type": "learned_absolute",
        "add_bias_linear": True,
        "untie_embeddings_and_output_weights": False,
        "tokenizer_type": "BertWordPieceLowerCase",
        **activation_arguments(config, "activation_function"),
    }


def _t5_config(md: Namespace, saved: Namespace, wanted: str | None) -> Config:
    refuse(
        "--saver hf",
        {
            **plain_problems(saved, md),
            "an untied output layer": md.output_layer,
            f"norm_epsilon {norm_epsilon(saved)}": norm_epsilon(saved) != 1e-5,
        },
    )
    config = {
        "model_type": "blenderbot",
        "d_model": md.hidden_size,
        "encoder_layers": names.encoder_depth(saved),
        "decoder_layers": names.decoder_depth(saved),
        "encoder_attention_heads": md.num_attention_heads,
        "decoder_attention_heads": md.num_attention_heads,
        "encoder_ffn_dim": saved.ffn_hidden_size,
        "decoder_ffn_dim": saved.ffn_hidden_size,
        "max_position_embeddings": md.max_position_embeddings,
        "activation_function": activation(saved),
        "scale_embedding": False,
        "pad_token_id": 0,
    }
    return base(config, md, saved, "BlenderbotForConditionalGeneration")


def _t5_after_read(kind: str, message: Tensors, saved: Namespace) -> None:
    if kind == "embeddings":
        # One table serves both stacks here.
        other = message.pop("decoder's position embeddings")
        different = not torch.equal(other, message["position embeddings"])
        refuse("the model", {"different position tables in encoder and decoder": different})
    if kind == "lm head":
        message["bias"] = message["bias"].reshape(-1)


def _t5_before_write(kind: str, message: Tensors, saved: Namespace) -> None:
    if kind == "embeddings":
        message["decoder's position embeddings"] = message["position embeddings"]
    if kind == "lm head":
        message["bias"] = message["bias"].reshape(1, -1)


_STACK: list[Rule] = [
    *both("input norm", "self_attn_layer_norm"),
    *packed("qkv", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    *both("dense", "self_attn.out_proj"),
    *both("post norm", "final_layer_norm"),
    *both("mlp l0", "fc1"),
    *both("mlp l1", "fc2"),
]
# Megatron's T5 has learned absolute positions, LayerNorm, biases and scaled attention: HuggingFace's T5 has none of
# these, its Blenderbot has all.
T5 = Family(
    model_type="T5",
    types=("blenderbot",),
    auto_class="AutoModelForSeq2SeqLM",
    rules={
        "embeddings": (
            "model.",
            [
                Same("word embeddings", "shared.weight"),
                Same("position embeddings", "encoder.embed_positions.weight"),
                Same("decoder's position embeddings", "decoder.embed_positions.weight"),
            ],
        ),
        "encoder layer": ("model.encoder.layers.{}.", _STACK),
        "encoder final norm": ("model.encoder.", both("", "layer_norm")),
        "transformer layer": (
            "model.decoder.layers.{}.",
            [
                *_STACK,
                *both("cross norm", "encoder_attn_layer_norm"),
                *both("cross q", "encoder_attn.q_proj"),
                *packed("cross kv", "encoder_attn.k_proj", "encoder_attn.v_proj", count=2),
                *both("cross dense", "encoder_attn.out_proj"),
            ],
        ),
        "final norm": ("model.decoder.", both("", "layer_norm")),
        "lm head": ("", [Same("bias", "final_logits_bias")]),
    },
    arguments=_t5_arguments,
    config=_t5_config,
    ignored=("embed_tokens.weight", "lm_head.weight"),
    after_read=_t5_after_read,
    before_write=_t5_before_write,
)
