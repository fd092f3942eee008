"""What is in a checkpoint, or how two differ: `inspect.py DIR [OTHER] [--norms]`.

DIR is a --save directory (its newest checkpoint is shown) or one iteration's directory, in any format.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron.core.dist_checkpointing import check_is_distributed_checkpoint, durable
from megatron.core.dist_checkpointing.core import COMMON_FNAME
from megatron.core.dist_checkpointing.safe_load import load_file
from megatron.core.dist_checkpointing.strategies.resharding import Box
from megatron.core.dist_checkpointing.strategies.torch import StoredTensors
from megatron.core.errors import CheckpointError, MegatronError
from megatron.training.checkpointing.layout import checkpoint_exists, read_tracker

_SHOWN_ARGS = """
    num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups seq_length
    max_position_embeddings padded_vocab_size position_embedding_type normalization swiglu
    untie_embeddings_and_output_weights num_experts tensor_model_parallel_size
    pipeline_model_parallel_size virtual_pipeline_model_parallel_size data_parallel_size
    expert_model_parallel_size use_distributed_optimizer params_dtype tokenizer_type
    consumed_train_samples
"""


@dataclass
class Content:
    """One checkpoint: where, in which format, its small values, and how to read each tensor."""

    path: Path
    format: str
    common: dict[str, Any]
    tensors: dict[str, Any] = field(default_factory=dict)
    stored: StoredTensors | None = None

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape in torch_dist, the shape of the rank's part in the torch format."""
        return self.stored.shape(name) if self.stored else tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype as stored."""
        return self.stored.dtype(name) if self.stored else self.tensors[name].dtype

    def read(self, name: str) -> torch.Tensor:
        """The tensor."""
        if self.stored is None:
            return self.tensors[name]
        shape = self.stored.shape(name)
        whole = torch.zeros(shape, dtype=self.stored.dtype(name))
        self.stored.read_box(name, Box((0,) * len(shape), shape), whole)
        return whole


def open_checkpoint(directory: str) -> Content:
    """Read the directory's small values and the index of its tensors. CheckpointError if it is no checkpoint."""
    path = Path(directory)
    if checkpoint_exists(directory):
        path /= read_tracker(directory).directory
    if check_is_distributed_checkpoint(path):
        stored = StoredTensors(path)
        names = [key for key in stored.keys() if stored.is_tensor(key)]  # noqa: SIM118 not a mapping
        return Content(path, "torch_dist", load_file(path / COMMON_FNAME), dict.fromkeys(names), stored)
    files = sorted(path.glob("mp_rank_*/*.pt"))
    if not files:
        raise CheckpointError(
            str(path), "it holds neither mp_rank_* files nor metadata.json", "name an iter_* directory"
        )
    tensors: dict[str, Any] = {}
    common: dict[str, Any] = {}
    for file in files:
        state = load_file(file)
        where = file.parent.name if file.name.startswith("model") else f"{file.parent.name}/{file.stem}"
        _collect(state, f"{where}:", tensors)
        common = common or {name: value for name, value in state.items() if name != "model"}
    return Content(path, "torch", common, tensors)


def _collect(tree: Any, prefix: str, tensors: dict[str, Any]) -> None:
    items = (
        tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    )
    for name, value in items:
        if isinstance(value, torch.Tensor):
            tensors[f"{prefix}{name}"] = value
        else:
            _collect(value, f"{prefix}{name}.", tensors)


def describe(content: Content, norms: bool) -> str:
    """The checkpoint as text: what it is, its arguments, its tensors."""
    common, args = content.common, content.common.get("args")
    checksums = durable.read_manifest(content.path)
    lines = [
        f"{content.path}",
        f"  format {content.format}, checkpoint version {common.get('checkpoint_version', 0)}, "
        f"iteration {common.get('iteration', 'not recorded')}",
        f"  {len(checksums)} files with checksums"
        if checksums
        else "  no checksums (written by another program)",
        f"  holds {', '.join(key for key in common if key != 'args')}",
    ]
    if args is not None:
        lines.append("  arguments")
        lines += [
            f"    {name:40} {getattr(args, name)}" for name in _SHOWN_ARGS.split() if hasattr(args, name)
        ]
    total = 0
    lines.append("  tensors")
    for name in content.tensors:
        size = torch.Size(content.shape(name)).numel() * content.dtype(name).itemsize
        total += size
        norm = f"  norm {content.read(name).double().norm():.6g}" if norms else ""
        dtype = str(content.dtype(name)).removeprefix("torch.")
        lines.append(f"    {name:72} {dtype:9} {list(content.shape(name))}{norm}")
    return "\n".join([*lines, f"  {len(content.tensors)} tensors, {total / 2**20:.1f} MiB"])


def compare(one: Content, other: Content) -> tuple[str, bool]:
    """(differences as text, whether there are any): arguments, tensors present, shapes, values."""
    lines = []
    ours, theirs = (vars(c.common["args"]) if "args" in c.common else {} for c in (one, other))
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            lines.append(f"  args.{name}: {ours.get(name, 'absent')} | {theirs.get(name, 'absent')}")
    for name in [*one.tensors, *(name for name in other.tensors if name not in one.tensors)]:
        if name not in other.tensors or name not in one.tensors:
            lines.append(f"  {name}: only in {(one if name in one.tensors else other).path}")
        elif one.shape(name) != other.shape(name) or one.dtype(name) != other.dtype(name):
            lines.append(
                f"  {name}: {one.dtype(name)} {one.shape(name)} | {other.dtype(name)} {other.shape(name)}"
            )
        else:
            a, b = one.read(name), other.read(name)
            if not torch.equal(a, b):
                lines.append(f"  {name}: values differ by up to {(a.double() - b.double()).abs().max():.3g}")
    if not lines:
        return f"{one.path} and {other.path} are equal", False
    return "\n".join([f"{one.path} | {other.path}", *lines]), True


def main() -> int:
    """Entry point; the exit status is 1 if two checkpoints differ or one cannot be read."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", help="a --save directory or an iteration's directory")
    parser.add_argument("other", nargs="?", help="show how this one differs")
    parser.add_argument("--norms", action="store_true", help="read the tensors and show their L2 norms")
    options = parser.parse_args()
    try:
        content = open_checkpoint(options.directory)
        if options.other is None:
            print(describe(content, options.norms))
            return 0
        text, differ = compare(content, open_checkpoint(options.other))
        print(text)
        return int(differ)
    except MegatronError as error:
        print(error, file=sys.stderr)
        return error.exit_code
