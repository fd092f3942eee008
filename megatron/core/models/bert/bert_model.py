"""BERT: a bidirectional encoder, alone or with masked-word and sentence-order heads; or one pipeline stage of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.core import tensor_parallel
from megatron.core.config_logger import has_config_logger_enabled, log_config_to_disk
from megatron.core.enums import ModelType
from megatron.core.errors import InvariantError
from megatron.core.fp8 import in_high_precision
from megatron.core.inference_params import InferenceParams
from megatron.core.models.bert.bert_lm_head import BertLMHead
from megatron.core.models.bert.pooler import Pooler
from megatron.core.models.common.embeddings.language_model_embedding import PositionEmbeddingType
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import derived, get_linear_layer
from megatron.core.utils import get_te_version

__all__ = ["BertEncoder", "BertModel", "get_te_version"]


class BertEncoder(LanguageModule):
    """Embedding and bidirectional layers; a stage holds its share of them. What stands on top is a subclass's."""

    share_embeddings_and_output_weights = False

    def __init__(
        self,
        config: TransformerConfig,
        num_tokentypes: int,
        transformer_layer_spec: ModuleSpec,
        vocab_size: int,
        max_sequence_length: int,
        pre_process: bool = True,
        post_process: bool = True,
        *,
        position_embedding_type: PositionEmbeddingType = "learned_absolute",
        rotary_percent: float = 1.0,
        seq_len_interpolation_factor: float | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config, pg_collection=pg_collection)
        self.transformer_layer_spec = transformer_layer_spec
        self.pre_process = pre_process
        self.post_process = post_process
        self.model_type = ModelType.encoder_or_decoder
        self._add_embeddings(
            vocab_size,
            max_sequence_length,
            position_embedding_type,
            rotary_percent=rotary_percent,
            seq_len_interpolation_factor=seq_len_interpolation_factor,
            num_tokentypes=num_tokentypes,
        )
        self.encoder = TransformerBlock(
            config=config,
            spec=transformer_layer_spec,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
        )

    def bert_extended_attention_mask(self, attention_mask: Tensor) -> Tensor:
        """attention_mask [b, s], 1 = token -> bool [b, 1, s, s], True where query or key is padding."""
        tokens = attention_mask > 0.5
        return ~(tokens.unsqueeze(1) & tokens.unsqueeze(2)).unsqueeze(1)

    def bert_position_ids(self, token_ids: Tensor) -> Tensor:
        """token_ids [b, s] -> positions 0 .. s-1 for each sample, [b, s]."""
        return torch.arange(token_ids.size(1), device=token_ids.device).expand_as(token_ids)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take the previous stage's output [s/sp, b, h], alone or as a list of one."""
        if isinstance(input_tensor, list):
            if len(input_tensor) != 1:
                raise InvariantError(
                    "set_input_tensor", f"a BERT stage takes one input tensor, not {len(input_tensor)}"
                )
            input_tensor = input_tensor[0]
        self.encoder.set_input_tensor(input_tensor)

    def encode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor,
        tokentype_ids: Tensor | None = None,
        inference_params: InferenceParams | None = None,
    ) -> Tensor:
        """input_ids, tokentype_ids [b, s], attention_mask [b, s] with 1 = token -> hidden states [s/sp, b, h]."""
        hidden = None
        if self.pre_process and input_ids is not None:
            positions = self.bert_position_ids(input_ids)
            hidden = self.embedding(input_ids=input_ids, position_ids=positions, tokentype_ids=tokentype_ids)
        return self.encoder(
            hidden_states=hidden,
            attention_mask=self._mask_if_padded(attention_mask),
            inference_params=inference_params,
            rotary_pos_emb=self._angles(inference_params, self.encoder, hidden),
        )

    def _mask_if_padded(self, attention_mask: Tensor) -> Tensor | None:
        """The extended mask, or None for a batch on the CPU without padding (elsewhere looking would mean
        waiting).
        """
        if attention_mask.device.type == "cpu" and bool((attention_mask > 0.5).all()):
            return None
        return self.bert_extended_attention_mask(attention_mask)


class BertModel(BertEncoder):
    """Embedding, bidirectional layers, heads; a stage holds its share of them.

    The word head predicts masked words; the binary head tells from the pooled first token whether two
    sentences follow each other. `num_tokentypes` is 2 with the binary head, else 0. `return_embeddings` gives
    one vector per sample instead: the mean over its tokens without the first and last ([CLS], [SEP]).
    """

    def __init__(
        self,
        config: TransformerConfig,
        num_tokentypes: int,
        transformer_layer_spec: ModuleSpec,
        vocab_size: int,
        max_sequence_length: int,
        pre_process: bool = True,
        post_process: bool = True,
        fp16_lm_cross_entropy: bool = False,
        parallel_output: bool = True,
        share_embeddings_and_output_weights: bool = False,
        position_embedding_type: PositionEmbeddingType = "learned_absolute",
        rotary_percent: float = 1.0,
        seq_len_interpolation_factor: float | None = None,
        add_binary_head: bool = True,
        return_embeddings: bool = False,
        *,
        pg_collection: Any = None,
    ) -> None:
        if has_config_logger_enabled(config):
            log_config_to_disk(config, locals())
        if return_embeddings and not (post_process and add_binary_head):
            raise InvariantError(
                "return_embeddings",
                "is for the last stage of a model with a binary head",
                "set post_process and add_binary_head",
            )
        super().__init__(
            config,
            num_tokentypes,
            transformer_layer_spec,
            vocab_size,
            max_sequence_length,
            pre_process,
            post_process,
            position_embedding_type=position_embedding_type,
            rotary_percent=rotary_percent,
            seq_len_interpolation_factor=seq_len_interpolation_factor,
            pg_collection=pg_collection,
        )
        self.fp16_lm_cross_entropy = fp16_lm_cross_entropy
        self.parallel_output = parallel_output
        self.share_embeddings_and_output_weights = share_embeddings_and_output_weights
        self.add_binary_head = add_binary_head
        self.return_embeddings = return_embeddings
        if post_process:
            self.lm_head = BertLMHead(config.hidden_size, config)
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                vocab_size,
                config=in_high_precision(config),
                init_method=derived(config.init_method),
                bias=True,
                skip_bias_add=False,
                gather_output=not parallel_output,
                skip_weight_param_allocation=pre_process and share_embeddings_and_output_weights,
                pg_collection=pg_collection,
            )
            self.binary_head = None
            if add_binary_head:
                self.binary_head = get_linear_layer(
                    config.hidden_size, 2, config.init_method, config.perform_initialization
                )
                self.pooler = Pooler(
                    config.hidden_size, derived(config.init_method), config, config.sequence_parallel
                )
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def forward(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor,
        tokentype_ids: Tensor | None = None,
        lm_labels: Tensor | None = None,
        inference_params: InferenceParams | None = None,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Losses and head outputs, or (before the last stage) hidden states.

        input_ids, tokentype_ids, lm_labels [b, s], attention_mask [b, s] with 1 = token. -> (loss per token
        [b, s], or without labels logits [b, s, v/tp]; sentence-order logits [b, 2] or None), or [s/sp, b, h],
        or embeddings [b, h].
        """
        hidden = self.encode(input_ids, attention_mask, tokentype_ids, inference_params)
        if not self.post_process:
            return hidden
        if self.return_embeddings:
            return self._mean_of_tokens(hidden, attention_mask)

        binary_logits = self.binary_head(self.pooler(hidden, 0)) if self.binary_head is not None else None
        weight = (
            self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        )
        logits, _ = self.output_layer(self.lm_head(hidden), weight=weight)  # [s, b, v/tp]
        if lm_labels is None:
            return logits.transpose(0, 1).contiguous(), binary_logits
        return self.compute_language_model_loss(lm_labels, logits), binary_logits

    def _mean_of_tokens(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """hidden [s/sp, b, h], attention_mask [b, s] -> fp32 [b, h]: mean over tokens 1 .. length-2 of
        each sample.
        """
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False
            )
        lengths = attention_mask.sum(dim=1)
        position = torch.arange(hidden.size(0), device=hidden.device).unsqueeze(1)
        inner = ((position >= 1) & (position < lengths - 1)).unsqueeze(-1)  # [s, b, 1]
        return (hidden.float() * inner).sum(0) / inner.sum(0)
