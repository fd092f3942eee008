"""Which HuggingFace architecture a configuration or a Megatron model is."""

from __future__ import annotations

from argparse import Namespace

from megatron.core.errors import CheckpointError
from tools.checkpoint.hf_decoders import GPT2, LLAMA, MIXTRAL
from tools.checkpoint.hf_encoders import BERT, T5
from tools.checkpoint.hf_rules import Family
from tools.checkpoint.hf_settings import Config

FAMILIES = (LLAMA, MIXTRAL, GPT2, BERT, T5)

_REFUSED = {
    "t5": "relative position biases in attention, for which Megatron's T5 has no weights (its positions are learned and"
    " absolute: HuggingFace's blenderbot); also unscaled attention, ReLU or, in version 1.1, a GELU gate",
    "mt5": "relative position biases in attention, for which Megatron's T5 has no weights, and a GELU gate",
    "bert": "norms after the residual connections; Megatron's BERT is megatron-bert",
    "qwen3": "query and key norms",
}


def family_of_config(config: Config, model_type: str) -> Family:
    """The family of a configuration. CheckpointError if it is not converted."""
    kind = str(config.get("model_type"))
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
        if getattr(md, "num_experts", None):
            family = MIXTRAL
    else:
        family = BERT if md.model_type == "BERT" else T5
    if wanted is not None and wanted not in family.types:
        raise CheckpointError(
            f"--hf-model-type {wanted}",
            f"this model could be {' or '.join(family.types)}",
            "leave the choice out or name one of these",
        )
    return family
