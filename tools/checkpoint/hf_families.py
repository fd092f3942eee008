"""The HuggingFace architectures that are converted both ways."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

from megatron.core.errors import CheckpointError
from tools.checkpoint import names
from tools.checkpoint.hf_rules import Family, Heads, Rule, Same, Tensors, both, packed

Config = dict[str, Any]

# HuggingFace's tanh forms of GELU; with fused bias and activation Megatron's GELU is one too, without it is exact.
_TANH_GELU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")


def _refuse(subject: str, problems: dict[str, Any], fix: str | None = None) -> None:
    """CheckpointError naming every problem that is true."""
    named = [text for text, true in problems.items() if true]
    if named:
        raise CheckpointError(subject, f"it has {', '.join(named)}, which cannot be represented", fix)


def _setting(saved: Namespace, name: str, default: Any = None) -> Any:
    value = getattr(saved, name, None)
    return default if value is None else value


def _common_problems(saved: Namespace, md: Namespace) -> Config:
    return {
        "experts": _setting(saved, "num_experts"),
        "query and key norms (qk_layernorm)": _setting(saved, "qk_layernorm"),
        "squared_relu": _setting(saved, "squared_relu"),
        "residual connections after the norm": _setting(saved, "apply_residual_connection_post_layernorm"),
    }


def _plain_problems(saved: Namespace, md: Namespace) -> Config:
    """What GPT-2, BERT and Blenderbot cannot represent."""
    return {
        **_common_problems(saved, md),
        f"positions of the kind {md.position_embedding_type}": md.position_embedding_type
        != "learned_absolute",
        "SwiGLU": md.swiglu,
        f"normalization {_setting(saved, 'normalization')}": not md.norm_has_bias,
        "linear layers without bias": not md.linear_bias,
        "query groups": _setting(saved, "group_query_attention"),
        "heads of another size than hidden size / heads": Heads.of(saved).size * md.num_attention_heads
        != md.hidden_size,
    }


def _activation(saved: Namespace) -> str:
    tanh = _setting(saved, "openai_gelu") or _setting(saved, "bias_gelu_fusion", True)
    return "gelu_new" if tanh else "gelu"


def _activation_arguments(config: Config, key: str) -> Config:
    name = config.get(key)
    _refuse("config.json", {f"the activation {name}": name not in ("gelu", *_TANH_GELU)})
    return {"swiglu": False, "bias_gelu_fusion": name in _TANH_GELU, "openai_gelu": False}


def _base(config: Config, md: Namespace, architecture: str) -> Config:
    return {
        "architectures": [architecture],
        "vocab_size": md.checkpoint_args.padded_vocab_size,
        "tie_word_embeddings": not md.output_layer,
        "torch_dtype": str(md.params_dtype).removeprefix("torch."),
        **config,
    }


def _norm_epsilon(saved: Namespace) -> float:
    return _setting(saved, "norm_epsilon", _setting(saved, "layernorm_epsilon", 1e-5))


# ----------------------------------------------------------------------------------------------------- Llama family


def _llama_arguments(config: Config) -> Config:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaled = kind == "llama3"
    usual = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    _refuse(
        "config.json",
        {
            f"hidden_act {config.get('hidden_act')}": config.get("hidden_act", "silu") != "silu",
            "mlp_bias": config.get("mlp_bias"),
            "attention_bias (with a bias in the output projection)": config.get("attention_bias")
            and config["model_type"] != "qwen2",
            f"rope scaling of the kind {kind}": kind not in ("default", "llama3"),
            f"rope scaling {rope}": scaled
            and any(rope.get(key, value) != value for key, value in usual.items()),
            "rotary embeddings of a part of the head": rope.get("partial_rotary_factor", 1.0) != 1.0,
            "sliding windows in some layers": config.get("use_sliding_window"),
        },
    )
    heads = config["num_attention_heads"]
    positions = config["max_position_embeddings"]
    window = config.get("sliding_window") if config["model_type"] == "mistral" else None
    if window is not None and window < positions:
        # Attention sees the whole sequence here: the same thing for sequences that fit the window.
        print(
            f"note: the model attends to {window} tokens back; train it with sequences of at most that length"
        )
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "max_position_embeddings": positions,
        "seq_length": min(positions, window or positions),
        "norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "rotary_base": int(config.get("rope_theta") or rope.get("rope_theta") or 10000),
        "rotary_percent": 1.0,
        "use_rope_scaling": scaled,
        "rope_scaling_factor": float(rope.get("factor", 8.0)),
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": config["model_type"] == "qwen2",
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "tokenizer_type": "HuggingFaceTokenizer",
    }


def _llama_config(md: Namespace, saved: Namespace, wanted: str | None) -> Config:
    heads = Heads.of(saved)
    qkv_bias = bool(_setting(saved, "add_qkv_bias"))
    kind = wanted or ("qwen2" if qkv_bias else "llama")
    _refuse(
        "--saver hf",
        {
            **_common_problems(saved, md),
            f"positions of the kind {md.position_embedding_type}": md.position_embedding_type != "rope",
            "no SwiGLU": not md.swiglu,
            "LayerNorm": md.norm_has_bias,
            "biases in all linear layers": md.linear_bias,
            "rotary_interleaved": _setting(saved, "rotary_interleaved"),
            f"rotary_percent {_setting(saved, 'rotary_percent')}": _setting(saved, "rotary_percent", 1.0)
            != 1.0,
            "rotary_seq_len_interpolation_factor": _setting(saved, "rotary_seq_len_interpolation_factor"),
            f"query, key and value biases (for {kind})": qkv_bias and kind != "qwen2",
            f"no query, key and value biases (for {kind})": not qkv_bias and kind == "qwen2",
            f"heads of size {heads.size} (for {kind})": kind == "qwen2"
            and heads.size * md.num_attention_heads != md.hidden_size,
        },
    )
    theta = float(_setting(saved, "rotary_base", 10000))
    rope: Config = {"rope_type": "default"}
    if _setting(saved, "use_rope_scaling"):
        rope = {
            "rope_type": "llama3",
            "factor": float(_setting(saved, "rope_scaling_factor", 8.0)),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    config = {
        "model_type": kind,
        "hidden_size": md.hidden_size,
        "intermediate_size": saved.ffn_hidden_size,
        "num_hidden_layers": md.num_layers,
        "num_attention_heads": md.num_attention_heads,
        "num_key_value_heads": heads.groups,
        "head_dim": heads.size,
        "hidden_act": "silu",
        "max_position_embeddings": md.max_position_embeddings,
        "rms_norm_eps": _norm_epsilon(saved),
        # The first two for transformers 4, the third for 5.
        "rope_theta": theta,
        "rope_scaling": rope if len(rope) > 1 else None,
        "rope_parameters": {**rope, "rope_theta": theta},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if kind == "mistral":
        config["sliding_window"] = None
    return _base(config, md, {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[kind] + "ForCausalLM")


LLAMA = Family(
    model_type="GPT",
    types=("llama", "mistral", "qwen2"),
    auto_class="AutoModelForCausalLM",
    rules={
        "embeddings": ("model.", [Same("word embeddings", "embed_tokens.weight")]),
        "transformer layer": (
            "model.layers.{}.",
            [
                Same("input norm weight", "input_layernorm.weight"),
                *packed("qkv", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                Same("dense weight", "self_attn.o_proj.weight"),
                Same("post norm weight", "post_attention_layernorm.weight"),
                Same("mlp l0 weight W", "mlp.gate_proj.weight"),
                Same("mlp l0 weight V", "mlp.up_proj.weight"),
                Same("mlp l1 weight", "mlp.down_proj.weight"),
            ],
        ),
        "final norm": ("model.", [Same("weight", "norm.weight")]),
        "output layer": ("lm_head.", [Same("weight", "weight")]),
    },
    arguments=_llama_arguments,
    config=_llama_config,
    ignored=("rotary_emb.inv_freq",),
)


# ------------------------------------------------------------------------------------------------------------- GPT-2


def _gpt2_arguments(config: Config) -> Config:
    _refuse(
        "config.json",
        {
            "scale_attn_by_inverse_layer_idx": config.get("scale_attn_by_inverse_layer_idx"),
            "unscaled attention (scale_attn_weights)": not config.get("scale_attn_weights", True),
            "cross-attention": config.get("add_cross_attention"),
        },
    )
    return {
        "num_layers": config["n_layer"],
        "hidden_size": config["n_embd"],
        "ffn_hidden_size": config.get("n_inner") or 4 * config["n_embd"],
        "num_attention_heads": config["n_head"],
        "kv_channels": config["n_embd"] // config["n_head"],
        "max_position_embeddings": config["n_positions"],
        "norm_epsilon": config.get("layer_norm_epsilon", 1e-5),
        "normalization": "LayerNorm",
        "position_embedding_type": "learned_absolute",
        "add_bias_linear": True,
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", True),
        "tokenizer_type": "GPT2BPETokenizer",
        **_activation_arguments({"activation_function": "gelu_new", **config}, "activation_function"),
    }


def _gpt2_config(md: Namespace, saved: Namespace, wanted: str | None) -> Config:
    _refuse("--saver hf", _plain_problems(saved, md))
    config = {
        "model_type": "gpt2",
        "n_embd": md.hidden_size,
        "n_inner": saved.ffn_hidden_size,
        "n_layer": md.num_layers,
        "n_head": md.num_attention_heads,
        "n_positions": md.max_position_embeddings,
        "activation_function": _activation(saved),
        "layer_norm_epsilon": _norm_epsilon(saved),
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return _base(config, md, "GPT2LMHeadModel")


GPT2 = Family(
    model_type="GPT",
    types=("gpt2",),
    auto_class="AutoModelForCausalLM",
    rules={
        "embeddings": (
            "transformer.",
            [Same("word embeddings", "wte.weight"), Same("position embeddings", "wpe.weight")],
        ),
        "transformer layer": (
            "transformer.h.{}.",
            [
                *both("input norm", "ln_1"),
                *packed("qkv", "attn.c_attn", transposed=True),
                *both("dense", "attn.c_proj", transposed=True),
                *both("post norm", "ln_2"),
                *both("mlp l0", "mlp.c_fc", transposed=True),
                *both("mlp l1", "mlp.c_proj", transposed=True),
            ],
        ),
        "final norm": ("transformer.", both("", "ln_f")),
        "output layer": ("lm_head.", [Same("weight", "weight")]),
    },
    arguments=_gpt2_arguments,
    config=_gpt2_config,
    ignored=("attn.bias", "attn.masked_bias", "lm_head.weight"),
)


# -------------------------------------------------------------------------------------------------------------- BERT


def _bert_arguments(config: Config) -> Config:
    _refuse(
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
    _refuse(
        "--saver hf",
        {**_plain_problems(saved, md), tanh: _activation(saved) != "gelu"},
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
        "layer_norm_eps": _norm_epsilon(saved),
    }
    return _base(
        config, md, "MegatronBertForPreTraining" if md.bert_binary_head else "MegatronBertForMaskedLM"
    )


def _bert_after_read(kind: str, message: Tensors, saved: Namespace) -> None:
    if kind == "embeddings" and not saved.bert_binary_head:
        kinds = message.pop("tokentype embeddings", None)
        _refuse(
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
    _refuse(
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
        **_activation_arguments(config, "activation_function"),
    }


def _t5_config(md: Namespace, saved: Namespace, wanted: str | None) -> Config:
    _refuse(
        "--saver hf",
        {
            **_plain_problems(saved, md),
            "an untied output layer": md.output_layer,
            f"norm_epsilon {_norm_epsilon(saved)}": _norm_epsilon(saved) != 1e-5,
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
        "activation_function": _activation(saved),
        "scale_embedding": False,
        "pad_token_id": 0,
    }
    return _base(config, md, "BlenderbotForConditionalGeneration")


def _t5_after_read(kind: str, message: Tensors, saved: Namespace) -> None:
    if kind == "embeddings":
        # One table serves both stacks here.
        other = message.pop("decoder's position embeddings")
        different = not torch.equal(other, message["position embeddings"])
        _refuse("the model", {"different position tables in encoder and decoder": different})
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

FAMILIES = (LLAMA, GPT2, BERT, T5)

_REFUSED = {
    "t5": "relative position biases, unscaled attention and RMSNorm without means"
    " (and in version 1.1 and mT5 a GELU gate)",
    "mt5": "relative position biases, unscaled attention and a GELU gate",
    "bert": "norms after the residual connections; Megatron's BERT is megatron-bert",
    "qwen3": "query and key norms",
    "mixtral": "experts, which are converted between Megatron's own formats only",
}


def family_of_config(config: Config, model_type: str) -> Family:
    """The family of a configuration. CheckpointError if it is not converted."""
    kind = config.get("model_type")
    if kind in _REFUSED:
        raise CheckpointError("config.json", f"models of type {kind} have {_REFUSED[kind]}")
    for family in FAMILIES:
        if kind in family.types:
            if family.model_type != model_type:
                raise CheckpointError(
                    f"--model-type {model_type}",
                    f"config.json describes a {kind}",
                    f"pass {family.model_type}",
                )
            return family
    known = ", ".join(name for family in FAMILIES for name in family.types)
    raise CheckpointError("config.json", f"models of type {kind} are not converted", f"known types: {known}")


def family_of_model(md: Namespace, wanted: str | None) -> Family:
    """The family that a Megatron model belongs to; `wanted` is the type asked for, if any."""
    if md.model_type == "GPT":
        family = LLAMA if md.position_embedding_type == "rope" else GPT2
    else:
        family = BERT if md.model_type == "BERT" else T5
    if wanted is not None and wanted not in family.types:
        raise CheckpointError(
            f"--hf-model-type {wanted}",
            f"this model could be {' or '.join(family.types)}",
            "leave the choice out or name one of these",
        )
    return family
