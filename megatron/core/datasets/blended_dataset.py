"""A weighted mixture of datasets, itself a dataset."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy
import torch

from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.index_builder import blend_datasets
from megatron.core.datasets.index_cache import IndexCache
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import normalize
from megatron.core.errors import BlendError, InvariantError
from megatron.core.utils import log_single_rank

logger = logging.getLogger(__name__)

_MAX_DATASETS = 32767


class BlendedDataset(torch.utils.data.Dataset):
    """`size` samples drawn from `datasets` so that every prefix of them follows the weights.

    With `size` None the weights are the integer numbers of samples to take from each dataset. Sample k is
    `dataset_sample_index[k]` (int64) of dataset `dataset_index[k]` (int16).
    """

    def __init__(
        self,
        datasets: Sequence[MegatronDataset],
        weights: Sequence[float] | Sequence[int],
        size: int | None,
        config: BlendedMegatronDatasetConfig,
    ) -> None:
        self._check(datasets, weights, size)
        self.datasets = list(datasets)
        self.split = datasets[0].index_split
        self.weights = list(weights) if size is None else normalize(weights)
        self.size = size
        self.config = config
        self.unique_identifiers: OrderedDict[str, Any] = OrderedDict()
        self.unique_identifiers["class"] = type(self).__name__
        self.unique_identifiers["datasets"] = [dataset.unique_identifiers for dataset in self.datasets]
        self.unique_identifiers["split"] = self.split.name
        self.unique_identifiers["weights"] = self.weights
        self.unique_identifiers["size"] = self.size
        self.unique_identifiers["renormalize_blend_weights"] = config.renormalize_blend_weights
        self.unique_description = json.dumps(
            self.unique_identifiers, indent=4, default=lambda value: value.unique_identifiers
        )
        self.unique_description_hash = hashlib.md5(self.unique_description.encode("utf-8")).hexdigest()
        self.built_anew_on_cache_miss = False
        self.dataset_index, self.dataset_sample_index = self._build_indices()

    @staticmethod
    def _check(datasets: Sequence[MegatronDataset], weights: Sequence[float], size: int | None) -> None:
        if not 0 < len(datasets) < _MAX_DATASETS:
            raise InvariantError(
                "blend", f"{len(datasets)} datasets; 1 to {_MAX_DATASETS - 1} can be blended", None
            )
        if len(weights) != len(datasets):
            raise InvariantError(
                "blend weights", f"{len(weights)} weights for {len(datasets)} datasets", None
            )
        if len({type(dataset) for dataset in datasets}) > 1 or len({d.index_split for d in datasets}) > 1:
            raise InvariantError("blend", "the datasets are not of one class and one split", None)
        if any(weight <= 0 for weight in weights) or len({type(weight) for weight in weights}) > 1:
            raise InvariantError(
                "blend weights",
                f"{list(weights)} are not all positive numbers of one type",
                "drop the datasets of weight zero",
            )
        if size is None and not all(weight == int(weight) for weight in weights):
            raise InvariantError("blend weights", "without a size they are sample counts, so integers", None)
        if len(datasets) == 1:
            log_single_rank(logger, logging.WARNING, "Building a BlendedDataset for a single MegatronDataset")

    def __len__(self) -> int:
        return self.dataset_index.shape[0]

    def __getitem__(self, idx: int) -> dict[str, Any]:
        """Sample idx, with the number of its dataset as `dataset_id`."""
        dataset_id = self.dataset_index[idx]
        return {"dataset_id": dataset_id, **self.datasets[dataset_id][self.dataset_sample_index[idx]]}

    def _build_indices(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        cache = IndexCache(
            self.config.path_to_cache,
            f"{self.unique_description_hash}-{type(self).__name__}-{self.split.name}",
            ["dataset_index", "dataset_sample_index"],
            self.unique_description,
            {"lengths": hashlib.md5(repr([len(dataset) for dataset in self.datasets]).encode()).hexdigest()},
        )

        def build() -> Iterator[tuple[str, numpy.ndarray]]:
            if self.size is None:
                dataset_index, sample_index = blend_datasets(
                    numpy.array(self.weights, dtype=numpy.int64) / sum(self.weights),
                    int(sum(self.weights)),
                    limits=numpy.array(self.weights, dtype=numpy.int64),
                )
            else:
                dataset_index, sample_index = blend_datasets(numpy.array(self.weights), self.size)
            self._check_use(dataset_index)
            yield "dataset_index", dataset_index
            yield "dataset_sample_index", sample_index

        arrays, self.built_anew_on_cache_miss = cache.load_or_build(build)
        log_single_rank(
            logger, logging.INFO, f"> {type(self).__name__} length: {arrays['dataset_index'].shape[0]}"
        )
        return arrays["dataset_index"], arrays["dataset_sample_index"]

    def _check_use(self, dataset_index: numpy.ndarray) -> None:
        used = numpy.bincount(dataset_index, minlength=len(self.datasets))
        for dataset, count in zip(self.datasets, used):
            if count > len(dataset):
                raise BlendError(
                    str(dataset.dataset_path),
                    f"The {self.split.name} blend oversamples (N = {count}) this dataset of {len(dataset)} samples",
                    "Set renormalize_blend_weights to True (--renormalize-blend-weights) and re-run",
                )
