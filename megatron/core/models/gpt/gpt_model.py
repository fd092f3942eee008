"""GPT: a causal language model, or one pipeline stage of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron.core.config_logger import has_config_logger_enabled, log_config_to_disk
from megatron.core.inference_params import InferenceParams
from megatron.core.models.common.embeddings.language_model_embedding import PositionEmbeddingType
from megatron.core.models.common.embeddings.rotary_pos_embedding import FrequencyScaling
from megatron.core.models.common.language_module.causal_language_model import CausalLanguageModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig


class GPTModel(CausalLanguageModel):
    """Embedding, causal layers, output layer; a stage holds its share of them.

    pre_process: first stage, holds the embedding. post_process: last stage, holds final norm and output
    layer. parallel_output: leave logits cut by vocabulary over tensor parallel ranks. `vocab_size` is the
    padded one.
    """

    def __init__(
        self,
        config: TransformerConfig,
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
        rotary_base: int = 10000,
        seq_len_interpolation_factor: float | None = None,
        *,
        rope_scaling: FrequencyScaling | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(
            config,
            vocab_size=vocab_size,
            max_sequence_length=max_sequence_length,
            pre_process=pre_process,
            post_process=post_process,
            fp16_lm_cross_entropy=fp16_lm_cross_entropy,
            parallel_output=parallel_output,
            share_embeddings_and_output_weights=share_embeddings_and_output_weights,
            position_embedding_type=position_embedding_type,
            rotary_percent=rotary_percent,
            rotary_base=rotary_base,
            seq_len_interpolation_factor=seq_len_interpolation_factor,
            rope_scaling=rope_scaling,
            pg_collection=pg_collection,
        )
        if has_config_logger_enabled(config):
            log_config_to_disk(config, locals())
        self.transformer_layer_spec = transformer_layer_spec
        self.max_position_embeddings = max_sequence_length
        self.rotary_percent = rotary_percent
        self.decoder = TransformerBlock(
            config=config,
            spec=transformer_layer_spec,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
        )
        self._add_output_layer()

    def forward(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        decoder_input: Tensor | None = None,
        labels: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        extra_block_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """Loss per token, logits, or (before the last stage) hidden states.

        input_ids, position_ids, labels [b, s]; attention_mask bool [b or 1, 1, s, s], True = hidden, or None
        for plain causal attention (faster); decoder_input [s/sp, b, h] replaces the embedding. -> [b, s] with
        labels, else [b, s, v] ([b, s, v/tp] with parallel_output), else [s/sp, b, h].
        """
        return self._run(
            input_ids,
            position_ids,
            attention_mask,
            decoder_input,
            labels,
            inference_params,
            packed_seq_params=packed_seq_params,
            **(extra_block_kwargs or {}),
        )
