"""What the HuggingFace families share: settings of either side, and refusals by name."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from megatron.core.errors import CheckpointError
from tools.checkpoint.hf_rules import Heads

Config = dict[str, Any]

# HuggingFace's tanh forms of GELU; with fused bias and activation Megatron's GELU is one too, without it is exact.
_TANH_GELU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")


def refuse(subject: str, problems: dict[str, Any], fix: str | None = None) -> None:
    """CheckpointError naming every problem that is true."""
    named = [text for text, true in problems.items() if true]
    if named:
        raise CheckpointError(subject, f"it has {', '.join(named)}, which cannot be represented", fix)


def setting(saved: Namespace, name: str, default: Any = None) -> Any:
    value = getattr(saved, name, None)
    return default if value is None else value


def common_problems(saved: Namespace, md: Namespace) -> Config:
    return {
        "experts": setting(saved, "num_experts"),
        "query and key norms (qk_layernorm)": setting(saved, "qk_layernorm"),
        "squared_relu": setting(saved, "squared_relu"),
        "residual connections after the norm": setting(saved, "apply_residual_connection_post_layernorm"),
    }


def plain_problems(saved: Namespace, md: Namespace) -> Config:
    """What GPT-2, BERT and Blenderbot cannot represent."""
    return {
        **common_problems(saved, md),
        f"positions of the kind {md.position_embedding_type}": md.position_embedding_type
        != "learned_absolute",
        "SwiGLU": md.swiglu,
        f"normalization {setting(saved, 'normalization')}": not md.norm_has_bias,
        "linear layers without bias": not md.linear_bias,
        "query groups": setting(saved, "group_query_attention"),
        "heads of another size than hidden size / heads": Heads.of(saved).size * md.num_attention_heads
        != md.hidden_size,
    }


def activation(saved: Namespace) -> str:
    tanh = setting(saved, "openai_gelu") or setting(saved, "bias_gelu_fusion", True)
    return "gelu_new" if tanh else "gelu"


def activation_arguments(config: Config, key: str) -> Config:
    name = config.get(key)
    refuse("config.json", {f"the activation {name}": name not in ("gelu", *_TANH_GELU)})
    return {"swiglu": False, "bias_gelu_fusion": name in _TANH_GELU, "openai_gelu": False}


def base(config: Config, md: Namespace, saved: Namespace, architecture: str) -> Config:
    return {
        "architectures": [architecture],
        "vocab_size": saved.padded_vocab_size,
        "tie_word_embeddings": not md.output_layer,
        "torch_dtype": str(md.params_dtype).removeprefix("torch."),
        **config,
    }


def norm_epsilon(saved: Namespace) -> float:
    return setting(saved, "norm_epsilon", setting(saved, "layernorm_epsilon", 1e-5))
