"""From path prefixes, weights and splits to the train, valid and test datasets of every rank."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy

from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.blended_megatron_dataset_config import (
    Blend,
    BlendedMegatronDatasetConfig,
    Span,
)
from megatron.core.datasets.coordination import build_in_turns, heartbeat
from megatron.core.datasets.megatron_dataset import LowLevelDataset, MegatronDataset
from megatron.core.datasets.utils import Split, normalize
from megatron.core.errors import DataError, InvariantError
from megatron.core.utils import log_single_rank

logger = logging.getLogger(__name__)

T = TypeVar("T")
MidLevel = MegatronDataset | None
TopLevel = MegatronDataset | BlendedDataset | None

# Opening a dataset, or writing the indices of a small one, waits for the file system; this many at once hide it.
_WAITERS = 16
# Sequences and samples up to which a dataset is small: the indices of so many at once need little memory.
_SMALL = 1 << 20
# Half a percent more of each dataset than its weight asks, so that rounding never runs a blend dry.
_SAMPLE_MARGIN = 1.005


class BlendedMegatronDatasetBuilder:
    """Builds the datasets of class `cls` that `config` describes, with at least `sizes` samples per split.

    Collective: all ranks of the world construct and call `build`; those where `is_built_on_rank()` is false get
    None in place of every dataset. Global rank 0 must build, because it fills the cache for the others.
    """

    def __init__(
        self,
        cls: type[MegatronDataset],
        sizes: Sequence[int | None],
        is_built_on_rank: Callable[[], bool],
        config: BlendedMegatronDatasetConfig,
    ) -> None:
        if len(sizes) != len(Split):
            raise InvariantError("sizes", f"{len(sizes)} sizes for {len(Split)} splits", None)
        self.cls, self.sizes, self.is_built_on_rank, self.config = cls, list(sizes), is_built_on_rank, config
        log_single_rank(
            logger,
            logging.INFO,
            f"Building dataset splits with cls={cls.__name__}, sizes={self.sizes}, and config={config}",
        )

    def build(self) -> list[TopLevel]:
        """The train, valid and test datasets; None for a split that has no share or no data."""
        config = self.config
        if config.mock or config.blend is not None:
            assert config.split_matrix is not None, (
                "a config with one source for all splits has a split matrix"
            )
            return self._build_source(config.blend, config.split_matrix, self.sizes)
        assert config.blend_per_split is not None, "a config has blend, blend_per_split or mock"
        datasets: list[TopLevel] = []
        for split, blend in zip(Split, config.blend_per_split):
            if blend is None:
                datasets.append(None)
                continue
            spans: list[Span] = [(0.0, 1.0) if other == split else None for other in Split]
            sizes = [size if other == split else 0 for other, size in zip(Split, self.sizes)]
            prefixes, weights = blend
            # One prefix that is a whole split needs no blend around it, whatever its weight.
            source = (prefixes, None) if len(prefixes) == 1 else (prefixes, weights)
            datasets.append(self._build_source(source, spans, sizes)[split.value])
        return datasets

    def _build_source(
        self, blend: Blend | None, spans: Sequence[Span], sizes: Sequence[int | None]
    ) -> list[TopLevel]:
        """The datasets of one source for the splits that have a span."""
        prefixes, weights = ([None], None) if blend is None else blend
        wanted = self.is_built_on_rank()
        if len(prefixes) == 1 and weights is None:
            single = build_in_turns(lambda: self._build_single(prefixes[0], spans, sizes), wanted)
            return [None] * len(Split) if single is None else list(single)
        sizes_per_prefix = _sizes_per_prefix(len(prefixes), weights, sizes)
        built = build_in_turns(lambda: self._build_prefixes(prefixes, spans, sizes_per_prefix), wanted)
        blends: list[TopLevel] = []
        for split, span in zip(Split, spans):
            if span is None:
                blends.append(None)
                continue
            blends.append(
                build_in_turns(
                    partial(self._build_blend, split, prefixes, weights, sizes_per_prefix, built), wanted
                )
            )
        return blends

    def _build_single(
        self, prefix: str | None, spans: Sequence[Span], sizes: Sequence[int | None]
    ) -> list[MidLevel]:
        """The splits of the only source; stops if training has no data, and says so for the others."""
        datasets = self._build_prefixes([prefix], spans, [sizes])[0]
        for split, span, size, dataset in zip(Split, spans, sizes, datasets):
            if dataset is None and span is not None:
                _require_train_data(split, str(prefix))
                log_single_rank(
                    logger,
                    logging.WARNING,
                    f"The {split.name} split of {prefix}, {span} of its documents, rounds to none: "
                    "there will be no such dataset. Give it a larger share with --split to have one",
                )
            elif dataset is not None and len(dataset) == 0 and size != 0:
                raise DataError(
                    str(prefix),
                    f"the {split.name} split is smaller than one sample of {self.config.sequence_length} tokens",
                    "give it a larger share with --split, or add data",
                )
        return datasets

    def _build_blend(
        self,
        split: Split,
        prefixes: Sequence[str | None],
        weights: Sequence[float] | None,
        sizes_per_prefix: Sequence[Sequence[int | None]],
        built: Sequence[Sequence[MidLevel]] | None,
    ) -> BlendedDataset | None:
        """Mix one split of several prefixes; those without a sample in it are left out, which is said."""
        assert built is not None, "blends are built where their datasets are"
        size = self.sizes[split.value]
        members = [
            i
            for i in range(len(prefixes))
            if (dataset := built[i][split.value]) is not None and (len(dataset) or size == 0)
        ]
        if len(members) < len(prefixes):
            empty = [str(prefixes[i]) for i in range(len(prefixes)) if i not in members]
            log_single_rank(
                logger,
                logging.WARNING,
                f"{len(empty)} of {len(prefixes)} datasets have no sample in the {split.name} split "
                f"and are left out of its blend: {', '.join(empty[:5])}{' ..' if len(empty) > 5 else ''}",
            )
        datasets = [dataset for i in members if (dataset := built[i][split.value]) is not None]
        if not datasets:
            _require_train_data(split, ", ".join(map(str, prefixes)))
            return None
        if weights is None:
            lengths = [len(dataset) for dataset in datasets]
            return BlendedDataset(
                datasets, lengths, None if size is None else min(size, sum(lengths)), self.config
            )
        counts = [count for i in members if (count := sizes_per_prefix[i][split.value]) is not None]
        shares: Sequence[float] = (
            counts if self.config.renormalize_blend_weights else [weights[i] for i in members]
        )
        return BlendedDataset(datasets, normalize(shares), sum(counts), self.config)

    def _build_prefixes(
        self,
        prefixes: Sequence[str | None],
        spans: Sequence[Span],
        sizes_per_prefix: Sequence[Sequence[int | None]],
    ) -> list[list[MidLevel]]:
        """Per prefix, its datasets of the three splits.

        Many files are opened at a time, the indices of many small datasets are built at a time, those of large ones
        as `num_dataset_builder_threads` says.
        """

        def open_prefix(i: int) -> LowLevelDataset:
            return self.cls.build_low_level_dataset(prefixes[i], self.config)  # type: ignore[arg-type]

        def build_prefix(i: int) -> list[MidLevel]:
            return [
                self._build_split(opened[i], prefixes[i], split, span, size)
                for split, span, size in zip(Split, spans, sizes_per_prefix[i])
            ]

        def is_small(i: int) -> bool:
            samples = [size for size in sizes_per_prefix[i] if size is not None]
            return max([self.cls.numel_low_level_dataset(opened[i]), *samples]) <= _SMALL

        threads = self.config.num_dataset_builder_threads
        everyone = range(len(prefixes))
        opened = _in_parallel(open_prefix, everyone, _WAITERS, "opened")
        small = [i for i in everyone if is_small(i)]
        large = [i for i in everyone if not is_small(i)]
        built = dict(zip(small, _in_parallel(build_prefix, small, max(threads, _WAITERS), "built")))
        built.update(zip(large, _in_parallel(build_prefix, large, threads, "built")))
        return [built[i] for i in everyone]

    def _build_split(
        self, low_level: LowLevelDataset, prefix: str | None, split: Split, span: Span, size: int | None
    ) -> MidLevel:
        """One split of one prefix; None if the split has no share or its share rounds to nothing."""
        if span is None:
            return None
        elements = self.cls.numel_low_level_dataset(low_level)
        if elements == 0:
            raise DataError(
                f"{prefix}.idx", "holds no documents", "check the input of tools/preprocess_data.py"
            )
        indices = numpy.arange(round(span[0] * elements), round(span[1] * elements), dtype=numpy.int32)
        if indices.size == 0:
            return None
        return self.cls(low_level, prefix, indices, size, split, self.config)

    @staticmethod
    def build_generic_dataset(
        cls: Callable[..., T], is_built_on_rank: Callable[[], bool], synchronize_ranks: bool, *args: Any
    ) -> T | None:
        """`cls(*args)` where `is_built_on_rank()`; rank 0 first, if all ranks call and `synchronize_ranks` is set."""
        if synchronize_ranks:
            return build_in_turns(lambda: cls(*args), is_built_on_rank())
        return cls(*args) if is_built_on_rank() else None


def _require_train_data(split: Split, source: str) -> None:
    if split == Split.train:
        raise DataError(
            source, "the train split is empty", "give it a larger share with --split, or add data"
        )


def _sizes_per_prefix(
    prefixes: int, weights: Sequence[float] | None, sizes: Sequence[int | None]
) -> list[list[int | None]]:
    """Samples to build per prefix and split: its weighted share and a margin; None without weights: one epoch."""
    if weights is None:
        return [[None] * len(sizes) for _ in range(prefixes)]
    if any(size is None for size in sizes):
        raise InvariantError("sizes", f"{list(sizes)}: a weighted blend needs the size of every split", None)
    return [
        [math.ceil(size * weight * _SAMPLE_MARGIN) for size in sizes if size is not None]
        for weight in normalize(weights)
    ]


def _in_parallel(work: Callable[[int], T], members: Sequence[int], threads: int, verb: str) -> list[T]:
    """`[work(i) for i in members]` on so many threads, with a line every ten seconds on how far it is."""
    results: list[T] = []
    with heartbeat(logger, lambda: f"{verb} {len(results)} of {len(members)} datasets"):
        if min(len(members), threads) <= 1:
            for i in members:
                results.append(work(i))
            return results
        with ThreadPoolExecutor(min(len(members), threads)) as pool:
            for result in pool.map(work, members):
                results.append(result)
    return results
