"""Masked-language samples: spans of whole sentences, and the choice of which tokens are hidden."""

from __future__ import annotations

import itertools
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy

from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.index_builder import build_mapping
from megatron.core.datasets.index_cache import IndexCache
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import LowLevelDataset, MegatronDataset
from megatron.core.datasets.utils import Split
from megatron.core.errors import InvariantError
from megatron.core.utils import log_single_rank

logger = logging.getLogger(__name__)

# Epochs and samples of an index that ends by the other of the two.
_UNBOUNDED_EPOCHS = numpy.iinfo(numpy.int32).max - 1
_UNBOUNDED_SAMPLES = numpy.iinfo(numpy.int64).max - 1

_GEOMETRIC_P = 0.2


@dataclass
class MaskedWordPieceDatasetConfig(BlendedMegatronDatasetConfig):
    """Adds how much is masked and in which units."""

    masking_probability: float | None = None
    """Share of tokens that are masked."""

    short_sequence_probability: float | None = None
    """Share of samples with a random shorter target length."""

    masking_max_ngram: int | None = None
    """Longest n-gram of words masked together."""

    masking_do_full_word: bool | None = None
    """Mask all pieces of a word or none."""

    masking_do_permutation: bool | None = None
    """Also permute as many unmasked tokens."""

    masking_use_longer_ngrams: bool | None = None
    """Prefer longer n-grams instead of shorter ones."""

    masking_use_geometric_distribution: bool | None = None
    """Draw n from a geometric distribution instead of in proportion to 1/n."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [name for name in MaskedWordPieceDatasetConfig.__annotations__ if getattr(self, name) is None]
        if self.tokenizer is None or names:
            missing = ", ".join(["tokenizer"] * (self.tokenizer is None) + names)
            raise InvariantError(missing, "required by masked datasets", "pass it to the dataset config")
        assert self.masking_probability is not None and self.short_sequence_probability is not None, (
            "checked above"
        )
        assert self.masking_max_ngram is not None, "checked above"
        if not 0 < self.masking_probability < 1:
            raise InvariantError(
                "--mask-prob", f"{self.masking_probability} is not between 0 and 1", "for instance 0.15"
            )
        if not 0 <= self.short_sequence_probability <= 1:
            raise InvariantError(
                "--short-seq-prob",
                f"{self.short_sequence_probability} is not within 0 and 1",
                "for instance 0.1",
            )
        if self.masking_max_ngram < 1:
            raise InvariantError(
                "masking_max_ngram", f"{self.masking_max_ngram} is not positive", "for instance 3"
            )
        if self.masking_use_geometric_distribution and self.masking_do_permutation:
            raise InvariantError(
                "masking", "geometric n-grams and permutation exclude each other", "switch one off"
            )


class Masked(NamedTuple):
    """What masking did to a sequence: parallel positions and labels in order, and the spans they came in."""

    token_ids: list[int]
    positions: list[int]
    labels: list[int]
    spans: list[tuple[list[int], list[int]]]


class MaskedWordPieceDataset(MegatronDataset):
    """Spans of sentences of a split of documents, each to be masked by a generator of its own.

    `sample_index` [samples, 3]: first sentence, end sentence, target length.
    """

    config: MaskedWordPieceDatasetConfig

    def __init__(
        self,
        indexed_dataset: LowLevelDataset,
        dataset_path: str | None,
        indexed_indices: numpy.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: MaskedWordPieceDatasetConfig,
    ) -> None:
        super().__init__(indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config)
        assert config.tokenizer is not None, "checked by the config"
        inverse = config.tokenizer.inv_vocab
        self._vocabulary_ids = list(inverse)
        self._continuations = {
            i for i, piece in inverse.items() if isinstance(piece, str) and piece.startswith("##")
        }
        self._boundary_ids = {config.tokenizer.cls, config.tokenizer.sep}
        self._mask_id = config.tokenizer.mask
        self.sample_index = self._build_sample_index()

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: IndexedDataset) -> int:
        """Masked datasets split by document, to keep sentences together."""
        return low_level_dataset.document_indices.shape[0] - 1

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: BlendedMegatronDatasetConfig) -> IndexedDataset:
        """Open the token files at a prefix."""
        return IndexedDataset(dataset_path, mmap=config.mmap_bin_files)

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*MegatronDataset._key_config_attributes(), *MaskedWordPieceDatasetConfig.__annotations__]

    @abstractmethod
    def _target_length_and_sentences(self) -> tuple[int, int]:
        """Tokens that a sample's sentences may have, and the least number of sentences."""

    def __len__(self) -> int:
        return self.sample_index.shape[0]

    def _generator(self, idx: int) -> numpy.random.RandomState:
        """The generator that all random choices of sample idx are drawn from."""
        return numpy.random.RandomState(seed=(self.config.random_seed + int(idx)) % 2**32)

    def _build_sample_index(self) -> numpy.ndarray:
        name = type(self).__name__
        cache = IndexCache(
            self._cache_directory(),
            f"{self.unique_description_hash}-{name}",
            ["sample_index"],
            self.unique_description,
            self.dataset.fingerprint(),
        )
        target_length, min_sentences = self._target_length_and_sentences()

        def build() -> Iterator[tuple[str, numpy.ndarray]]:
            log_single_rank(
                logger, logging.INFO, f"Build and save the {name} {self.index_split.name} indices"
            )
            self.dataset.verify()
            documents = self.dataset.document_indices[numpy.append(self.indices, self.indices[-1:] + 1)]
            yield (
                "sample_index",
                build_mapping(
                    documents.astype(numpy.int64),
                    numpy.array(self.dataset.sequence_lengths),
                    1 if self.num_samples is None else _UNBOUNDED_EPOCHS,
                    _UNBOUNDED_SAMPLES if self.num_samples is None else self.num_samples,
                    target_length,
                    self.config.short_sequence_probability or 0.0,
                    self.config.random_seed,
                    min_sentences,
                ),
            )

        arrays, self.built_anew_on_cache_miss = cache.load_or_build(build)
        log_single_rank(logger, logging.INFO, f"> total number of samples: {arrays['sample_index'].shape[0]}")
        return arrays["sample_index"]

    def _replacement(self, token_id: int, random: numpy.random.RandomState) -> int:
        """The id that hides a masked token: the mask, unless a subclass mixes in others."""
        return self._mask_id

    def _mask(self, token_ids: list[int], target_length: int, random: numpy.random.RandomState) -> Masked:
        """Choose n-grams of words in random order until the budget of masked tokens is used.

        The budget may be a fraction of a token, for a target length of a few tokens, and masks none then.
        """
        probability = self.config.masking_probability
        assert probability is not None, "checked by the config"
        budget = min(probability * target_length, max(1, round(len(token_ids) * probability)))
        sizes = numpy.arange(1, (self.config.masking_max_ngram or 0) + 1)
        weights = 1.0 / sizes
        if self.config.masking_use_longer_ngrams:
            weights = weights[::-1]
        weights = weights / weights.sum(keepdims=True)

        def weighted() -> int:
            return int(random.choice(sizes, p=weights))

        def weighted_globally() -> int:
            # The choice of n-grams to permute has always come from numpy's global generator.
            return int(numpy.random.choice(sizes, p=weights))

        def geometric() -> int:
            return min(int(random.geometric(_GEOMETRIC_P)), int(sizes[-1]))

        words = self._words(token_ids)
        ngrams = [[words[start : start + n] for n in sizes] for start in range(len(words))]
        random.shuffle(ngrams)
        masked = list(token_ids)
        used: set[int] = set()
        originals: dict[int, int] = {}
        spans: list[tuple[list[int], list[int]]] = []
        draw = geometric if self.config.masking_use_geometric_distribution else weighted
        for positions in _choose_ngrams(ngrams, budget, used, draw):
            for position in positions:
                originals[position] = token_ids[position]
                masked[position] = self._replacement(token_ids[position], random)
            spans.append((positions, [token_ids[position] for position in positions]))
        # Drawn even where its result is not used, so that all samples of a seed agree on what comes after.
        random.shuffle(ngrams)
        if self.config.masking_do_permutation:
            permuted: list[int] = []
            for positions in _choose_ngrams(ngrams, budget, used, weighted_globally):
                permuted.extend(positions)
            permuted.sort()
            sources = list(permuted)
            random.shuffle(sources)
            before = list(masked)
            for position, source in zip(permuted, sources):
                originals[position] = before[position]
                masked[position] = before[source]
        positions = sorted(originals)
        spans.sort(key=lambda span: span[0][0])
        return Masked(masked, positions, [originals[position] for position in positions], spans)

    def _words(self, token_ids: list[int]) -> list[list[int]]:
        """Positions that are masked together: of whole words, or of single pieces; none of cls and sep."""
        words: list[list[int]] = []
        for position, token_id in enumerate(token_ids):
            if token_id in self._boundary_ids:
                continue
            if self.config.masking_do_full_word and words and token_id in self._continuations:
                words[-1].append(position)
            else:
                words.append([position])
        return words


def _choose_ngrams(
    ngrams: list[list[list[list[int]]]], budget: float, used: set[int], draw: Callable[[], int]
) -> Iterator[list[int]]:
    """Positions of one n-gram after the other, none twice, up to `budget` positions in all; extends `used`.

    ngrams: per starting word its n-grams of 1, 2 .. words, each a list of words, each a list of positions.
    """
    taken = 0
    for candidates in ngrams:
        if taken >= budget:
            return
        n = min(draw(), len(candidates))
        positions = list(itertools.chain.from_iterable(candidates[n - 1]))
        while n > 1 and taken + len(positions) > budget:
            n -= 1
            positions = list(itertools.chain.from_iterable(candidates[n - 1]))
        if taken + len(positions) > budget or not used.isdisjoint(positions):
            continue
        used.update(positions)
        taken += len(positions)
        yield positions


def padded(values: list[int], length: int, fill: int) -> numpy.ndarray:
    """`values` and then `fill` up to `length`: int64 [length]."""
    array: Any = numpy.full(length, fill, dtype=numpy.int64)
    array[: len(values)] = values
    return array
