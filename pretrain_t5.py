"""Pretrain a T5: `torchrun --nproc-per-node N pretrain_t5.py <flags>`; plain `python pretrain_t5.py` is one rank.

What makes this a T5 run is here: the model, the data, the batch, where embeddings live. The loop is in
megatron/training/training.py.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron.core import parallel_state
from megatron.core.datasets.t5_dataset import T5MaskedWordPieceDataset, T5MaskedWordPieceDatasetConfig
from megatron.core.enums import ModelType
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.models.T5.t5_spec import (
    decoder_model_with_local_spec,
    decoder_model_with_transformer_engine_default_spec,
    encoder_model_with_local_spec,
    encoder_model_with_transformer_engine_default_spec,
)
from megatron.core.straggler import StragglerDetector
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import get_args, get_timers, get_tokenizer, pretrain
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.batch import get_fields_on_this_tp_rank
from megatron.training.cli import run_main
from megatron.training.config import build, rules
from megatron.training.datasets import build_splits, source_fields
from megatron.training.losses import masked_token_loss
from megatron.training.utils import print_rank_0

#: What a sample holds of use to the model.
_FIELDS = ("text_enc", "text_dec", "labels", "loss_mask")


def model_provider(
    pre_process: bool = True, post_process: bool = True, add_encoder: bool = True, add_decoder: bool = True
) -> T5Model:
    """The layers of this pipeline stage.

    `pre_process`: with the embedding, on the first stage of the encoder and of the decoder. `post_process`: with the output
    layer, on the last stage of either.
    """
    args = get_args()
    rules.check(args, rules.T5)
    print_rank_0("building T5 model ...")
    encoder_config, decoder_config = configs(args)
    encoder_spec, decoder_spec = layer_specs(args)
    return T5Model(
        config=decoder_config,
        encoder_config=encoder_config,
        transformer_encoder_layer_spec=encoder_spec,
        transformer_decoder_layer_spec=decoder_spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        add_encoder=add_encoder,
        add_decoder=add_decoder,
    )


def configs(args: Namespace) -> tuple[TransformerConfig, TransformerConfig]:
    """Of the encoder and of the decoder: each has its own number of layers and of pipeline stages."""
    depth = args.num_layers if args.decoder_num_layers is None else args.decoder_num_layers
    decoder = core_transformer_config_from_args(Namespace(**{**vars(args), "num_layers": depth}))
    return build.encoder_config(args, decoder), decoder


def layer_specs(args: Namespace) -> tuple[ModuleSpec, ModuleSpec]:
    """What a layer of the encoder and of the decoder is made of, by `--transformer-impl`."""
    if args.transformer_impl == "transformer_engine":
        return (
            encoder_model_with_transformer_engine_default_spec(),
            decoder_model_with_transformer_engine_default_spec(),
        )
    return encoder_model_with_local_spec(), decoder_model_with_local_spec()


def get_batch(data_iterator: Iterator[dict[str, Tensor]] | None) -> tuple[Tensor | None, ...]:
    """tokens_enc [b, e], tokens_dec, loss_mask, labels [b, d] and the masks enc_mask, dec_mask, enc_dec_mask.

    Masks are bool [b, query, key] with True = hidden; they follow from the padding (id 0) and are made here, which is much
    cheaper than to load them. dec_mask is None, "look left": the decoder's padding is at the end, where no real token
    looks. Every stage reads, since every stage attends.
    """
    batch = get_fields_on_this_tp_rank(data_iterator, _FIELDS)
    encoder, decoder = batch["text_enc"] >= 1, batch["text_dec"] >= 1
    return (
        batch["text_enc"],
        batch["text_dec"],
        batch["loss_mask"],
        batch["labels"],
        hidden_pairs(encoder, encoder),
        None,
        hidden_pairs(decoder, encoder),
    )


def hidden_pairs(queries: Tensor, keys: Tensor) -> Tensor:
    """Which tokens are real: bool [b, query] and [b, key] -> bool [b, query, key], True where either is padding."""
    return ~(queries.unsqueeze(2) & keys.unsqueeze(1))


def forward_step(
    data_iterator: Iterator[dict[str, Tensor]] | None, model: T5Model
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """One micro-batch: loss per token [b, d] on the last stage, hidden states [s/sp, b, h] before it."""
    timers, stragglers = get_timers(), StragglerDetector()
    timers("batch-generator", log_level=2).start()
    with stragglers(bdata=True):
        tokens_enc, tokens_dec, loss_mask, labels, enc_mask, dec_mask, enc_dec_mask = get_batch(data_iterator)
    timers("batch-generator").stop()
    with stragglers:
        output = model(tokens_enc, tokens_dec, enc_mask, dec_mask, enc_dec_mask, lm_labels=labels)
    assert isinstance(loss_mask, torch.Tensor), "only dec_mask may be None"
    return output, partial(masked_token_loss, loss_mask)


def is_dataset_built_on_rank() -> bool:
    """Ranks that read data: the first of each tensor-parallel group, on every pipeline stage."""
    return parallel_state.get_tensor_model_parallel_rank() == 0


def train_valid_test_datasets_provider(train_val_test_num_samples: tuple[int, int, int]) -> list[Any]:
    """Train, validation and test datasets with at least these many samples."""
    args = get_args()
    config = T5MaskedWordPieceDatasetConfig(
        sequence_length=args.encoder_seq_length,
        sequence_length_decoder=args.decoder_seq_length,
        **source_fields(args, get_tokenizer()),
        masking_probability=args.mask_prob,
        short_sequence_probability=args.short_seq_prob,
        masking_max_ngram=10,
        masking_do_full_word=True,
        masking_do_permutation=False,
        masking_use_longer_ngrams=False,
        masking_use_geometric_distribution=True,
        create_attention_masks=False,
    )
    return build_splits(
        "T5", T5MaskedWordPieceDataset, train_val_test_num_samples, is_dataset_built_on_rank, config
    )


def t5_embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """Ranks of a pipeline that hold the word embedding or its tied copy: the encoder's first, the decoder's ends."""
    return _ranks_of_stages(pp_ranks, {0, get_args().encoder_pipeline_model_parallel_size, len(pp_ranks) - 1})


def t5_position_embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """Ranks of a pipeline that hold position embeddings: the encoder's first and the decoder's first."""
    return _ranks_of_stages(pp_ranks, {0, get_args().encoder_pipeline_model_parallel_size})


def _ranks_of_stages(pp_ranks: list[int], stages: set[int]) -> list[int]:
    return [rank for stage, rank in enumerate(pp_ranks) if stage in stages]


def run() -> None:
    """Pretrain as the command line says."""
    train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]
    pretrain(
        train_valid_test_datasets_provider,
        model_provider,
        ModelType.encoder_and_decoder,
        forward_step,
        args_defaults={"tokenizer_type": "BertWordPieceLowerCase"},
        model_name="T5",
        get_embedding_ranks=t5_embedding_ranks,
        get_position_embedding_ranks=t5_position_embedding_ranks,
    )


def main() -> None:
    """Entry point of `pretrain-t5`."""
    run_main(run)


if __name__ == "__main__":
    main()
