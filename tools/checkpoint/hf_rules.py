"""How a message's tensors and HuggingFace's correspond; every rule works both ways."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
# name -> tensor or None
Read = Callable[[str], torch.Tensor | None]


def pack(parts: list[torch.Tensor], groups: int) -> torch.Tensor:
    """Rows of separate projections, grouped: per query group its query heads, one key head, one value head."""
    rest = parts[0].shape[1:]
    return torch.cat([part.reshape(groups, -1, *rest) for part in parts], dim=1).reshape(-1, *rest)


def unpack(packed: torch.Tensor, groups: int, head_size: int, count: int) -> list[torch.Tensor]:
    """The inverse of `pack` for `count` projections, of which all but the first have one head in a group."""
    rest = packed.shape[1:]
    grouped = packed.reshape(groups, -1, *rest)
    first = grouped.shape[1] - (count - 1) * head_size
    parts = grouped.split([first, *[head_size] * (count - 1)], dim=1)
    return [part.reshape(-1, *rest) for part in parts]


@dataclass(frozen=True)
class Heads:
    """Query groups and head size of a model."""

    groups: int
    size: int

    @classmethod
    def of(cls, saved: Namespace) -> Heads:
        """Those of a model's arguments."""
        groups = saved.num_attention_heads
        if getattr(saved, "group_query_attention", False):
            groups = saved.num_query_groups
        return cls(
            groups, getattr(saved, "kv_channels", None) or saved.hidden_size // saved.num_attention_heads
        )


@dataclass(frozen=True)
class Same:
    """One tensor; HuggingFace's Conv1D stores matrices transposed."""

    key: str
    name: str
    transposed: bool = False

    def read(self, get: Read, prefix: str, heads: Heads) -> Tensors:
        """The message's tensors, of what there is."""
        tensor = get(prefix + self.name)
        if tensor is None:
            return {}
        return {self.key: tensor.t().contiguous() if self.transposed else tensor}

    def write(self, message: Tensors, prefix: str, heads: Heads) -> Tensors:
        """HuggingFace's tensors; takes them out of the message."""
        if self.key not in message:
            return {}
        tensor = message.pop(self.key)
        return {prefix + self.name: tensor.t() if self.transposed else tensor}


@dataclass(frozen=True)
class Packed:
    """Projections that are one matrix in Megatron and several (or one, in another order) in HuggingFace."""

    key: str
    names: tuple[str, ...]
    kind: str
    count: int = 3
    transposed: bool = False

    def read(self, get: Read, prefix: str, heads: Heads) -> Tensors:
        """The message's tensors, of what there is."""
        parts = [get(f"{prefix}{name}.{self.kind}") for name in self.names]
        found = [part for part in parts if part is not None]
        if len(found) != len(parts):
            return {}
        if len(found) == 1:
            found = list(
                (found[0].t() if self.transposed and self.kind == "weight" else found[0]).chunk(self.count)
            )
        return {f"{self.key} {self.kind}": pack(found, heads.groups)}

    def write(self, message: Tensors, prefix: str, heads: Heads) -> Tensors:
        """HuggingFace's tensors; takes them out of the message."""
        packed = message.pop(f"{self.key} {self.kind}", None)
        if packed is None:
            return {}
        parts = unpack(packed, heads.groups, heads.size, self.count)
        if len(self.names) == 1:
            whole = torch.cat(parts)
            parts = [whole.t() if self.transposed and self.kind == "weight" else whole]
        return {f"{prefix}{name}.{self.kind}": part for name, part in zip(self.names, parts)}


@dataclass(frozen=True)
class Experts:
    """One tensor with a leading axis for the experts, in HuggingFace a tensor for each; `{}` in `name` is its number."""

    key: str
    name: str

    def read(self, get: Read, prefix: str, heads: Heads) -> Tensors:
        """The message's tensors, of what there is."""
        experts: list[torch.Tensor] = []
        while (expert := get(prefix + self.name.format(len(experts)))) is not None:
            experts.append(expert)
        return {self.key: torch.stack(experts)} if experts else {}

    def write(self, message: Tensors, prefix: str, heads: Heads) -> Tensors:
        """HuggingFace's tensors; takes them out of the message."""
        experts = message.pop(self.key, ())
        return {prefix + self.name.format(number): expert for number, expert in enumerate(experts)}


Rule = Same | Packed | Experts


def both(key: str, name: str, transposed: bool = False) -> list[Rule]:
    """A module's weight and bias under the same names."""
    separator = " " if key else ""
    return [
        Same(f"{key}{separator}weight", f"{name}.weight", transposed),
        Same(f"{key}{separator}bias", f"{name}.bias"),
    ]


def packed(key: str, *names: str, count: int = 3, transposed: bool = False) -> list[Rule]:
    """Weight and bias of packed projections."""
    return [Packed(key, names, kind, count, transposed) for kind in ("weight", "bias")]


@dataclass(frozen=True)
class Family:
    """A HuggingFace architecture: how its configuration and its tensors correspond to Megatron's.

    `rules` maps the kind of a message (its name without the number) to the prefix of its tensors, with `{}` for the
    number, and its rules. `arguments` makes a run's arguments of a configuration and `config` the reverse; both raise
    CheckpointError by name for what the other side cannot represent. `ignored` are ends of names that hold no weights.
    `after_read` and `before_write` mend messages that correspond in no regular way.
    """

    model_type: str
    types: tuple[str, ...]
    auto_class: str
    rules: dict[str, tuple[str, list[Rule]]]
    arguments: Callable[[dict[str, Any]], dict[str, Any]]
    config: Callable[[Namespace, Namespace, str | None], dict[str, Any]]
    ignored: tuple[str, ...] = ()
    after_read: Callable[[str, Tensors, Namespace], None] = lambda kind, message, saved: None
    before_write: Callable[[str, Tensors, Namespace], None] = lambda kind, message, saved: None
