"""BERT with one linear layer on its pooled first token: classes of a text, or the best of several texts."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron.core.dist_checkpointing import load_tensors_metadata
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.bert.bert_model import BertEncoder
from megatron.core.models.bert.pooler import Pooler
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import derived, get_linear_layer
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.checkpointing import checkpoint_exists, find_checkpoint_rank_0
from megatron.training.checkpointing.layout import read_tracker
from megatron.training.utils import print_rank_last
from pretrain_bert import layer_spec

#: What a pretrained BERT has on top and a finetuned one has not.
_HEADS_OF_PRETRAINING = ("lm_head.", "output_layer.", "binary_head.")


class BertWithHead(BertEncoder):
    """An encoder with pooler, dropout and a linear layer of `num_outputs`, all three on the last stage.

    It loads the checkpoint of a pretrained BERT, whose own heads it leaves out, as well as its own. `head_is_new` says that
    the checkpoint about to be loaded in torch_dist format has no such layer; files of the torch format say so themselves.
    """

    head = "head"

    def __init__(self, config: TransformerConfig, num_outputs: int, **encoder: Any) -> None:
        super().__init__(config, num_tokentypes=2, **encoder)
        self.head_is_new = False
        if self.pre_process:
            self.embedding.word_embeddings.weight.is_embedding_or_output_parameter = True
        if self.post_process:
            self.pooler = Pooler(
                config.hidden_size, derived(config.init_method), config, config.sequence_parallel
            )
            self.head_dropout = torch.nn.Dropout(config.hidden_dropout)
            layer = get_linear_layer(
                config.hidden_size, num_outputs, config.init_method, config.perform_initialization
            )
            self.add_module(self.head, layer)

    def forward(
        self, tokens: Tensor | None, padding_mask: Tensor, tokentype_ids: Tensor | None = None
    ) -> Tensor:
        """tokens, padding_mask (1 = token), tokentype_ids [b, s] -> [b, num_outputs]; hidden [s/sp, b, h] before the end."""
        hidden = self.encode(tokens, padding_mask, tokentype_ids)
        if not self.post_process:
            return hidden
        return self.get_submodule(self.head)(self.head_dropout(self.pooler(hidden, 0)))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """As every module's; without the last layer where that is new."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        new = f"{prefix}{self.head}."
        return {
            key: value for key, value in sharded.items() if not (self.head_is_new and key.startswith(new))
        }

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load without the heads of pretraining; a last layer that is missing keeps its random weights, which is said."""
        weights = {
            key: value for key, value in state_dict.items() if not key.startswith(_HEADS_OF_PRETRAINING)
        }
        own = {key: value for key, value in self.state_dict().items() if key.startswith(f"{self.head}.")}
        if own.keys() - weights.keys():
            print_rank_last(
                f"***WARNING*** could not find {self.head} in the checkpoint, initializing to random"
            )
            weights = {**own, **weights}
        return super().load_state_dict(weights, strict=strict, assign=assign)


class Classification(BertWithHead):
    """Which of `num_outputs` classes: [b, s] -> [b, classes]."""

    head = "classification_head"


class MultipleChoice(BertWithHead):
    """Which of four texts: the rows of a sample follow each other, [b * 4, s] -> [b, 4]."""

    head = "multichoice_head"
    num_choices = 4

    def __init__(self, config: TransformerConfig, **encoder: Any) -> None:
        super().__init__(config, 1, **encoder)

    def forward(
        self, tokens: Tensor | None, padding_mask: Tensor, tokentype_ids: Tensor | None = None
    ) -> Tensor:
        """tokens, padding_mask, tokentype_ids [b * 4, s] -> [b, 4]; hidden [s/sp, b * 4, h] before the end."""
        output = super().forward(tokens, padding_mask, tokentype_ids)
        return output.view(-1, self.num_choices) if self.post_process else output


def encoder_arguments(args: Namespace, pre_process: bool, post_process: bool) -> dict[str, Any]:
    """What the command line says about a stage of the encoder."""
    return {
        "config": core_transformer_config_from_args(args),
        "transformer_layer_spec": layer_spec(args),
        "vocab_size": args.padded_vocab_size,
        "max_sequence_length": args.max_position_embeddings,
        "pre_process": pre_process,
        "post_process": post_process,
        "position_embedding_type": args.position_embedding_type,
        "rotary_percent": args.rotary_percent,
        "seq_len_interpolation_factor": args.rotary_seq_len_interpolation_factor,
    }


def lacks_head(directory: str | None, head: str) -> bool:
    """Whether the newest checkpoint in `directory` is in torch_dist format and has no layer of this name."""
    if directory is None or not checkpoint_exists(directory):
        return False
    tracked = read_tracker(directory)
    found = find_checkpoint_rank_0(directory, tracked.iteration, tracked.release)
    return found is not None and Path(found).is_dir() and f"{head}.weight" not in load_tensors_metadata(found)
