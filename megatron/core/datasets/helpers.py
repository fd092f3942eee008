"""The index functions under the names and calling conventions of the compiled module that scripts import."""

from __future__ import annotations

import numpy

from megatron.core.datasets import index_builder
from megatron.core.datasets.index_builder import build_sample_idx

__all__ = ["build_blending_indices", "build_exhaustive_blending_indices", "build_mapping", "build_sample_idx"]


def build_blending_indices(
    dataset_index: numpy.ndarray,
    dataset_sample_index: numpy.ndarray,
    weights: numpy.ndarray,
    num_datasets: int,
    size: int,
    verbose: bool = False,
) -> None:
    """Fill the two arrays [size] with the blend of `num_datasets` datasets by normalised weights."""
    dataset_index[:size], dataset_sample_index[:size] = index_builder.blend_datasets(
        numpy.asarray(weights[:num_datasets], dtype=numpy.float64), size
    )


def build_exhaustive_blending_indices(
    dataset_index: numpy.ndarray, dataset_sample_index: numpy.ndarray, sizes: numpy.ndarray, num_datasets: int
) -> None:
    """Fill the two arrays [sum of sizes] with a blend that takes each dataset exactly once."""
    limits = numpy.asarray(sizes[:num_datasets], dtype=numpy.int64)
    total = int(limits.sum())
    dataset_index[:total], dataset_sample_index[:total] = index_builder.blend_datasets(
        limits / total, total, limits=limits
    )


def build_mapping(
    docs: numpy.ndarray,
    sizes: numpy.ndarray,
    num_epochs: int,
    max_num_samples: int,
    max_seq_length: int,
    short_seq_prob: float,
    seed: int,
    verbose: bool = False,
    min_num_sent: int = 2,
) -> numpy.ndarray:
    """Sentence spans for BERT and T5, see index_builder.build_mapping."""
    return index_builder.build_mapping(
        docs, sizes, num_epochs, max_num_samples, max_seq_length, short_seq_prob, seed, min_num_sent
    )
