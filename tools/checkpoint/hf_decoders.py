"""Decoder-only HuggingFace architectures: the Llama family, with and without experts, and GPT-2."""

from __future__ import annotations

from argparse import Namespace

from tools.checkpoint.hf_rules import Experts, Family, Heads, Rule, Same, both, packed
from tools.checkpoint.hf_settings import (
    Config,
    activation,
    activation_arguments,
    base,
    common_problems,
    norm_epsilon,
    plain_problems,
    refuse,
    setting,
)

# ----------------------------------------------------------------------------------------------------- Llama family


def _llama_arguments(config: Config) -> Config:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaled = kind == "llama3"
    usual = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    refuse(
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
    window = config.get("sliding_window") if config["model_type"] in ("mistral", "mixtral") else None
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
    qkv_bias = bool(setting(saved, "add_qkv_bias"))
    kind = wanted or ("qwen2" if qkv_bias else "llama")
    refuse(
        "--saver hf",
        {
            **common_problems(saved, md),
            f"positions of the kind {md.position_embedding_type}": md.position_embedding_type != "rope",
            "no SwiGLU": not md.swiglu,
            "LayerNorm": md.norm_has_bias,
            "biases in all linear layers": md.linear_bias,
            "rotary_interleaved": setting(saved, "rotary_interleaved"),
            f"rotary_percent {setting(saved, 'rotary_percent')}": setting(saved, "rotary_percent", 1.0)
            != 1.0,
            "rotary_seq_len_interpolation_factor": setting(saved, "rotary_seq_len_interpolation_factor"),
            f"query, key and value biases (for {kind})": qkv_bias and kind != "qwen2",
            f"no query, key and value biases (for {kind})": not qkv_bias and kind == "qwen2",
            f"heads of size {heads.size} (for {kind})": kind == "qwen2"
            and heads.size * md.num_attention_heads != md.hidden_size,
        },
    )
    theta = float(setting(saved, "rotary_base", 10000))
    rope: Config = {"rope_type": "default"}
    if setting(saved, "use_rope_scaling"):
        rope = {
            "rope_type": "llama3",
            "factor": float(setting(saved, "rope_scaling_factor", 8.0)),
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
        "rms_norm_eps": norm_epsilon(saved),
        # The first two for transformers 4, the third for 5.
        "rope_theta": theta,
        "rope_scaling": rope if len(rope) > 1 else None,
        "rope_parameters": {**rope, "rope_theta": theta},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if kind == "mistral":
        config["sliding_window"] = None
    return base(
        config, md, saved, {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[kind] + "ForCausalLM"
    )


_ATTENTION: list[Rule] = [
    Same("input norm weight", "input_layernorm.weight"),
    *packed("qkv", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    Same("dense weight", "self_attn.o_proj.weight"),
    Same("post norm weight", "post_attention_layernorm.weight"),
]
_AROUND_LAYERS: dict[str, tuple[str, list[Rule]]] = {
    "embeddings": ("model.", [Same("word embeddings", "embed_tokens.weight")]),
    "final norm": ("model.", [Same("weight", "norm.weight")]),
    "output layer": ("lm_head.", [Same("weight", "weight")]),
}
_MLP: list[Rule] = [
    Same("mlp l0 weight W", "mlp.gate_proj.weight"),
    Same("mlp l0 weight V", "mlp.up_proj.weight"),
    Same("mlp l1 weight", "mlp.down_proj.weight"),
]
_EXPERTS: list[Rule] = [
    Same("router weight", "block_sparse_moe.gate.weight"),
    Experts("mlp l0 weight W", "block_sparse_moe.experts.{}.w1.weight"),
    Experts("mlp l0 weight V", "block_sparse_moe.experts.{}.w3.weight"),
    Experts("mlp l1 weight", "block_sparse_moe.experts.{}.w2.weight"),
]

LLAMA = Family(
    model_type="GPT",
    types=("llama", "mistral", "qwen2"),
    auto_class="AutoModelForCausalLM",
    rules={**_AROUND_LAYERS, "transformer layer": ("model.layers.{}.", [*_ATTENTION, *_MLP])},
    arguments=_llama_arguments,
    config=_llama_config,
    ignored=("rotary_emb.inv_freq",),
)


def _mixtral_arguments(config: Config) -> Config:
    return {
        **_llama_arguments(config),
        "num_experts": config["num_local_experts"],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_router_pre_softmax": False,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": config.get("router_aux_loss_coef", 0.0),
    }


def _mixtral_config(md: Namespace, saved: Namespace, wanted: str | None) -> Config:
    balancing = setting(saved, "moe_router_load_balancing_type", "aux_loss")
    capacity = setting(saved, "moe_expert_capacity_factor")
    refuse(
        "--saver hf",
        {
            f"routing of the kind {balancing}": balancing not in ("aux_loss", "none"),
            "moe_router_pre_softmax": setting(saved, "moe_router_pre_softmax"),
            f"moe_expert_capacity_factor {capacity}": capacity is not None,
            "scaled rotary embeddings": setting(saved, "use_rope_scaling"),
            "heads of another size than hidden size / heads": Heads.of(saved).size * md.num_attention_heads
            != md.hidden_size,
        },
    )
    dense = _llama_config(md, Namespace(**{**vars(saved), "num_experts": None}), "llama")
    return {
        **dense,
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": md.num_experts,
        "num_experts_per_tok": setting(saved, "moe_router_topk", 2),
        "router_aux_loss_coef": setting(saved, "moe_aux_loss_coeff", 0.0),
        "sliding_window": None,
    }


MIXTRAL = Family(
    model_type="GPT",
    types=("mixtral",),
    auto_class="AutoModelForCausalLM",
    rules={**_AROUND_LAYERS, "transformer layer": ("model.layers.{}.", [*_ATTENTION, *_EXPERTS])},
    arguments=_mixtral_arguments,
    config=_mixtral_config,
    ignored=("rotary_emb.inv_freq",),
)


# ------------------------------------------------------------------------------------------------------------- GPT-2


def _gpt2_arguments(config: Config) -> Config:
    refuse(
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
        **activation_arguments({"activation_function": "gelu_new", **config}, "activation_function"),
    }


def _gpt2_config(md: Namespace, saved: Namespace, wanted: str | None) -> Config:
    refuse("--saver hf", plain_problems(saved, md))
    config = {
        "model_type": "gpt2",
        "n_embd": md.hidden_size,
        "n_inner": saved.ffn_hidden_size,
        "n_layer": md.num_layers,
        "n_head": md.num_attention_heads,
        "n_positions": md.max_position_embeddings,
        "activation_function": activation(saved),
        "layer_norm_epsilon": norm_epsilon(saved),
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return base(config, md, saved, "GPT2LMHeadModel")


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
