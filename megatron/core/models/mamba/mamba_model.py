"""A causal language model of Mamba, attention and MLP layers, or one pipeline stage of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron.core.config_logger import has_config_logger_enabled, log_config_to_disk
from megatron.core.inference_params import InferenceParams
from megatron.core.models.common.embeddings.language_model_embedding import PositionEmbeddingType
from megatron.core.models.common.language_module.causal_language_model import CausalLanguageModel
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig


class MambaModel(CausalLanguageModel):
    """Embedding, hybrid stack, output layer; a stage holds its share of them.

    `mamba_stack_spec` describes the stack, ratios and pattern its layers (see `allocate_layers`); the rest is as of a
    GPTModel. Without position embeddings, the default, order enters through the Mamba layers.
    """

    def __init__(
        self,
        config: TransformerConfig,
        mamba_stack_spec: ModuleSpec,
        vocab_size: int,
        max_sequence_length: int,
        mamba_ssm_ngroups: int = 8,
        pre_process: bool = True,
        hybrid_attention_ratio: float = 0.0,
        hybrid_mlp_ratio: float = 0.0,
        hybrid_override_pattern: str | None = None,
        post_process: bool = True,
        fp16_lm_cross_entropy: bool = False,
        parallel_output: bool = True,
        share_embeddings_and_output_weights: bool = False,
        position_embedding_type: PositionEmbeddingType = "none",
        rotary_percent: float = 1.0,
        rotary_base: int = 10000,
        seq_len_interpolation_factor: float | None = None,
        *,
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
            pg_collection=pg_collection,
        )
        if has_config_logger_enabled(config):
            log_config_to_disk(config, locals())
        self.mamba_stack_spec = mamba_stack_spec
        self.hybrid_attention_ratio = hybrid_attention_ratio
        self.hybrid_mlp_ratio = hybrid_mlp_ratio
        self.hybrid_override_pattern = hybrid_override_pattern
        self.decoder = build_module(
            mamba_stack_spec,
            config,
            mamba_ssm_ngroups=mamba_ssm_ngroups,
            pre_process=pre_process,
            hybrid_attention_ratio=hybrid_attention_ratio,
            hybrid_mlp_ratio=hybrid_mlp_ratio,
            hybrid_override_pattern=hybrid_override_pattern,
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
    ) -> Tensor:
        """Loss per token, logits, or (before the last stage) hidden states.

        input_ids, position_ids, labels [b, s]; attention_mask bool [b or 1, 1, s, s], True = hidden, or None for plain
        causal attention; decoder_input [s/sp, b, h] replaces the embedding. -> [b, s] with labels, else [b, s, v]
        ([b, s, v/tp] with parallel_output), else [s/sp, b, h].
        """
        return self._run(input_ids, position_ids, attention_mask, decoder_input, labels, inference_params)
