"""Read a HuggingFace directory of the Llama family or GPT-2: config.json and safetensors, one tensor at a time."""

from __future__ import annotations

import argparse
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from megatron.core.dist_checkpointing.safe_load import load_file
from megatron.core.errors import CheckpointError
from tools.checkpoint.hf_names import GPT2_LAYER, LLAMA_FAMILY, LLAMA_LAYER, pack_qkv

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this loader."""
    group = parser.add_argument_group(title="HuggingFace loader")
    group.add_argument("--true-vocab-size", type=int, help="vocabulary size without padding rows")
    group.add_argument("--tokenizer-model", help="recorded in the checkpoint's arguments")
    group.add_argument("--bf16", action="store_true", help="store weights in bfloat16")
    group.add_argument("--fp16", action="store_true", help="store weights in float16")
    group.add_argument("--model-size", help="accepted for older command lines; config.json says it")
    group.add_argument(
        "--checkpoint-type", choices=["hf"], default="hf", help="only HuggingFace directories are read"
    )
    group.add_argument("--megatron-path", help="accepted for older command lines; not needed")
    group.add_argument("--loader-transformer-impl", help="accepted for older command lines; not needed")


class Weights:
    """The tensors of a directory by name, read when asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._where: dict[str, Path] = {}
        self._plain: dict[str, torch.Tensor] = {}
        index = directory / "model.safetensors.index.json"
        if index.exists():
            self._where = {n: directory / f for n, f in json.loads(index.read_text())["weight_map"].items()}
        elif (directory / "model.safetensors").exists():
            from safetensors import safe_open

            path = directory / "model.safetensors"
            with safe_open(path, "pt") as file:
                self._where = dict.fromkeys(file.keys(), path)
        else:
            for path in sorted(directory.glob("pytorch_model*.bin")):
                self._plain.update(load_file(path))
        if not self._where and not self._plain:
            raise CheckpointError(
                str(directory), "it has neither safetensors nor pytorch_model*.bin", "check --load-dir"
            )

    def get(self, name: str, optional: bool = False) -> torch.Tensor | None:
        """The tensor; None if it is missing and `optional`. CheckpointError otherwise."""
        if name in self._plain:
            return self._plain[name]
        if name in self._where:
            from safetensors import safe_open

            with safe_open(self._where[name], "pt") as file:
                return file.get_tensor(name)
        if optional:
            return None
        raise CheckpointError(str(self.directory), f"it has no tensor {name}", "check that it is complete")


def load_checkpoint(queue: Any, args: Namespace) -> None:
    """Send the model, one layer at a time."""
    directory = Path(args.load_dir)
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            str(directory / "config.json"), f"cannot be read ({error})", "check --load-dir"
        ) from error
    family = config.get("model_type")
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    weights = Weights(directory)

    def send(name: str, tensors: dict[str, torch.Tensor | None]) -> None:
        present = {key: tensor.to(dtype) for key, tensor in tensors.items() if tensor is not None}
        queue.put({"name": name, **present})

    if family in LLAMA_FAMILY:
        _send_llama(queue, send, weights, config, dtype, args)
    elif family == "gpt2":
        _send_gpt2(queue, send, weights, config, dtype, args)
    else:
        known = ", ".join([*LLAMA_FAMILY, "gpt2"])
        raise CheckpointError(
            str(directory), f"models of type {family} are not converted", f"known types: {known}"
        )
    queue.put("done")


def _send_llama(
    queue: Any, send: Any, weights: Weights, config: dict[str, Any], dtype: torch.dtype, args: Namespace
) -> None:
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    tied = config.get("tie_word_embeddings", False)
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError("config.json", f"hidden_act {config['hidden_act']} is not SwiGLU's silu")
    if (scaling := config.get("rope_scaling")) and scaling.get("rope_type", scaling.get("type")) not in (
        "default",
        "llama3",
    ):
        raise CheckpointError("config.json", f"rope_scaling {scaling} cannot be represented")
    rope = config.get("rope_parameters") or {}
    queue.put(
        _metadata(
            args, dtype, num_layers=config["num_hidden_layers"], hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"], num_attention_heads=heads, num_query_groups=groups,
            kv_channels=config.get("head_dim") or config["hidden_size"] // heads,
            max_position_embeddings=config["max_position_embeddings"], norm_epsilon=config.get("rms_norm_eps", 1e-6),
            rotary_base=int(config.get("rope_theta") or rope.get("rope_theta") or 10000), normalization="RMSNorm",
            position_embedding_type="rope", swiglu=True, add_bias_linear=False,
            add_qkv_bias=config["model_type"] == "qwen2" or config.get("attention_bias", False),
            untie_embeddings_and_output_weights=not tied, padded_vocab_size=config["vocab_size"],
            tokenizer_type="HuggingFaceTokenizer", use_rope_scaling=bool(scaling),
        )
    )  # fmt: skip
    send("embeddings", {"word embeddings": weights.get("model.embed_tokens.weight")})
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        message = {key: weights.get(prefix + name) for key, name in LLAMA_LAYER.items()}
        for kind in ("weight", "bias"):
            parts = [
                weights.get(f"{prefix}self_attn.{p}_proj.{kind}", optional=kind == "bias") for p in "qkv"
            ]
            message[f"qkv {kind}"] = None if parts[0] is None else pack_qkv(*parts, groups)
        send(f"transformer layer {layer}", message)
    send("final norm", {"weight": weights.get("model.norm.weight")})
    if not tied:
        send("output layer", {"weight": weights.get("lm_head.weight")})


def _send_gpt2(
    queue: Any, send: Any, weights: Weights, config: dict[str, Any], dtype: torch.dtype, args: Namespace
) -> None:
    heads = config["n_head"]
    if config.get("activation_function", "gelu_new") not in (
        "gelu_new",
        "gelu",
        "gelu_fast",
        "gelu_pytorch_tanh",
    ):
        raise CheckpointError(
            "config.json", f"activation {config['activation_function']} cannot be represented"
        )
    if config.get("scale_attn_by_inverse_layer_idx") or not config.get("scale_attn_weights", True):
        raise CheckpointError("config.json", "its attention scaling cannot be represented")
    queue.put(
        _metadata(
            args, dtype, num_layers=config["n_layer"], hidden_size=config["n_embd"],
            ffn_hidden_size=config.get("n_inner") or 4 * config["n_embd"], num_attention_heads=heads,
            kv_channels=config["n_embd"] // heads, max_position_embeddings=config["n_positions"],
            norm_epsilon=config.get("layer_norm_epsilon", 1e-5), normalization="LayerNorm", swiglu=False,
            position_embedding_type="learned_absolute", add_bias_linear=True, untie_embeddings_and_output_weights=False,
            padded_vocab_size=config["vocab_size"], tokenizer_type="GPT2BPETokenizer",
            bias_gelu_fusion=config.get("activation_function", "gelu_new") != "gelu",
        )
    )  # fmt: skip
    root = "" if weights.get("wte.weight", optional=True) is not None else "transformer."
    send(
        "embeddings",
        {
            "word embeddings": weights.get(f"{root}wte.weight"),
            "position embeddings": weights.get(f"{root}wpe.weight"),
        },
    )
    for layer in range(config["n_layer"]):
        prefix = f"{root}h.{layer}."
        message = {}
        for key, (name, transposed) in GPT2_LAYER.items():
            tensor = weights.get(prefix + name)
            assert tensor is not None, "a required tensor is there or an error was raised"
            message[key] = tensor.t().contiguous() if transposed else tensor
        qkv_weight, qkv_bias = (weights.get(f"{prefix}attn.c_attn.{kind}") for kind in ("weight", "bias"))
        assert qkv_weight is not None and qkv_bias is not None, "required tensors"
        message["qkv weight"] = pack_qkv(*qkv_weight.t().chunk(3), heads)
        message["qkv bias"] = pack_qkv(*qkv_bias.chunk(3), heads)
        send(f"transformer layer {layer}", message)
    send("final norm", {"weight": weights.get(f"{root}ln_f.weight"), "bias": weights.get(f"{root}ln_f.bias")})


def _metadata(args: Namespace, dtype: torch.dtype, **saved: Any) -> Namespace:
    """What the saver must know; `saved` are the arguments a run of this model needs."""
    checkpoint_args = Namespace(
        seq_length=saved["max_position_embeddings"], iteration=0, params_dtype=dtype,
        bf16=dtype is torch.bfloat16, fp16=dtype is torch.float16, tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1, add_position_embedding=True, make_vocab_size_divisible_by=128,
        consumed_train_samples=0, consumed_valid_samples=0, tokenizer_model=args.tokenizer_model,
        group_query_attention=saved.get("num_query_groups", saved["num_attention_heads"]) != saved["num_attention_heads"],
        add_qkv_bias=False, **{key: value for key, value in saved.items() if key != "add_qkv_bias"},
    )  # fmt: skip
    checkpoint_args.add_qkv_bias = saved.get("add_qkv_bias", False)
    return Namespace(
        model_type=args.model_type, iteration=0, params_dtype=dtype, bert_binary_head=False,
        output_layer=saved["untie_embeddings_and_output_weights"], linear_bias=saved["add_bias_linear"],
        norm_has_bias=saved["normalization"] == "LayerNorm", swiglu=saved["swiglu"],
        previous_tensor_parallel_size=1, previous_pipeline_parallel_size=1, true_vocab_size=args.true_vocab_size,
        make_vocab_size_divisible_by=128, checkpoint_args=checkpoint_args, consumed_train_samples=0,
        consumed_valid_samples=0, seq_length=checkpoint_args.seq_length, tokenizer_type=saved["tokenizer_type"],
        num_layers=saved["num_layers"], hidden_size=saved["hidden_size"], num_attention_heads=saved["num_attention_heads"],
        max_position_embeddings=saved["max_position_embeddings"], position_embedding_type=saved["position_embedding_type"],
    )  # fmt: skip
