"""Small facts shared by the dataset modules: splits, weights, path lists."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum

import numpy

from megatron.core.errors import ConfigError, InvariantError


class Split(Enum):
    """The three parts of a corpus, in the order in which `--split` names them."""

    train = 0
    valid = 1
    test = 2


def compile_helpers() -> None:
    """Do nothing: the index algorithms are numpy, so scripts that compile them first have nothing to wait for."""


def normalize(weights: Sequence[float]) -> list[float]:
    """Divide the weights by their sum (float64)."""
    values = numpy.array(weights, dtype=numpy.float64)
    total = values.sum()
    if not math.isfinite(total) or total <= 0 or (values < 0).any():
        raise ConfigError(
            "blend weights",
            f"{list(weights)} cannot be normalised: they must be finite, not negative, and not all zero",
            "give every data path a positive weight",
        )
    return (values / total).tolist()


def _as_weight(item: str | float) -> float | None:
    try:
        return float(item)
    except ValueError:
        return None


def get_blend_from_list(
    blend: Sequence[str | float] | None,
) -> tuple[list[str], list[float] | None] | None:
    """Read a data-path list: `prefix ...` or `weight prefix weight prefix ...`, weights as text or as numbers.

    Returns (prefixes, weights); weights is None for a plain list. A list of odd length, or one where no
    first-of-a-pair reads as a number, is a plain list.
    """
    if blend is None:
        return None
    if len(blend) == 0:
        raise InvariantError(
            "--data-path", "the list of data paths is empty", "name at least one path prefix"
        )
    plain = [str(item).strip() for item in blend]
    if len(blend) % 2:
        return plain, None
    weights = [_as_weight(item) for item in blend[0::2]]
    readable = [weight for weight in weights if weight is not None]
    if len(readable) == len(weights):
        return plain[1::2], readable
    first_unreadable = weights.index(None)
    if any(weight is not None for weight in weights[first_unreadable:]):
        raise InvariantError(
            "--data-path",
            f"{blend[2 * first_unreadable]!r} stands where a weight is expected, but later pairs have weights",
            "write `weight prefix weight prefix ...`, or prefixes only",
        )
    return plain, None
