"""A causal language model of Mamba, attention and MLP layers, or one pipeline stage of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from megatron.core import tensor_parallel
from megatron.core.config_logger import has_config_logger_enabled, log_config_to_disk
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.enums import ModelType
from megatron.core.errors import InvariantError
from megatron.core.inference_params import InferenceParams
from megatron.core.models.common.embeddings.language_model_embedding import (
    LanguageModelEmbedding,
    PositionEmbeddingType,
)
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt.gpt_model import unless_plainly_causal
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import derived


class MambaModel(LanguageModule):
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
        super().__init__(config, pg_collection=pg_collection)
        if has_config_logger_enabled(config):
            log_config_to_disk(config, locals())
        self.mamba_stack_spec = mamba_stack_spec
        self.vocab_size = vocab_size
        self.max_sequence_length = max_sequence_length
        self.hybrid_attention_ratio = hybrid_attention_ratio
        self.hybrid_mlp_ratio = hybrid_mlp_ratio
        self.hybrid_override_pattern = hybrid_override_pattern
        self.pre_process = pre_process
        self.post_process = post_process
        self.fp16_lm_cross_entropy = fp16_lm_cross_entropy
        self.parallel_output = parallel_output
        self.share_embeddings_and_output_weights = share_embeddings_and_output_weights
        self.position_embedding_type = position_embedding_type
        self.model_type = ModelType.encoder_or_decoder

        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=vocab_size,
                max_sequence_length=max_sequence_length,
                position_embedding_type=position_embedding_type,
                pg_collection=pg_collection,
            )
        if position_embedding_type == "rope":
            self.rotary_pos_emb = RotaryEmbedding(
                kv_channels=derived(config.kv_channels),
                rotary_percent=rotary_percent,
                rotary_interleaved=config.rotary_interleaved,
                seq_len_interpolation_factor=seq_len_interpolation_factor,
                rotary_base=rotary_base,
                use_cpu_initialization=config.use_cpu_initialization,
                pg_collection=pg_collection,
            )
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
        if post_process:
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                vocab_size,
                config=config,
                init_method=derived(config.init_method),
                bias=False,
                skip_bias_add=False,
                gather_output=not parallel_output,
                skip_weight_param_allocation=pre_process and share_embeddings_and_output_weights,
                pg_collection=pg_collection,
            )
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take the previous stage's output [s/sp, b, h], alone or as a list of one."""
        if isinstance(input_tensor, list):
            if len(input_tensor) != 1:
                raise InvariantError(
                    "set_input_tensor", f"a stage takes one input tensor, not {len(input_tensor)}"
                )
            input_tensor = input_tensor[0]
        self.decoder.set_input_tensor(input_tensor)

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
        if decoder_input is None and self.pre_process:
            decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids)
        rotary_pos_emb = None
        if self.position_embedding_type == "rope":
            length = self.rotary_pos_emb.get_rotary_seq_len(
                inference_params, self.decoder, decoder_input, self.config
            )
            rotary_pos_emb = self.rotary_pos_emb(length)
        hidden = self.decoder(
            hidden_states=decoder_input,
            attention_mask=unless_plainly_causal(attention_mask),
            inference_params=inference_params,
            rotary_pos_emb=rotary_pos_emb,
        )
        if not self.post_process:
            return hidden
        weight = (
            self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        )
        logits, _ = self.output_layer(hidden, weight=weight)  # [s, b, v/tp]
        if labels is None:
            return logits.transpose(0, 1).contiguous()
        return self.compute_language_model_loss(labels, logits)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """As a language model's, without the output layer's extra state: it has none."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        sharded.pop(f"{prefix}output_layer._extra_state", None)
        return sharded
