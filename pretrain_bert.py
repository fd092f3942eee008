"""Pretrain a BERT: `torchrun --nproc-per-node N pretrain_bert.py <flags>`; plain `python pretrain_bert.py` is one rank.

What makes this a BERT run is here: the model, the data, the batch, the losses. The loop is in
megatron/training/training.py.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron.core import parallel_state
from megatron.core.datasets.bert_dataset import BERTMaskedWordPieceDataset, BERTMaskedWordPieceDatasetConfig
from megatron.core.enums import ModelType
from megatron.core.models.bert.bert_layer_specs import (
    bert_layer_local_spec,
    bert_layer_with_transformer_engine_spec,
)
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.straggler import StragglerDetector
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.training import get_args, get_timers, get_tokenizer, pretrain
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.batch import get_fields_on_this_tp_rank
from megatron.training.cli import run_main
from megatron.training.config import rules
from megatron.training.datasets import build_splits, source_fields
from megatron.training.losses import check_loss, in_full_precision
from megatron.training.specs import named_spec
from megatron.training.utils import average_losses_across_data_parallel_group, print_rank_0

#: What a sample holds of use to the model, in the order `get_batch` returns it.
_FIELDS = ("text", "types", "is_random", "loss_mask", "labels", "padding_mask")

BertOutput = tuple[Tensor, Tensor | None]
BertLoss = tuple[Tensor, dict[str, Tensor]]


def model_provider(pre_process: bool = True, post_process: bool = True) -> BertModel:
    """The layers of this pipeline stage; with the embedding if `pre_process`, with the heads if `post_process`."""
    args = get_args()
    rules.check(args, rules.BERT)
    print_rank_0("building BERT model ...")
    return BertModel(
        config=core_transformer_config_from_args(args),
        # Only the sentence-order task has two kinds of tokens.
        num_tokentypes=2 if args.bert_binary_head else 0,
        transformer_layer_spec=layer_spec(args),
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
        add_binary_head=args.bert_binary_head,
    )


def layer_spec(args: Namespace) -> ModuleSpec:
    """What a layer is made of: `--spec MODULE NAME`, else by `--transformer-impl`."""
    if args.spec not in (None, ["local"]):
        return named_spec(args.spec)
    if args.transformer_impl == "transformer_engine" and args.spec is None:
        return bert_layer_with_transformer_engine_spec
    return bert_layer_local_spec


def get_batch(data_iterator: Iterator[dict[str, Tensor]] | None) -> tuple[Tensor, ...]:
    """tokens, types, sentence_order [b], loss_mask, labels, padding_mask; all but one int64 [b, s].

    Every stage needs the padding mask, so every stage reads.
    """
    batch = get_fields_on_this_tp_rank(data_iterator, _FIELDS)
    return tuple(batch[key] for key in _FIELDS)


def loss_func(loss_mask: Tensor, sentence_order: Tensor, output_tensor: BertOutput) -> BertLoss:
    """The loss of a micro-batch, and its parts averaged over data-parallel ranks for the log.

    The mean over masked words of `output_tensor[0]` [b, s], plus (with the binary head) the cross entropy of the order
    logits `output_tensor[1]` [b, 2] against sentence_order [b]. All ranks of the data-parallel group must call.
    """
    per_token, order_logits = output_tensor
    per_token = in_full_precision(per_token)
    mask = loss_mask.to(per_token.dtype)
    # Very short samples may have nothing masked: such a micro-batch teaches no words.
    loss = lm_loss = (per_token * mask).sum() / mask.sum().clamp_min(1)
    parts = {"lm loss": lm_loss}
    if order_logits is not None:
        parts["sop loss"] = cross_entropy(in_full_precision(order_logits), sentence_order, ignore_index=-1)
        loss = lm_loss + parts["sop loss"]
    check_loss(loss, " + ".join(parts))
    averages = average_losses_across_data_parallel_group(list(parts.values()))
    return loss, dict(zip(parts, averages))


def forward_step(
    data_iterator: Iterator[dict[str, Tensor]] | None, model: BertModel
) -> tuple[BertOutput | Tensor, Callable[[BertOutput], BertLoss]]:
    """One micro-batch: loss per token and order logits on the last stage, hidden states [s/sp, b, h] before it."""
    timers, stragglers = get_timers(), StragglerDetector()
    timers("batch-generator", log_level=2).start()
    with stragglers(bdata=True):
        tokens, types, sentence_order, loss_mask, labels, padding_mask = get_batch(data_iterator)
    timers("batch-generator").stop()
    tokentypes = types if get_args().bert_binary_head else None
    with stragglers:
        output = model(tokens, padding_mask, tokentype_ids=tokentypes, lm_labels=labels)
    return output, partial(loss_func, loss_mask, sentence_order)


def is_dataset_built_on_rank() -> bool:
    """Ranks that read data: the first of each tensor-parallel group, on every pipeline stage."""
    return parallel_state.get_tensor_model_parallel_rank() == 0


def train_valid_test_datasets_provider(train_val_test_num_samples: tuple[int, int, int]) -> list[Any]:
    """Train, validation and test datasets with at least these many samples."""
    args = get_args()
    config = BERTMaskedWordPieceDatasetConfig(
        sequence_length=args.seq_length,
        **source_fields(args, get_tokenizer()),
        masking_probability=args.mask_prob,
        short_sequence_probability=args.short_seq_prob,
        masking_max_ngram=3,
        masking_do_full_word=True,
        masking_do_permutation=False,
        masking_use_longer_ngrams=False,
        masking_use_geometric_distribution=False,
        classification_head=args.bert_binary_head,
    )
    return build_splits(
        "BERT", BERTMaskedWordPieceDataset, train_val_test_num_samples, is_dataset_built_on_rank, config
    )


def run() -> None:
    """Pretrain as the command line says."""
    train_valid_test_datasets_provider.is_distributed = True  # type: ignore[attr-defined]
    pretrain(
        train_valid_test_datasets_provider,
        model_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        args_defaults={"tokenizer_type": "BertWordPieceLowerCase"},
        model_name="BERT",
    )


def main() -> None:
    """Entry point of `pretrain-bert`."""
    run_main(run)


if __name__ == "__main__":
    main()
