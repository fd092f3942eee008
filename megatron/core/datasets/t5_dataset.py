"""T5 samples: spans replaced by sentinels in the encoder input, and spelled out for the decoder."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy

from megatron.core.datasets.masked_dataset import (
    Masked,
    MaskedWordPieceDataset,
    MaskedWordPieceDatasetConfig,
    padded,
)
from megatron.core.errors import DataError, InvariantError


@dataclass
class T5MaskedWordPieceDatasetConfig(MaskedWordPieceDatasetConfig):
    """Adds the decoder's length; the encoder's is `sequence_length`."""

    sequence_length_encoder: int | None = field(init=False, default=None)
    """The same as `sequence_length`."""

    sequence_length_decoder: int | None = None
    """Tokens of the decoder input."""

    create_attention_masks: bool = True
    """Put the three attention masks, which are large and follow from the tokens, into every sample."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sequence_length_encoder = self.sequence_length
        if self.sequence_length_decoder is None:
            raise InvariantError("--decoder-seq-length", "is required by T5 datasets", "for instance 128")
        if not getattr(self.tokenizer, "additional_special_tokens_ids", None):
            raise InvariantError(
                "--vocab-extra-ids",
                "T5 marks masked spans with extra ids, the tokenizer has none",
                "for instance --vocab-extra-ids 100",
            )


class T5MaskedWordPieceDataset(MaskedWordPieceDataset):
    """Whole sentences with about 15% of the tokens masked in spans."""

    config: T5MaskedWordPieceDatasetConfig

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*MaskedWordPieceDataset._key_config_attributes(), "sequence_length_decoder"]

    def _target_length_and_sentences(self) -> tuple[int, int]:
        return self.config.sequence_length - 2, 1

    def __getitem__(self, idx: int) -> dict[str, int | numpy.ndarray]:
        """Sample idx, e tokens for the encoder and d for the decoder. int64: `text_enc` [e]; `text_dec`, `labels`
        (-1 in the padding), `loss_mask` [d]; 1 where attention is allowed: `enc_mask` [e, e], `dec_mask` [d, d],
        `enc_dec_mask` [d, e]. int: `truncated`.
        """
        first, end, target_length = (int(value) for value in self.sample_index[idx])
        token_ids = [int(token) for i in range(first, end) for token in self.dataset[i]]
        masked = self._mask(token_ids[:target_length], target_length, self._generator(idx))
        encoder, spelled_out = self._with_sentinels(masked)

        tokenizer = self.config.tokenizer
        assert tokenizer is not None and self.config.sequence_length_decoder is not None, (
            "checked by the config"
        )
        decoder = [tokenizer.bos, *spelled_out]
        encoder_length, decoder_length = self.config.sequence_length, self.config.sequence_length_decoder
        for name, ids, length in (("encoder", encoder, encoder_length), ("decoder", decoder, decoder_length)):
            if len(ids) > length:
                raise DataError(
                    f"{self.dataset_path}",
                    f"sample {idx} needs {len(ids)} {name} tokens and --{name}-seq-length is {length}",
                    f"raise --{name}-seq-length, or lower --mask-prob",
                )
        text_enc = padded(encoder, encoder_length, tokenizer.pad)
        text_dec = padded(decoder, decoder_length, tokenizer.pad)
        sample: dict[str, int | numpy.ndarray] = {
            "text_enc": text_enc,
            "text_dec": text_dec,
            "labels": padded([*spelled_out, tokenizer.eos], decoder_length, -1),
            "loss_mask": padded([1] * len(decoder), decoder_length, 0),
            "truncated": int(len(token_ids) > target_length),
        }
        if self.config.create_attention_masks:
            sample["enc_mask"] = _visible(text_enc, text_enc)
            sample["dec_mask"] = numpy.tril(_visible(text_dec, text_dec))
            sample["enc_dec_mask"] = _visible(text_dec, text_enc)
        return sample

    def _with_sentinels(self, masked: Masked) -> tuple[list[int], list[int]]:
        """The text with a sentinel for each span, and each sentinel followed by what it stands for."""
        sentinels = self.config.tokenizer.additional_special_tokens_ids  # type: ignore[union-attr]
        if len(masked.spans) > len(sentinels):
            raise DataError(
                f"{self.dataset_path}",
                f"a sample has {len(masked.spans)} masked spans and the tokenizer {len(sentinels)} extra ids",
                "raise --vocab-extra-ids",
            )
        encoder: list[int] = []
        spelled_out: list[int] = []
        begin = 0
        for sentinel, (positions, labels) in zip(sentinels, masked.spans):
            encoder += [*masked.token_ids[begin : positions[0]], sentinel]
            spelled_out += [sentinel, *labels]
            begin = positions[-1] + 1
        return encoder + masked.token_ids[begin:], spelled_out


def _visible(rows: numpy.ndarray, columns: numpy.ndarray) -> numpy.ndarray:
    """1 where both tokens are real, which is an id of 1 or more: int64 [rows, columns]."""
    return ((rows >= 1)[:, None] & (columns >= 1)[None, :]).astype(numpy.int64)
