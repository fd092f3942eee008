"""What is in a checkpoint, or how two differ: `inspect.py DIR [OTHER]`.

DIR is a --save directory (its newest checkpoint is shown) or one iteration's directory, in any format. Layers whose
tensors have the same shapes share a line.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron.core.dist_checkpointing import durable
from megatron.core.dist_checkpointing.core import COMMON_FNAME, maybe_load_config
from megatron.core.dist_checkpointing.safe_load import load_file
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.reading import Stored
from megatron.core.dist_checkpointing.strategies.resharding import Box
from megatron.core.errors import CheckpointError, MegatronError
from megatron.training.checkpointing.layout import checkpoint_exists, read_tracker

_LAYOUT = {
    "tensor": "tensor_model_parallel_size",
    "pipeline": "pipeline_model_parallel_size",
    "virtual pipeline": "virtual_pipeline_model_parallel_size",
    "expert": "expert_model_parallel_size",
    "context": "context_parallel_size",
    "data": "data_parallel_size",
}
_SHOWN_ARGS = """
    num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups seq_length
    max_position_embeddings padded_vocab_size position_embedding_type normalization swiglu
    untie_embeddings_and_output_weights num_experts use_distributed_optimizer params_dtype tokenizer_type
"""
_LAYER = re.compile(r"\blayers\.(\d+)\.")
_RANDOM_STATE = re.compile(r"(^|[:.])rng_state\b")
_MOST_LINES = 12


@dataclass
class Content:
    """One checkpoint: where, in which format, its small values, and how to read each tensor.

    Names of the torch format begin with their file, `mp_rank_00:`.
    """

    path: Path
    format: str
    common: dict[str, Any]
    tensors: dict[str, Any] = field(default_factory=dict)
    stored: Stored | None = None

    @property
    def args(self) -> dict[str, Any]:
        """The arguments of the run that saved it."""
        return vars(self.common["args"]) if "args" in self.common else {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape in torch_dist, the shape of the rank's part in the torch format."""
        return self.stored.shape(name) if self.stored else tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype as stored."""
        return self.stored.dtype(name) if self.stored else self.tensors[name].dtype

    def nbytes(self, name: str) -> int:
        """Size of the tensor's data."""
        return torch.Size(self.shape(name)).numel() * self.dtype(name).itemsize

    def read(self, name: str) -> torch.Tensor:
        """The tensor."""
        if self.stored is None:
            return self.tensors[name]
        shape = self.stored.shape(name)
        whole = torch.zeros(shape, dtype=self.stored.dtype(name))
        self.stored.read_box(name, Box((0,) * len(shape), shape), whole)
        return whole

    def parts(self) -> list[str]:
        """What it is made of: the entries of its dict, and what torch_dist keeps beside them."""
        stored = self.stored.keys() if self.stored else []
        beside = [key.partition(".")[0].partition("/")[0] for key in stored]
        own = {"model" if name not in ("optimizer", "rng_state") else name: None for name in beside}
        return list({**dict.fromkeys(self.common), **own})

    def sections(self) -> dict[str, list[str]]:
        """Names by what they belong to: `model` and `optimizer`, for each file of the torch format."""
        sections: dict[str, list[str]] = {}
        for name in self.tensors:
            file, _, inner = name.rpartition(":")
            kind = "optimizer" if inner.startswith("optimizer.") or "/" in file else "model"
            title = f"{kind} in {file.partition('/')[0]}" if file else kind
            sections.setdefault(title, []).append(name)
        return sections


def open_checkpoint(directory: str) -> Content:
    """Read the directory's small values and the index of its tensors. CheckpointError if it is no checkpoint."""
    path = Path(directory)
    if checkpoint_exists(directory):
        path /= read_tracker(directory).directory
    config = maybe_load_config(path)
    if config is not None:
        stored = get_default_load_sharded_strategy(str(path)).open(path)
        names = [key for key in stored.keys() if stored.is_tensor(key)]  # noqa: SIM118 not a mapping
        common = load_file(path / COMMON_FNAME)
        return Content(path, config.sharded_backend, common, dict.fromkeys(names), stored)
    files = sorted(
        path.glob("mp_rank_*/*.pt"), key=lambda file: (file.parent, file.name != "model_optim_rng.pt")
    )
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
        common = common or state
    return Content(path, "torch", common, tensors)


def _collect(tree: Any, prefix: str, tensors: dict[str, Any]) -> None:
    items = (
        tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    )
    for name, value in items:
        if not isinstance(value, torch.Tensor):
            _collect(value, f"{prefix}{name}.", tensors)
        elif not _RANDOM_STATE.search(f"{prefix}{name}"):
            tensors[f"{prefix}{name}"] = value


def describe(content: Content, norms: bool = True, every: bool = False) -> str:
    """The checkpoint as text: what it is, its arguments, its tensors with their L2 norms.

    `every` shows all arguments, and each layer's tensors on lines of their own.
    """
    common, args = content.common, content.args
    checksums = durable.read_manifest(content.path)
    writer = ", ".join(f"{name} {version}" for name, version in durable.read_writer(content.path).items())
    samples = (
        f", {args['consumed_train_samples']} training samples" if "consumed_train_samples" in args else ""
    )
    facts = {
        "format": f"{content.format}, checkpoint version {common.get('checkpoint_version', 0)}",
        "written by": writer or "not recorded (another program)",
        "checksums": f"{len(checksums)} files" if checksums else "none",
        "position": f"iteration {common.get('iteration', 'not recorded')}{samples}",
        "layout": ", ".join(f"{what} {args.get(name) or 1}" for what, name in _LAYOUT.items())
        if args
        else "not recorded",
        "holds": ", ".join(content.parts()),
    }
    lines = [str(content.path), *(f"  {name:11} {value}" for name, value in facts.items())]
    shown = sorted(args) if every else [name for name in _SHOWN_ARGS.split() if name in args]
    if shown:
        width = max(map(len, shown))
        lines += ["", "arguments", *(f"  {name:{width}}  {args[name]}" for name in shown)]
    for title, names in content.sections().items():
        size = sum(map(content.nbytes, names)) / 2**20
        lines += ["", f"{title}: {len(names)} tensors, {size:.1f} MiB", *_table(content, names, norms, every)]
    return "\n".join(lines)


def _table(content: Content, names: list[str], norms: bool, every: bool) -> list[str]:
    """Lines with name, dtype, shape and norm of the tensors."""
    rows = []
    for label, members in _fold(content, names, every).items():
        first = members[0]
        found = [content.read(name).double().norm().item() for name in members] if norms else []
        low, high = (f"{bound(found):.4g}" for bound in (min, max)) if found else ("", "")
        norm = f"norm {low}" if low == high else f"norm {low} .. {high}"
        dtype = str(content.dtype(first)).removeprefix("torch.")
        rows.append((label, dtype, str(list(content.shape(first))), norm if found else ""))
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(4)]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]


def _fold(content: Content, names: list[str], every: bool) -> dict[str, list[str]]:
    """Names without their file, those of equal layers together: `layers.0-3.mlp..` -> their full names."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name in names:
        inner = name.rpartition(":")[2]
        place = name if every else _LAYER.sub("layers.*.", inner)
        alike.setdefault((place, content.dtype(name), content.shape(name)), []).append(name)
    folded: dict[str, list[str]] = {}
    for members in alike.values():
        inner = members[0].rpartition(":")[2]
        if len(members) > 1:
            inner = _LAYER.sub(
                f"layers.{_ranges([int(_LAYER.findall(name)[0]) for name in members])}.", inner, count=1
            )
        # Parts of one name may differ in shape.
        folded.setdefault(inner, []).extend(members)
    return folded


def _ranges(numbers: list[int]) -> str:
    """3, 4, 5, 9 -> "3-5,9"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts)


def compare(one: Content, other: Content, every: bool = False) -> tuple[str, bool]:
    """(differences as text, whether there are any): arguments, tensors present, shapes, values."""
    lines = []
    missing = object()
    settings = [
        (name, *(str(args.get(name, "absent")) for args in (one.args, other.args)))
        for name in sorted(one.args.keys() | other.args.keys())
        if one.args.get(name, missing) != other.args.get(name, missing)
    ]
    if settings:
        widths = [max(len(row[column]) for row in settings) for column in range(2)]
        lines += ["", "arguments that differ"]
        lines += [f"  {name:{widths[0]}}  {ours:{widths[1]}}  {theirs}" for name, ours, theirs in settings]
    both = [name for name in one.tensors if name in other.tensors]
    changed = [line for name in both if (line := _difference(one, other, name))]
    lines += _listed("tensors that differ", changed, every)
    for content, rest in ((one, other), (other, one)):
        alone = [f"  {name}" for name in content.tensors if name not in rest.tensors]
        lines += _listed(f"tensors only in {content.path}", alone, every)
    if not lines:
        return f"{one.path} and {other.path} are equal: {len(both)} tensors, {len(one.args)} arguments", False
    lines += ["", f"{len(both) - len(changed)} tensors are equal"]
    if not both:
        lines.append("no names agree: to compare the values, convert.py one to the other's format and layout")
    return "\n".join([f"first   {one.path}", f"second  {other.path}", *lines]), True


def _difference(one: Content, other: Content, name: str) -> str:
    """One line about a tensor that both have; empty if it is the same."""
    if one.shape(name) != other.shape(name) or one.dtype(name) != other.dtype(name):
        kinds = (f"{str(c.dtype(name)).removeprefix('torch.')} {list(c.shape(name))}" for c in (one, other))
        return f"  {name}: {' | '.join(kinds)}"
    a, b = one.read(name), other.read(name)
    if torch.equal(a, b):
        return ""
    apart = (a.double() - b.double()).abs()
    scale = a.double().norm().item() or 1.0
    return f"  {name}: by up to {apart.max():.3g}, {apart.norm() / scale:.2g} of its norm"


def _listed(title: str, entries: list[str], every: bool) -> list[str]:
    """A headed list, cut unless `every`."""
    if not entries:
        return []
    shown = entries if every or len(entries) <= _MOST_LINES else entries[: _MOST_LINES - 1]
    rest = len(entries) - len(shown)
    return ["", f"{title}: {len(entries)}", *shown, *([f"  .. and {rest} more (--all)"] if rest else [])]


def main() -> int:
    """Entry point; the exit status is 1 if two checkpoints differ or one cannot be read."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", help="a --save directory or an iteration's directory")
    parser.add_argument("other", nargs="?", help="show how this one differs")
    parser.add_argument("--no-norms", action="store_true", help="only read the index, not the tensors")
    parser.add_argument("--all", action="store_true", help="every argument, layer and difference")
    options = parser.parse_args()
    try:
        content = open_checkpoint(options.directory)
        if options.other is None:
            print(describe(content, not options.no_norms, options.all))
            return 0
        text, differ = compare(content, open_checkpoint(options.other), options.all)
        print(text)
        return int(differ)
    except MegatronError as error:
        print(error, file=sys.stderr)
        return error.exit_code
