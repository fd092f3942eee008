"""BERT samples: two runs of sentences, in order or swapped, with masked words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from megatron.core.datasets.masked_dataset import MaskedWordPieceDataset, MaskedWordPieceDatasetConfig, padded
from megatron.core.errors import InvariantError


@dataclass
class BERTMaskedWordPieceDatasetConfig(MaskedWordPieceDatasetConfig):
    """Adds the sentence-order task."""

    classification_head: bool | None = None
    """Make pairs of sentence runs and swap half of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classification_head is None:
            raise InvariantError("classification_head", "is required by BERT datasets", "pass True or False")


class BERTMaskedWordPieceDataset(MaskedWordPieceDataset):
    """`[cls] A [sep] B [sep]` with about 15% of the words masked, of which 80% show the mask, 10% another word."""

    config: BERTMaskedWordPieceDatasetConfig

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*MaskedWordPieceDataset._key_config_attributes(), "classification_head"]

    def _target_length_and_sentences(self) -> tuple[int, int]:
        return self.config.sequence_length - 3, 2 if self.config.classification_head else 1

    def __getitem__(self, idx: int) -> dict[str, int | numpy.ndarray]:
        """Sample idx. int64 [s]: `text`, `types` (1 in B), `labels` (-1 where nothing is masked), `padding_mask`
        (1 on tokens), `loss_mask` (1 where masked). int: `is_random` (swapped), `truncated`.
        """
        first, end, target_length = (int(value) for value in self.sample_index[idx])
        random = self._generator(idx)
        sentences = [self.dataset[i] for i in range(first, end)]
        pivot, is_random = len(sentences), False
        if self.config.classification_head:
            assert len(sentences) > 1, "the sample index gives every row two sentences"
            pivot = int(random.randint(1, len(sentences))) if len(sentences) > 2 else 1
            is_random = bool(random.random() < 0.5)
        part_a = [int(token) for sentence in sentences[:pivot] for token in sentence]
        part_b = [int(token) for sentence in sentences[pivot:] for token in sentence]
        if is_random:
            part_a, part_b = part_b, part_a
        truncated = _truncate_pair(part_a, part_b, target_length, random)

        tokenizer = self.config.tokenizer
        assert tokenizer is not None, "checked by the config"
        token_ids = [tokenizer.cls, *part_a, tokenizer.sep]
        types = [0] * len(token_ids)
        if part_b:
            token_ids += [*part_b, tokenizer.sep]
            types += [1] * (len(part_b) + 1)
        masked = self._mask(token_ids, target_length, random)

        length = self.config.sequence_length
        labels = numpy.full(length, -1, dtype=numpy.int64)
        labels[masked.positions] = masked.labels
        loss_mask = numpy.zeros(length, dtype=numpy.int64)
        loss_mask[masked.positions] = 1
        return {
            "text": padded(masked.token_ids, length, tokenizer.pad),
            "types": padded(types, length, 0),
            "labels": labels,
            "is_random": int(is_random),
            "padding_mask": padded([1] * len(token_ids), length, 0),
            "loss_mask": loss_mask,
            "truncated": int(truncated),
        }

    def _replacement(self, token_id: int, random: numpy.random.RandomState) -> int:
        """The mask, a word drawn from the vocabulary, or the word itself: 80, 10 and 10 percent."""
        if random.random() < 0.8:
            return self._mask_id
        if random.random() >= 0.5:
            return self._vocabulary_ids[random.randint(0, len(self._vocabulary_ids))]
        return token_id


def _truncate_pair(
    part_a: list[int], part_b: list[int], target_length: int, random: numpy.random.RandomState
) -> bool:
    """Remove tokens from either end of the longer part, at random, until both fit; whether any was removed."""
    excess = len(part_a) + len(part_b) - target_length
    for _ in range(excess):
        longer = part_a if len(part_a) > len(part_b) else part_b
        if random.random() < 0.5:
            del longer[0]
        else:
            del longer[-1]
    return excess > 0
