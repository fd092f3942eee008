"""Sizes of a Mamba-2 mixer, and how its stacked parameters are divided: integers and slices only.

The rows of `in_proj.weight` are several matrices on top of each other (z, x, B, C, dt), and so are those of `conv1d`
(x, B, C). Each of them is divided over tensor-parallel ranks on its own, so a rank's rows are no consecutive part of
the whole parameter's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.core.errors import InvariantError


@dataclass(frozen=True)
class MixerSizes:
    """Of a whole mixer, or of one rank's part of it: channels `d_inner`, heads, groups of heads that share B and C."""

    d_inner: int
    d_state: int
    nheads: int
    ngroups: int

    @property
    def in_proj(self) -> dict[str, int]:
        """Rows of each part of `in_proj.weight`, top to bottom."""
        group = self.ngroups * self.d_state
        return {"z": self.d_inner, "x": self.d_inner, "B": group, "C": group, "dt": self.nheads}

    @property
    def conv(self) -> dict[str, int]:
        """Rows of each part of `conv1d.weight` and `conv1d.bias`, top to bottom."""
        group = self.ngroups * self.d_state
        return {"x": self.d_inner, "B": group, "C": group}

    def per_rank(self, ranks: int) -> MixerSizes:
        """What each of `ranks` tensor-parallel ranks holds. InvariantError unless heads and groups divide."""
        for name, count in (("heads", self.nheads), ("groups", self.ngroups)):
            if count % ranks:
                raise InvariantError(
                    "--tensor-model-parallel-size",
                    f"{count} {name} of a Mamba layer cannot be divided evenly over {ranks} ranks",
                    "choose a tensor-parallel size that divides them",
                )
        return MixerSizes(self.d_inner // ranks, self.d_state, self.nheads // ranks, self.ngroups // ranks)


def mixer_sizes(d_model: int, d_state: int, expand: int, headdim: int, ngroups: int) -> MixerSizes:
    """Sizes of a whole mixer over a residual stream of width `d_model`. InvariantError unless they divide."""
    d_inner = expand * d_model
    if d_inner % headdim:
        raise InvariantError(
            "--hidden-size",
            f"the {d_inner} inner channels of a Mamba layer do not divide into heads of {headdim}",
            f"make {expand} x --hidden-size a multiple of {headdim}",
        )
    nheads = d_inner // headdim
    if nheads % ngroups:
        raise InvariantError(
            "--hidden-size",
            f"the {nheads} heads of a Mamba layer (of {headdim} channels each) do not divide into {ngroups} groups",
            f"make {expand} x --hidden-size a multiple of {headdim * ngroups}",
        )
    return MixerSizes(d_inner, d_state, nheads, ngroups)


def cut_sections(whole: Tensor, sections: Sequence[int], rank: int, ranks: int) -> Tensor:
    """Rank's rows of a stacked parameter [sum(sections), ..]: its part of each section, on top of each other."""
    return torch.cat([section.chunk(ranks)[rank] for section in whole.split(list(sections))])


def join_sections(pieces: Sequence[Tensor], sections: Sequence[int]) -> Tensor:
    """The whole parameter from every rank's rows, in rank order; `sections` are those of one rank."""
    parts = [piece.split(list(sections)) for piece in pieces]
    return torch.cat([torch.cat(section) for section in zip(*parts)])
