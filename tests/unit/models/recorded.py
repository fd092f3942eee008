"""The recorded v0.9 models: their configuration, weights, batch and results (see
tests/golden/checkpoints/README.md).
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.models.T5.t5_spec import decoder_model_with_local_spec, encoder_model_with_local_spec
from megatron.core.transformer import TransformerConfig

ROOT = Path(__file__).parents[2] / "golden" / "checkpoints"
VOCAB = 256
SAFE = [
    argparse.Namespace,
    np.dtype,
    np.ndarray,
    np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
    *(type(np.dtype(kind)) for kind in ("uint32", "int64", "float64")),
]
PLAIN = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
LLAMA_LIKE = {
    **PLAIN,
    "activation_func": F.silu,
    "gated_linear_unit": True,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "num_query_groups": 2,
}
# name -> (positions, position kind, tied, configuration)
SHAPES: dict[str, tuple[int, str, bool, dict[str, Any]]] = {
    "gpt": (
        32,
        "learned_absolute",
        True,
        {**PLAIN, "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4},
    ),
    "vpp": (
        16,
        "learned_absolute",
        True,
        {**PLAIN, "num_layers": 4, "hidden_size": 32, "num_attention_heads": 2},
    ),
    "llama": (
        32,
        "rope",
        False,
        {**LLAMA_LIKE, "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 96},
    ),
    "bert": (
        24,
        "learned_absolute",
        True,
        {**PLAIN, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4},
    ),
    "t5": (
        24,
        "learned_absolute",
        True,
        {**PLAIN, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64},
    ),
    "moe": (
        24,
        "rope",
        False,
        {
            **LLAMA_LIKE,
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "ffn_hidden_size": 64,
            "num_moe_experts": 4,
            "moe_router_topk": 2,
            "moe_router_load_balancing_type": "none",
        },
    ),
}


def config_of(name: str, **changes: Any) -> TransformerConfig:
    """The recorded model's configuration with changes (parallel sizes, recomputation ..)."""
    return TransformerConfig(**{**SHAPES[name][3], **changes})


def build(name: str, config: TransformerConfig | None = None, **stage: Any) -> torch.nn.Module:
    """The recorded model, or with pre_process/post_process/.. one stage of it; logits come whole or as
    `stage` says.
    """
    positions, kind, tied, _ = SHAPES[name]
    config = config or config_of(name)
    common = {
        "vocab_size": VOCAB,
        "max_sequence_length": positions,
        "share_embeddings_and_output_weights": tied,
        "position_embedding_type": kind,
        **stage,
    }
    if name == "bert":
        return BertModel(config, num_tokentypes=2, transformer_layer_spec=bert_layer_local_spec, **common)
    if name == "t5":
        encoder_config = common.pop("encoder_config", config)
        specs = encoder_model_with_local_spec(), decoder_model_with_local_spec()
        return T5Model(config, encoder_config, *specs, **common)
    spec = get_gpt_layer_local_spec(config.num_moe_experts, config.moe_grouped_gemm)
    return GPTModel(config, spec, **common)


@functools.cache
def _members(name: str) -> dict[str, bytes]:
    with tarfile.open(ROOT / name / "checkpoints.tar.xz") as archive:
        return {
            m.name: archive.extractfile(m).read()  # type: ignore[union-attr]
            for m in archive.getmembers()
            if m.name.endswith("model_optim_rng.pt")
        }


def weights(
    name: str, layout: str = "tp1pp1", part: str = "mp_rank_00", key: str = "model"
) -> dict[str, Tensor]:
    """One file's state dict as v0.9 wrote it."""
    data = io.BytesIO(_members(name)[f"{layout}/iter_0000100/{part}/model_optim_rng.pt"])
    with torch.serialization.safe_globals(SAFE):
        return torch.load(data, weights_only=True)[key]


def arrays(name: str, file: str) -> dict[str, Tensor]:
    """batch.npz or expected.npz as tensors."""
    with np.load(ROOT / name / file) as stored:
        return {key: torch.from_numpy(stored[key]) for key in stored.files}


def grad_norms(name: str, layout: str = "") -> dict[str, Any]:
    """Recorded gradient norms by parameter name; for a layout by rank first."""
    return json.loads((ROOT / name / f"grad_norms{layout}.json").read_text())


def run(name: str, model: torch.nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits and losses of the recorded batch, under the names of expected.npz, with the loss ready for
    backward.
    """
    if name == "bert":
        inputs = (batch["tokens"], batch["padding_mask"], batch["types"])
        logits, binary = model(*inputs)
        per_token, binary_trained = model(*inputs, lm_labels=batch["labels"])
        lm_loss = masked_mean(per_token, batch["loss_mask"])
        sop_loss = F.cross_entropy(binary_trained, batch["is_random"])
        return {
            "logits": logits,
            "binary_logits": binary,
            "lm_loss": lm_loss,
            "sop_loss": sop_loss,
            "loss": lm_loss + sop_loss,
        }
    if name == "t5":
        masks = [batch[key] < 0.5 for key in ("enc_mask", "dec_mask", "enc_dec_mask")]
        inputs = (batch["text_enc"], batch["text_dec"], *masks)
        per_token = model(*inputs, lm_labels=batch["labels"])
    else:
        positions = torch.arange(batch["tokens"].size(1)).expand_as(batch["tokens"])
        inputs = (batch["tokens"], positions, None)
        per_token = model(*inputs, labels=batch["labels"])
    return {
        "logits": model(*inputs),
        "per_token": per_token,
        "loss": masked_mean(per_token, batch["loss_mask"]),
    }


def masked_mean(per_token: Tensor, mask: Tensor) -> Tensor:
    """Mean of [b, s] over the positions where mask [b, s] is 1."""
    return (per_token * mask).sum() / mask.sum()
