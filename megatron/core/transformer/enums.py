"""Closed sets of names used by transformer modules."""

from __future__ import annotations

import enum

from megatron.core.enums import ModelType

__all__ = ["AttnMaskType", "AttnType", "ModelType"]


class AttnType(enum.Enum):
    """Where keys and values come from: the same sequence or another one."""

    self_attn = 1
    cross_attn = 2


class AttnMaskType(enum.Enum):
    """Which positions attend to which: by a given padding mask, to the past only, to everything, or both
    or any mask.
    """

    padding = 1
    causal = 2
    no_mask = 3
    padding_causal = 4
    arbitrary = 5
