"""Read a HuggingFace directory of one of the known families: config.json and safetensors, one tensor at a time."""

from __future__ import annotations

import argparse
import json
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron.core.dist_checkpointing.safe_load import load_file
from megatron.core.errors import CheckpointError
from tools.checkpoint import names
from tools.checkpoint.hf_families import family_of_config
from tools.checkpoint.hf_model import HuggingFaceModel
from tools.checkpoint.hf_rules import Family, Heads
from tools.checkpoint.options import WithoutEffect, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this loader."""
    group = parser.add_argument_group(title="HuggingFace loader")
    group.add_argument("--true-vocab-size", type=positive, help="vocabulary size without padding rows")
    group.add_argument("--tokenizer-model", help="recorded in the checkpoint's arguments")
    dtype = group.add_mutually_exclusive_group()
    dtype.add_argument(
        "--bf16", action="store_true", help="store weights in bfloat16; by default as they are"
    )
    dtype.add_argument("--fp16", action="store_true", help="store weights in float16; by default as they are")
    group.add_argument("--model-size", action=WithoutEffect, help="config.json says it")
    group.add_argument(
        "--checkpoint-type", choices=["hf"], default="hf", help="only HuggingFace directories are read"
    )
    group.add_argument("--megatron-path", action=WithoutEffect, help="nothing is imported from elsewhere")
    group.add_argument("--loader-transformer-impl", action=WithoutEffect, help="it is Megatron's")


class Weights:
    """The tensors of a directory by name, read when asked for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._where: dict[str, Path] = {}
        self._plain: dict[str, torch.Tensor] = {}
        self.unused: set[str] = set()
        index = directory / "model.safetensors.index.json"
        if index.exists():
            with _stranger(index):
                where = json.loads(index.read_text())["weight_map"]
                self._where = {name: directory / file for name, file in where.items()}
        elif (directory / "model.safetensors").exists():
            path = directory / "model.safetensors"
            with _safetensors(path) as file:
                self._where = dict.fromkeys(file.keys(), path)
        else:
            for path in sorted(directory.glob("pytorch_model*.bin")):
                self._plain.update(load_file(path))
        if not self._where and not self._plain:
            raise CheckpointError(
                str(directory), "it has neither safetensors nor pytorch_model*.bin", "check --load-dir"
            )
        self.unused = {*self._where, *self._plain}

    def get(self, name: str) -> torch.Tensor | None:
        """The tensor, or None."""
        for other in (name, name.partition(".")[2]):
            # Models without a head are stored without the first part of the names.
            if other in self._plain:
                self.unused.discard(other)
                return self._plain[other]
            if other in self._where:
                self.unused.discard(other)
                with _safetensors(self._where[other]) as file:
                    return file.get_tensor(other)
        return None


@contextmanager
def _stranger(path: Path) -> Iterator[None]:
    """Turn what reading somebody else's JSON may raise into a CheckpointError that names the file."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(str(path), f"it lacks {error}", "check that it is complete") from error
    except (OSError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(str(path), f"cannot be used ({error})", "check that it is complete") from error


@contextmanager
def _safetensors(path: Path) -> Iterator[Any]:
    """An open safetensors file. CheckpointError if it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        why = f"the file is missing, damaged or was cut short ({error})"
        raise CheckpointError(str(path), why, "fetch it again") from error


def read_config(directory: Path) -> dict[str, Any]:
    """config.json. CheckpointError if it cannot be read."""
    with _stranger(directory / "config.json"):
        config = json.loads((directory / "config.json").read_text())
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}")
    return config


_SIZES = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels num_experts "
    "max_position_embeddings encoder_num_layers decoder_num_layers vocab_size"
)


def load_checkpoint(queue: Any, args: Namespace) -> None:
    """Send the model, one layer at a time."""
    directory = Path(args.load_dir)
    config = read_config(directory)
    family = family_of_config(config, args.model_type)
    dtype = _demanded_dtype(args)
    weights = Weights(directory)
    md = _metadata(family, config, dtype or _usual_dtype(config), args)
    heads = Heads.of(md.checkpoint_args)
    queue.put(md)
    for message in names.messages(md):
        kind = message.name if message.layer is None else message.name.rpartition(" ")[0]
        prefix, rules = family.rules[kind]
        tensors: dict[str, torch.Tensor] = {}
        for rule in rules:
            try:
                tensors.update(rule.read(weights.get, prefix.format(message.layer), heads))
            except RuntimeError as error:
                why = f"tensors of {message.name} do not have the shapes that config.json says ({error})"
                raise CheckpointError(str(directory), why, "check that both belong together") from error
        _demand(kind, tensors, md, directory)
        family.after_read(kind, tensors, md.checkpoint_args)
        converted = {key: tensor if dtype is None else tensor.to(dtype) for key, tensor in tensors.items()}
        queue.put({"name": message.name, **converted})
    unused = [name for name in sorted(weights.unused) if not name.endswith(family.ignored or ("\0",))]
    if unused and args.checking:
        why = (
            f"it also has {', '.join(unused[:5])}{' ..' if len(unused) > 5 else ''}, which has no place here"
        )
        raise CheckpointError(str(directory), why, "pass --no-checking to leave it out")
    queue.put("done")


def verification_model(args: Namespace) -> HuggingFaceModel:
    """The model that was read, to compare with what was written."""
    directory = Path(args.load_dir)
    return HuggingFaceModel(directory, args.model_type, Weights(directory).get, _demanded_dtype(args))


def _demanded_dtype(args: Namespace) -> torch.dtype | None:
    """What weights are rounded to; None keeps each as it is, so that a round trip gives the same bits."""
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def _usual_dtype(config: dict[str, Any]) -> torch.dtype:
    """The dtype that the configuration names (transformers 5: `dtype`, 4: `torch_dtype`)."""
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16}
    return known.get(str(config.get("dtype") or config.get("torch_dtype")), torch.float32)


def _demand(kind: str, tensors: dict[str, torch.Tensor], md: Namespace, directory: Path) -> None:
    """CheckpointError unless the tensors are all that a model of these arguments has."""
    wanted = {
        "embeddings": ["word embeddings"]
        + ["position embeddings"] * (md.position_embedding_type == "learned_absolute"),
        "final norm": ["weight"],
        "output layer": ["weight"],
        "lm head": ["bias"],
    }.get(kind, ["weight", "bias"])
    if "layer" in kind and kind != "output layer":
        modules = ["input norm", "qkv", "dense", "post norm", "mlp l1"]
        wanted = [f"{module} weight" for module in modules]
        wanted += ["mlp l0 weight W", "mlp l0 weight V"] if md.swiglu else ["mlp l0 weight"]
        wanted += ["router weight"] * (md.num_experts is not None)
        if md.linear_bias:
            wanted += ["qkv bias", "dense bias", "mlp l0 bias", "mlp l1 bias"]
        if getattr(md.checkpoint_args, "add_qkv_bias", False):
            wanted.append("qkv bias")
        if md.norm_has_bias:
            wanted += ["input norm bias", "post norm bias"]
    missing = [key for key in wanted if key not in tensors]
    if missing:
        raise CheckpointError(
            str(directory), f"it lacks {', '.join(missing)} of {kind}", "check that it is complete"
        )
    for key, shape in _shapes(kind, md.checkpoint_args).items():
        if key in tensors and tuple(tensors[key].shape[-len(shape) :]) != shape:
            why = f"{key} of {kind} is {list(tensors[key].shape)}, and config.json says {list(shape)}"
            raise CheckpointError(str(directory), why, "check that both belong together")


def _shapes(kind: str, saved: Namespace) -> dict[str, tuple[int, ...]]:
    """The last axes of tensors, as the configuration has them."""
    heads, hidden, inner = Heads.of(saved), saved.hidden_size, saved.ffn_hidden_size
    if "layer" in kind and kind != "output layer":
        queries = saved.num_attention_heads * heads.size
        experts = (saved.num_experts,) if getattr(saved, "num_experts", None) else ()
        return {
            "qkv weight": (queries + 2 * heads.groups * heads.size, hidden),
            "dense weight": (hidden, queries),
            "mlp l0 weight": (inner, hidden),
            "mlp l0 weight W": (*experts, inner, hidden),
            "mlp l0 weight V": (*experts, inner, hidden),
            "mlp l1 weight": (*experts, hidden, inner),
            "input norm weight": (hidden,),
            "post norm weight": (hidden,),
        }
    return {
        "word embeddings": (saved.padded_vocab_size, hidden),
        "position embeddings": (saved.max_position_embeddings, hidden),
        "weight": (saved.padded_vocab_size, hidden) if kind == "output layer" else (hidden,),
    }


def _metadata(family: Family, config: dict[str, Any], dtype: torch.dtype, args: Namespace) -> Namespace:
    """What the saver must know; its arguments are those a run of this model needs."""
    with _stranger(Path(args.load_dir) / "config.json"):
        own = family.arguments(config)
        sizes = {**own, "vocab_size": config["vocab_size"]}
        for name in _SIZES.split():
            if name in sizes and (type(sizes[name]) is not int or sizes[name] < 1):
                raise ValueError(f"{name} is {sizes[name]!r}, not a positive whole number")
        if not isinstance(own["norm_epsilon"], float):
            raise ValueError(f"the epsilon of norms is {own['norm_epsilon']!r}, not a number")
        if own["num_attention_heads"] % (own.get("num_query_groups") or 1):
            raise ValueError("the key and value heads do not divide the attention heads")
    # A table of any length is kept as it is, and a run must not pad it anew.
    multiple = 128 if args.true_vocab_size is not None or config["vocab_size"] % 128 == 0 else 1
    heads = own["num_attention_heads"]
    saved = {
        "seq_length": own["max_position_embeddings"],
        "iteration": 0,
        "params_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "fp16": dtype is torch.float16,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "add_position_embedding": own["position_embedding_type"] != "rope",
        "make_vocab_size_divisible_by": multiple,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "tokenizer_model": args.tokenizer_model,
        "group_query_attention": own.get("num_query_groups", heads) != heads,
        "add_qkv_bias": False,
        "padded_vocab_size": config["vocab_size"],
        **own,
    }
    checkpoint_args = Namespace(**saved)
    return Namespace(
        model_type=args.model_type,
        iteration=0,
        params_dtype=dtype,
        bert_binary_head=saved.get("bert_binary_head", False),
        output_layer=saved["untie_embeddings_and_output_weights"],
        linear_bias=saved["add_bias_linear"],
        norm_has_bias=saved["normalization"] == "LayerNorm",
        swiglu=saved["swiglu"],
        previous_tensor_parallel_size=1,
        previous_pipeline_parallel_size=1,
        num_experts=saved.get("num_experts"),
        true_vocab_size=args.true_vocab_size,
        make_vocab_size_divisible_by=multiple,
        checkpoint_args=checkpoint_args,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        seq_length=saved["seq_length"],
        tokenizer_type=saved["tokenizer_type"],
        num_layers=saved["num_layers"],
        hidden_size=saved["hidden_size"],
        num_attention_heads=saved["num_attention_heads"],
        max_position_embeddings=saved["max_position_embeddings"],
        position_embedding_type=saved["position_embedding_type"],
    )
