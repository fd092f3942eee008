"""Write a HuggingFace directory: a Llama-family or GPT-2 config.json and safetensors, sharded by size."""

from __future__ import annotations

import argparse
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from megatron.core.dist_checkpointing import durable
from megatron.core.errors import CheckpointError
from tools.checkpoint.hf_names import GPT2_LAYER, LLAMA_LAYER, unpack_qkv
from tools.checkpoint.saver_mcore import receive, receive_any, receive_metadata


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this saver."""
    group = parser.add_argument_group(title="HuggingFace saver")
    group.add_argument("--max-shard-megabytes", type=int, default=5000, help="size of one safetensors file")


class ShardWriter:
    """Collects tensors and writes a file whenever enough have come together; memory stays at one shard."""

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self.directory, self._limit = directory, limit_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._shards: list[list[str]] = []
        self._bytes = self.total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor; it is written with its shard."""
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._bytes + size > self._limit:
            self._flush()
        self._pending[name] = tensor.contiguous().clone()
        self._bytes += size
        self.total_bytes += size

    def _flush(self) -> None:
        from safetensors.torch import save_file

        path = self.directory / f"part-{len(self._shards)}"
        with durable.naming_path(path, "writing"):
            save_file(self._pending, path, metadata={"format": "pt"})
            durable.fsync_file(path)
        self._shards.append(list(self._pending))
        self._pending, self._bytes = {}, 0

    def finish(self) -> None:
        """Write the last shard, give all their final names, and write the index if there are several."""
        self._flush()
        count = len(self._shards)
        if count == 1:
            (self.directory / "part-0").rename(self.directory / "model.safetensors")
            return
        where = {}
        for number, tensor_names in enumerate(self._shards):
            name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            (self.directory / f"part-{number}").rename(self.directory / name)
            where.update(dict.fromkeys(tensor_names, name))
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": where}
        durable.write_text(self.directory / "model.safetensors.index.json", json.dumps(index, indent=1))


def save_checkpoint(queue: Any, args: Namespace) -> None:
    """Write what the loader sends; a model that neither family can represent is refused by name."""
    md = receive_metadata(queue)
    saved = md.checkpoint_args
    llama = md.position_embedding_type == "rope" and md.swiglu and not md.norm_has_bias
    gpt2 = (
        md.position_embedding_type == "learned_absolute"
        and not md.swiglu
        and md.norm_has_bias
        and md.linear_bias
    )
    if md.model_type != "GPT" or not (llama or gpt2):
        why = (
            f"a {md.model_type} with {md.position_embedding_type} positions, normalization "
            f"{getattr(saved, 'normalization', 'LayerNorm')}, swiglu {md.swiglu} has no HuggingFace twin here"
        )
        raise CheckpointError(
            "--saver hf", why, "Llama needs rope, SwiGLU and RMSNorm; GPT-2 learned positions and LayerNorm"
        )
    _refuse_unrepresentable(saved, md, llama)
    final = Path(args.save_dir)
    staged = durable.stage(final)
    writer = ShardWriter(staged, args.max_shard_megabytes * 2**20)
    embeddings = receive(queue, "embeddings", args.checking)
    table = _unpadded(embeddings["word embeddings"], md)
    config = _llama_config(md, saved, table) if llama else _gpt2_config(md, saved, table)
    one_plus = getattr(saved, "apply_layernorm_1p", False)

    def norm(weight: torch.Tensor) -> torch.Tensor:
        return weight + 1 if one_plus else weight

    if llama:
        writer.add("model.embed_tokens.weight", table)
    else:
        writer.add("transformer.wte.weight", table)
        writer.add("transformer.wpe.weight", embeddings["position embeddings"])
    groups = (
        saved.num_query_groups if getattr(saved, "group_query_attention", False) else md.num_attention_heads
    )
    head_size = getattr(saved, "kv_channels", None) or md.hidden_size // md.num_attention_heads
    for layer in range(md.num_layers):
        message = receive(queue, f"transformer layer {layer}", args.checking)
        for key in ("input norm weight", "post norm weight"):
            message[key] = norm(message[key])
        if llama:
            prefix = f"model.layers.{layer}."
            for kind in ("weight", "bias"):
                if f"qkv {kind}" in message:
                    for part, tensor in zip("qkv", unpack_qkv(message.pop(f"qkv {kind}"), groups, head_size)):
                        writer.add(f"{prefix}self_attn.{part}_proj.{kind}", tensor)
            for key, name in LLAMA_LAYER.items():
                writer.add(prefix + name, message.pop(key))
        else:
            prefix = f"transformer.h.{layer}."
            for kind in ("weight", "bias"):
                packed = torch.cat(unpack_qkv(message.pop(f"qkv {kind}"), groups, head_size))
                writer.add(f"{prefix}attn.c_attn.{kind}", packed.t() if kind == "weight" else packed)
            for key, (name, transposed) in GPT2_LAYER.items():
                tensor = message.pop(key)
                writer.add(prefix + name, tensor.t() if transposed else tensor)
        if message and args.checking:
            raise CheckpointError(
                "--saver hf", f"{', '.join(message)} cannot be represented", "pass --no-checking to drop it"
            )
    final_norm = receive(queue, "final norm", args.checking)
    if llama:
        writer.add("model.norm.weight", norm(final_norm["weight"]))
        if md.output_layer:
            writer.add(
                "lm_head.weight", _unpadded(receive(queue, "output layer", args.checking)["weight"], md)
            )
    else:
        writer.add("transformer.ln_f.weight", norm(final_norm["weight"]))
        writer.add("transformer.ln_f.bias", final_norm["bias"])
    if receive_any(queue) != "done":
        raise CheckpointError("--saver hf", "the loader sent more than the model has")
    writer.finish()
    durable.write_text(staged / "config.json", json.dumps(config, indent=2))
    durable.publish(final)
    print(f"saved {final} ({config['architectures'][0]}, {writer.total_bytes / 2**20:.1f} MiB)")


def _refuse_unrepresentable(saved: Namespace, md: Namespace, llama: bool) -> None:
    problems = []
    if llama and md.linear_bias:
        problems.append("biases in all linear layers")
    if not llama and md.output_layer:
        problems.append("an untied output layer")
    if not llama and getattr(saved, "group_query_attention", False):
        problems.append("query groups")
    for name, usual in (("qk_layernorm", False), ("squared_relu", False), ("rotary_interleaved", False)):
        if getattr(saved, name, usual) not in (usual, None):
            problems.append(name)
    if llama and getattr(saved, "rotary_percent", 1.0) != 1.0:
        problems.append(f"rotary_percent {saved.rotary_percent}")
    if getattr(saved, "num_experts", None):
        problems.append("experts")
    if problems:
        raise CheckpointError(
            "--saver hf", f"it has {', '.join(problems)}, which the format cannot represent"
        )


def _unpadded(table: torch.Tensor, md: Namespace) -> torch.Tensor:
    return table if md.true_vocab_size is None else table[: md.true_vocab_size]


def _dtype(md: Namespace) -> str:
    return str(md.params_dtype).removeprefix("torch.")


def _llama_config(md: Namespace, saved: Namespace, table: torch.Tensor) -> dict[str, Any]:
    groups = (
        saved.num_query_groups if getattr(saved, "group_query_attention", False) else md.num_attention_heads
    )
    qwen = getattr(saved, "add_qkv_bias", False)
    return {
        "architectures": ["Qwen2ForCausalLM" if qwen else "LlamaForCausalLM"],
        "model_type": "qwen2" if qwen else "llama",
        "vocab_size": table.shape[0],
        "hidden_size": md.hidden_size,
        "intermediate_size": saved.ffn_hidden_size,
        "num_hidden_layers": md.num_layers,
        "num_attention_heads": md.num_attention_heads,
        "num_key_value_heads": groups,
        "head_dim": getattr(saved, "kv_channels", None) or md.hidden_size // md.num_attention_heads,
        "hidden_act": "silu",
        "max_position_embeddings": md.max_position_embeddings,
        "rms_norm_eps": getattr(saved, "norm_epsilon", 1e-5),
        "rope_theta": float(getattr(saved, "rotary_base", 10000)),
        "tie_word_embeddings": not md.output_layer,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": _dtype(md),
    }


def _gpt2_config(md: Namespace, saved: Namespace, table: torch.Tensor) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": table.shape[0],
        "n_embd": md.hidden_size,
        "n_inner": saved.ffn_hidden_size,
        "n_layer": md.num_layers,
        "n_head": md.num_attention_heads,
        "n_positions": md.max_position_embeddings,
        # Fused bias and activation is the tanh form; without fusion it is exact.
        "activation_function": "gelu_new" if getattr(saved, "bias_gelu_fusion", True) else "gelu",
        "layer_norm_epsilon": getattr(saved, "norm_epsilon", 1e-5),
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": _dtype(md),
    }
