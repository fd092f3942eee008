"""Base of the datasets that draw samples from one low-level dataset."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from typing import Any

import numpy
import torch

from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.utils import Split
from megatron.core.datasets.utils_s3 import is_object_storage_path

# The low-level datasets in use, IndexedDataset and MockGPTLowLevelDataset, share no base.
LowLevelDataset = Any


class MegatronDataset(ABC, torch.utils.data.Dataset):
    """Samples of one split of one low-level dataset.

    `indices` are the low-level elements of this split, `num_samples` the least number of samples wanted (None:
    one pass). The identifiers, as JSON, are the cache key, so their names and order are part of the format.
    """

    def __init__(
        self,
        dataset: LowLevelDataset,
        dataset_path: str | None,
        indices: numpy.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: BlendedMegatronDatasetConfig,
    ) -> None:
        self.dataset = dataset
        self.dataset_path = dataset_path
        self.indices = indices
        self.num_samples = num_samples
        self.index_split = index_split
        self.config = config
        self.unique_identifiers: OrderedDict[str, Any] = OrderedDict()
        self.unique_identifiers["class"] = type(self).__name__
        self.unique_identifiers["dataset_path"] = dataset_path
        self.unique_identifiers["num_samples"] = num_samples
        self.unique_identifiers["index_split"] = index_split.name
        for attribute in self._key_config_attributes():
            self.unique_identifiers[attribute] = getattr(config, attribute)
        self.unique_description = json.dumps(
            self.unique_identifiers, indent=4, default=lambda value: value.unique_identifiers
        )
        self.unique_description_hash = hashlib.md5(self.unique_description.encode("utf-8")).hexdigest()
        self.built_anew_on_cache_miss = False

    @staticmethod
    @abstractmethod
    def numel_low_level_dataset(low_level_dataset: LowLevelDataset) -> int:
        """Elements that a split divides."""

    @staticmethod
    @abstractmethod
    def build_low_level_dataset(dataset_path: str, config: BlendedMegatronDatasetConfig) -> LowLevelDataset:
        """Open the data at a path prefix."""

    @staticmethod
    def _key_config_attributes() -> list[str]:
        """Config fields that belong to the cache key."""
        return ["random_seed", "sequence_length", "split", "split_matrix", "tokenizer"]

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def __getitem__(self, idx: int) -> dict[str, Any]:
        """Sample idx."""

    def _cache_directory(self) -> str | None:
        """Where this dataset's indices are kept; None if it has no place on a file system."""
        if self.config.path_to_cache:
            return self.config.path_to_cache
        if self.dataset_path is None or is_object_storage_path(self.dataset_path):
            return None
        return os.path.join(self.dataset_path, "cache", f"{type(self).__name__}_indices")
