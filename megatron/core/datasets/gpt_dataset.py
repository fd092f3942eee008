"""Samples for next-token prediction: fixed-length windows over shuffled documents."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
from megatron.core.datasets.index_builder import build_sample_idx, count_samples
from megatron.core.datasets.index_cache import IndexCache
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import LowLevelDataset, MegatronDataset
from megatron.core.datasets.megatron_tokenizer import MegatronTokenizer
from megatron.core.datasets.packing import document_attention_mask, document_position_ids
from megatron.core.datasets.utils import Split
from megatron.core.datasets.utils_s3 import S3Config
from megatron.core.errors import DataError, InvariantError
from megatron.core.utils import log_single_rank

logger = logging.getLogger(__name__)

# Stands for padding where the tokenizer has no padding token: an id that no vocabulary contains.
_NO_PAD_TOKEN = -1


@dataclass
class GPTDatasetConfig(BlendedMegatronDatasetConfig):
    """Adds what happens at document ends and sequence ends."""

    reset_position_ids: bool | None = None
    """Count positions from zero in every document."""

    reset_attention_mask: bool | None = None
    """Let no token see the documents before its own."""

    eod_mask_loss: bool | None = None
    """Leave out the loss where the input is the end-of-document token."""

    create_attention_mask: bool = True
    """Put an attention mask [1, s, s] into each sample."""

    drop_last_partial_validation_sequence: bool = True
    """Drop the tail of the validation split that fills no sequence; the other splits always drop it."""

    add_extra_token_to_sequence: bool = True
    """Read one token more than the sequence, so that the last position has a label."""

    s3_cache_path: str | None = None
    """Directory for the index files of datasets in object storage."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tokenizer", "reset_position_ids", "reset_attention_mask", "eod_mask_loss"):
            if getattr(self, name) is None:
                raise InvariantError(name, "is required by GPT datasets", f"pass {name}= to GPTDatasetConfig")


class GPTDataset(MegatronDataset):
    """Windows of `sequence_length` tokens over the documents of a split, in shuffled order.

    Three arrays say what sample k is: `document_index` int32 [documents x epochs], shuffled sequence ids;
    `sample_index` int64 [samples + 1, 2], where each window begins; `shuffle_index` [samples], the order of the
    windows. The number of samples is that of whole epochs, so it may exceed `num_samples`.
    """

    config: GPTDatasetConfig

    def __init__(
        self,
        indexed_dataset: LowLevelDataset,
        dataset_path: str | None,
        indexed_indices: numpy.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: GPTDatasetConfig,
    ) -> None:
        super().__init__(indexed_dataset, dataset_path, indexed_indices, num_samples, index_split, config)
        self._resets = (config.reset_position_ids, config.reset_attention_mask, config.eod_mask_loss)
        self._plain_masks: tuple[Tensor | None, Tensor, Tensor] | None = None
        self._pad_token_id = self._optional_token("pad", default=_NO_PAD_TOKEN)
        self._vocab_size = self._optional_token("vocab_size", default=None)
        self._extra = int(config.add_extra_token_to_sequence)
        self._drop_last = index_split != Split.valid or config.drop_last_partial_validation_sequence
        self.document_index, self.sample_index, self.shuffle_index = self._indices()

    def _optional_token(self, name: str, default: Any) -> Any:
        try:
            return getattr(self.config.tokenizer, name)
        except (NotImplementedError, AttributeError):
            return default

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: IndexedDataset) -> int:
        """GPT splits by sequence, which for its preprocessing is by document."""
        return low_level_dataset.sequence_lengths.shape[0]

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: BlendedMegatronDatasetConfig) -> LowLevelDataset:
        """Open the token files at a prefix."""
        assert isinstance(config, GPTDatasetConfig), "GPTDataset is built with a GPTDatasetConfig"
        cache = S3Config(path_to_idx_cache=config.s3_cache_path)
        return IndexedDataset(dataset_path, multimodal=False, mmap=config.mmap_bin_files, s3_config=cache)

    def __len__(self) -> int:
        return self.shuffle_index.shape[0]

    def __getitem__(self, idx: int | None) -> dict[str, Tensor]:
        """Sample idx: `tokens`, `labels` and `position_ids` int64 [s], `loss_mask` float32 [s], and, unless
        switched off, `attention_mask` bool [1, s, s] (True is masked). None gives sample 0 without any loss.
        """
        text = self._window(0 if idx is None else idx)
        pad = self._pad_token_id
        if self._extra:
            tokens, labels = text[:-1].contiguous(), text[1:].contiguous()
        else:
            tokens, labels = text, torch.roll(text, shifts=-1, dims=0)
            labels[-1] = pad
        attention_mask, loss_mask, position_ids = self._masks(tokens)
        loss_mask[labels == pad] = 0.0
        tokens[tokens == pad] = 0
        labels[labels == pad] = 0
        if idx is None:
            loss_mask = torch.zeros_like(loss_mask)
        sample = {"tokens": tokens, "labels": labels}
        if attention_mask is not None:
            sample["attention_mask"] = attention_mask
        return {**sample, "loss_mask": loss_mask, "position_ids": position_ids}

    def _masks(self, tokens: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Attention mask, loss mask and positions; the loss mask is the caller's to change."""
        config = self.config
        if any(self._resets) or self._plain_masks is None:
            assert config.tokenizer is not None, "GPTDatasetConfig requires a tokenizer"
            masks = _get_ltor_masks_and_position_ids(
                tokens, config.tokenizer.eod, *self._resets, config.create_attention_mask
            )
            if any(self._resets):
                return masks
            self._plain_masks = masks
        attention_mask, loss_mask, position_ids = self._plain_masks
        return attention_mask, loss_mask.clone(), position_ids

    def _window(self, idx: int) -> Tensor:
        """The tokens of window shuffle_index[idx], int64 [s + extra], padded on the right."""
        window = self.shuffle_index[idx]
        first, first_offset = self.sample_index[window]
        last, last_offset = self.sample_index[window + 1]
        end = int(last_offset) + self._extra
        if first == last:
            offset = int(first_offset)
            parts = [self.dataset.get(self.document_index[first], offset=offset, length=end - offset)]
        else:
            parts = [self.dataset.get(self.document_index[first], offset=int(first_offset))]
            parts += [self.dataset.get(self.document_index[i]) for i in range(first + 1, last)]
            parts.append(self.dataset.get(self.document_index[last], length=end))
        wanted = self.config.sequence_length + self._extra
        text = numpy.full(wanted, self._pad_token_id, dtype=numpy.int64)
        size = sum(part.size for part in parts)
        numpy.concatenate(parts, out=text[:size], casting="same_kind")
        self._check_vocabulary(text[:size])
        return torch.from_numpy(text)

    def _check_vocabulary(self, text: numpy.ndarray) -> None:
        if (
            self._vocab_size is not None
            and text.size
            and not 0 <= text.min() <= text.max() < self._vocab_size
        ):
            raise DataError(
                str(self.dataset_path),
                f"holds token ids {text.min()} to {text.max()}, the tokenizer has {self._vocab_size} ids",
                "train with the tokenizer that the data was preprocessed with",
            )

    def _indices(self) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
        split, name = self.index_split.name, type(self).__name__
        cache = IndexCache(
            self._cache_directory(),
            f"{self.unique_description_hash}-{name}-{split}",
            ["document_index", "sample_index", "shuffle_index"],
            self.unique_description,
            self._fingerprint(),
        )
        arrays, self.built_anew_on_cache_miss = cache.load_or_build(self._build_indices, self._check_indices)
        if not self.built_anew_on_cache_miss:
            log_single_rank(logger, logging.INFO, f"Load the {name} {split} indices")
        samples = arrays["shuffle_index"].shape[0]
        log_single_rank(logger, logging.INFO, f"> total number of samples: {samples}")
        if self.built_anew_on_cache_miss:
            epochs = arrays["document_index"].size // self.indices.size
            log_single_rank(logger, logging.INFO, f"> total number of epochs: {epochs}")
        return arrays["document_index"], arrays["sample_index"], arrays["shuffle_index"]

    def _fingerprint(self) -> dict[str, int | str | bool]:
        """The data files, and the settings that change the indices but are not part of the description."""
        data = self.dataset.fingerprint() if isinstance(self.dataset, IndexedDataset) else {}
        return {**data, "add_extra_token_to_sequence": bool(self._extra), "drop_last": self._drop_last}

    def _tokens_per_epoch(self) -> int:
        return int(self.dataset.sequence_lengths[self.indices].sum(dtype=numpy.int64))

    def _check_indices(self, arrays: Mapping[str, numpy.ndarray]) -> str | None:
        """Why indices from elsewhere cannot belong to this dataset, or None."""
        documents, tokens = arrays["document_index"], self._tokens_per_epoch()
        epochs = self._num_epochs(tokens)
        samples = count_samples(epochs * tokens, self.config.sequence_length, self._drop_last, self._extra)
        wanted = (epochs * self.indices.size, (samples + 1, 2), samples)
        found = (documents.size, arrays["sample_index"].shape, arrays["shuffle_index"].size)
        if wanted != found:
            return f"documents, sample rows and samples should be {wanted} and are {found}"
        if documents.size and (documents.min() < self.indices.min() or documents.max() > self.indices.max()):
            return f"it names sequences {documents.min()} to {documents.max()}, outside this split"
        return None

    def _build_indices(self) -> Iterator[tuple[str, numpy.ndarray]]:
        """Documents, windows and their order, drawn from one generator in this order."""
        config = self.config
        log_single_rank(
            logger, logging.INFO, f"Build and save the {type(self).__name__} {self.index_split.name} indices"
        )
        if isinstance(self.dataset, IndexedDataset):
            self.dataset.verify()
        tokens = self._tokens_per_epoch()
        if tokens <= self._extra:
            raise DataError(
                str(self.dataset_path),
                f"the {self.index_split.name} split holds {tokens} tokens in {self.indices.size} sequences",
                "give the split a larger share with --split, or add data",
            )
        epochs = self._num_epochs(tokens)
        separate_final_epoch, samples_before_final = self._final_epoch(tokens, epochs)
        random = numpy.random.RandomState(config.random_seed)
        documents = _shuffled_documents(self.indices, epochs, separate_final_epoch, random)
        yield "document_index", documents
        # A copy, because the file's lengths are not aligned in memory.
        lengths = numpy.array(self.dataset.sequence_lengths, dtype=numpy.int32)
        windows = build_sample_idx(
            lengths, documents, config.sequence_length, epochs, tokens, self._drop_last, self._extra
        )
        samples = windows.shape[0] - 1
        yield "sample_index", windows
        del documents, lengths, windows
        yield (
            "shuffle_index",
            _shuffled_samples(samples_before_final if separate_final_epoch else 0, samples, random),
        )

    def _num_epochs(self, tokens: int) -> int:
        """The least number of passes over the split that yields `num_samples`."""
        if self.num_samples is None:
            return 1
        wanted = self.num_samples * self.config.sequence_length + self._extra
        return max(1, -(-wanted // tokens))

    def _final_epoch(self, tokens: int, epochs: int) -> tuple[bool, int]:
        """Whether the last epoch is shuffled by itself, and the number of samples before it.

        It is if less than 80% of it is wanted: mixed in with the others, part of every epoch would go unseen.
        """
        if epochs == 1 or self.num_samples is None:
            return False, 0
        length = self.config.sequence_length
        before = ((epochs - 1) * tokens - self._extra) // length
        wanted = self.num_samples - before
        per_epoch = (tokens - self._extra) // length
        assert 0 <= wanted <= per_epoch + 1, f"the last of {epochs} epochs cannot give {wanted} samples"
        return wanted < int(0.80 * per_epoch), before


def _shuffled_documents(
    indices: numpy.ndarray, epochs: int, separate_final_epoch: bool, random: numpy.random.RandomState
) -> numpy.ndarray:
    """`indices` once per epoch, int32: shuffled over all epochs, or over all but the last and then the last."""
    together = epochs - 1 if separate_final_epoch else epochs
    documents = numpy.tile(indices.astype(numpy.int32), epochs)
    random.shuffle(documents[: together * indices.size])
    if separate_final_epoch:
        random.shuffle(documents[together * indices.size :])
    return documents


def _shuffled_samples(first: int, samples: int, random: numpy.random.RandomState) -> numpy.ndarray:
    """The numbers below `samples`: those below `first` shuffled, then the rest shuffled."""
    order = numpy.arange(samples, dtype=numpy.int64 if samples >= 2**32 - 2 else numpy.uint32)
    if first:
        random.shuffle(order[:first])
    random.shuffle(order[first:])
    return order


def _get_ltor_masks_and_position_ids(
    data: Tensor,
    eod_token: int,
    reset_position_ids: bool | None,
    reset_attention_mask: bool | None,
    eod_mask_loss: bool | None,
    create_attention_mask: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """data [s] -> attention mask bool [1, s, s] (True is masked) or None, loss mask float32 [s], positions [s]."""
    length = data.numel()
    attention_mask = None
    if create_attention_mask:
        if reset_attention_mask:
            attention_mask = document_attention_mask(data, eod_token).unsqueeze(0)
        else:
            attention_mask = ~torch.ones((1, length, length), dtype=torch.bool).tril()
    loss_mask = torch.ones(length, dtype=torch.float)
    if eod_mask_loss:
        loss_mask[data == eod_token] = 0.0
    if reset_position_ids:
        position_ids = document_position_ids(data, eod_token)
    else:
        position_ids = torch.arange(length, dtype=torch.long)
    return attention_mask, loss_mask, position_ids


class MockGPTLowLevelDataset:
    """100,000 counting sequences of 1 to 4095 tokens: 1, 2, 3 .. and the end-of-document token."""

    seed: int = 0
    size: int = 100000
    max_sequence_length: int = 4096

    def __init__(self, tokenizer: MegatronTokenizer) -> None:
        self.tokenizer = tokenizer
        self._vocab_size = tokenizer.vocab_size
        random = numpy.random.default_rng(seed=self.seed)
        self.sequence_lengths = random.integers(
            low=1, high=self.max_sequence_length, size=self.size, dtype=numpy.int32
        )

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, idx: int) -> numpy.ndarray:
        """Sequence idx, int64; ids wrap around in a vocabulary that is smaller than the sequence."""
        length = int(self.sequence_lengths[idx])
        counting = numpy.arange(1, length, dtype=numpy.int64) % self._vocab_size
        return numpy.append(counting, self.tokenizer.eod)

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> numpy.ndarray:
        """`length` tokens of sequence idx from token `offset`; to its end if length is None."""
        return self[idx][offset : None if length is None else offset + length]


class MockGPTDataset(GPTDataset):
    """A GPTDataset over synthetic sequences."""

    def __init__(
        self,
        dataset: MockGPTLowLevelDataset,
        dataset_path: str | None,
        indices: numpy.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: GPTDatasetConfig,
    ) -> None:
        # Only to keep the classic parameter names, which differ from the base class's.
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: LowLevelDataset) -> int:
        """Number of sequences."""
        return len(low_level_dataset)

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: BlendedMegatronDatasetConfig) -> LowLevelDataset:
        """The synthetic sequences; the path is not used."""
        assert config.tokenizer is not None, "GPTDatasetConfig requires a tokenizer"
        return MockGPTLowLevelDataset(config.tokenizer)
