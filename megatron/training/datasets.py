"""What the dataset providers of the entry scripts share."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.utils import get_blend_from_list
from megatron.core.errors import FlagError
from megatron.training.utils import print_rank_0


def source_fields(args: Namespace, tokenizer: Any) -> dict[str, Any]:
    """The fields of every dataset configuration that say where samples come from and how their order is found.

    FlagError with `--dataloader-type external`, which is for providers that return iterators.
    """
    if args.dataloader_type == "external":
        raise FlagError(
            "--dataloader-type external",
            "the samples of this script come from datasets, not from an iterator of yours",
            "drop it, or call pretrain() with a provider that returns iterators",
        )
    per_split = (args.train_data_path, args.valid_data_path, args.test_data_path)
    return {
        "random_seed": args.seed,
        "blend": get_blend_from_list(args.data_path),
        "blend_per_split": [get_blend_from_list(paths) for paths in per_split],
        "renormalize_blend_weights": args.renormalize_blend_weights,
        "split": args.split,
        "num_dataset_builder_threads": args.num_dataset_builder_threads,
        "path_to_cache": args.data_cache_path,
        "mmap_bin_files": args.mmap_bin_files,
        "tokenizer": tokenizer,
    }


def build_splits(
    family: str,
    dataset: type,
    sizes: tuple[int, int, int],
    is_built_on_rank: Callable[[], bool],
    config: BlendedMegatronDatasetConfig,
) -> list[Any]:
    """Train, validation and test datasets of a model family; None where this rank reads no data. All ranks call."""
    print_rank_0(f"> building train, validation, and test datasets for {family} ...")
    splits = BlendedMegatronDatasetBuilder(dataset, list(sizes), is_built_on_rank, config).build()
    print_rank_0(f"> finished creating {family} datasets ...")
    return splits
