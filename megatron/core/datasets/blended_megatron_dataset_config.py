"""What every dataset build is told: sequence length, seed, sources, split, cache."""

from __future__ import annotations

import functools
import itertools
import logging
import re
from dataclasses import dataclass, field

from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer
from megatron.core.datasets.utils import Split, normalize
from megatron.core.errors import InvariantError
from megatron.core.utils import log_single_rank

logger = logging.getLogger(__name__)

# Path prefixes and their weights; weights None means every dataset once.
Blend = tuple[list[str], list[float] | None]
# The part [lower, upper) of a corpus, as fractions; None for a split without data.
Span = tuple[float, float] | None


@dataclass
class BlendedMegatronDatasetConfig:
    """Fields common to all datasets. With neither `blend` nor `blend_per_split` the data is synthetic."""

    random_seed: int
    """Seed of document and sample order."""

    sequence_length: int
    """Tokens per sample."""

    blend: Blend | None = None
    """One source for all three splits, which `split` divides."""

    blend_per_split: list[Blend | None] | None = None
    """A source per split (train, valid, test); None in a place means no such split."""

    renormalize_blend_weights: bool = False
    """Blend by the number of samples built per dataset instead of by the given weights."""

    split: str | None = None
    """Three comma-separated numbers, the shares of train, valid and test."""

    split_matrix: list[Span] | None = field(init=False, default=None)
    """Bounds of each split, from `split`."""

    num_dataset_builder_threads: int = 1
    """Datasets of a blend whose indices are built at the same time."""

    path_to_cache: str | None = None
    """Directory of all index files; None puts them below each path prefix."""

    mmap_bin_files: bool = True
    """Map token files into memory instead of reading them."""

    mock: bool = field(init=False, default=False)
    """Synthetic data, see above."""

    tokenizer: MegatronTokenizer | None = None
    """Supplies special token ids, and its identity for the cache key."""

    def __post_init__(self) -> None:
        if self.sequence_length is None or self.sequence_length < 1:
            raise InvariantError(
                "sequence_length", f"{self.sequence_length} is not positive", "set --seq-length"
            )
        if self.num_dataset_builder_threads < 1:
            raise InvariantError("num_dataset_builder_threads", "must be at least 1", "drop the option")
        if self.blend_per_split is not None and any(self.blend_per_split):
            if self.blend is not None:
                raise InvariantError("blend and blend_per_split", "are incompatible", "give one of them")
            if self.split is not None:
                raise InvariantError(
                    "--split",
                    "split and blend_per_split are incompatible",
                    "drop --split: each path is one split",
                )
            if len(self.blend_per_split) != len(Split):
                raise InvariantError(
                    "blend_per_split", f"has {len(self.blend_per_split)} entries, not three", None
                )
            return
        if self.blend is None:
            self.mock = True
            log_single_rank(
                logger, logging.INFO, "Let mock = True, as both blend and blend_per_split are None"
            )
            self.split = "1,1,1"
            log_single_rank(
                logger, logging.INFO, f"Let split = {self.split}, an arbitrarily even split, as mock is True"
            )
        if self.split is None:
            raise InvariantError(
                "--split", "one source for all splits must be divided", "for instance --split 969,30,1"
            )
        self.split_matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(self.split))
        log_single_rank(logger, logging.INFO, f"Let split_matrix = {self.split_matrix}")


def parse_and_normalize_split(split: str) -> list[float]:
    """The shares of train, valid and test, summing to 1. Anything between the numbers separates them."""
    try:
        shares = [float(text) for text in re.findall(r"[.0-9]+", split)]
    except ValueError as error:
        raise InvariantError("--split", f"{split!r}: {error}", "for instance --split 969,30,1") from error
    if len(shares) > len(Split):
        raise InvariantError(
            "--split", f"{split!r} has {len(shares)} numbers, more than three", "write train,valid,test"
        )
    shares += [0.0] * (len(Split) - len(shares))
    if sum(shares) == 0:
        raise InvariantError(
            "--split", f"{split!r} gives every split a share of zero", "for instance --split 969,30,1"
        )
    return normalize(shares)


def convert_split_vector_to_split_matrix(
    vector_a: list[float], vector_b: list[float] | None = None
) -> list[Span]:
    """Cumulative bounds of each share, None for an empty one; with `vector_b` the overlap of both."""

    def bounds(vector: list[float]) -> list[tuple[float, float]]:
        edges = list(itertools.accumulate(vector, initial=0))
        return list(itertools.pairwise(edges))

    def overlap(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
        return max(a[0], b[0]), min(a[1], b[1])

    vectors = [vector_a] if vector_b is None else [vector_a, vector_b]
    spans = [functools.reduce(overlap, same) for same in zip(*(bounds(vector) for vector in vectors))]
    return [span if span[0] < span[1] else None for span in spans]
