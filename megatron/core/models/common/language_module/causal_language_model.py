"""What causal language models share, whatever their layers are: embedding, positions, output layer, and how a stage runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.enums import ModelType
from megatron.core.errors import InvariantError
from megatron.core.fp8 import in_high_precision
from megatron.core.inference_params import InferenceParams
from megatron.core.models.common.embeddings.language_model_embedding import PositionEmbeddingType
from megatron.core.models.common.embeddings.rotary_pos_embedding import FrequencyScaling
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import derived, get_default_causal_mask


class CausalLanguageModel(LanguageModule):
    """Base of GPT and of hybrid models.

    A subclass gives itself its `decoder`, the stack of layers, and then calls `_add_output_layer`; modules are registered,
    and random weights drawn, in the order embedding, decoder, output layer.
    """

    decoder: Any

    def __init__(
        self,
        config: TransformerConfig,
        *,
        vocab_size: int,
        max_sequence_length: int,
        pre_process: bool,
        post_process: bool,
        fp16_lm_cross_entropy: bool,
        parallel_output: bool,
        share_embeddings_and_output_weights: bool,
        position_embedding_type: PositionEmbeddingType,
        rotary_percent: float,
        rotary_base: int,
        seq_len_interpolation_factor: float | None,
        rope_scaling: FrequencyScaling | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config, pg_collection=pg_collection)
        self.pre_process = pre_process
        self.post_process = post_process
        self.fp16_lm_cross_entropy = fp16_lm_cross_entropy
        self.parallel_output = parallel_output
        self.share_embeddings_and_output_weights = share_embeddings_and_output_weights
        self.model_type = ModelType.encoder_or_decoder
        self._add_embeddings(
            vocab_size,
            max_sequence_length,
            position_embedding_type,
            rotary_percent=rotary_percent,
            seq_len_interpolation_factor=seq_len_interpolation_factor,
            rotary_base=rotary_base,
            rope_scaling=rope_scaling,
        )

    def _add_output_layer(self) -> None:
        """Build the output layer where this stage has one, and tie or mark the weights of the vocabulary."""
        if self.post_process:
            # Deferred weight gradients of the output layer need its inputs and output gradients kept aside.
            deferred = self.config.defer_embedding_wgrad_compute
            self.embedding_activation_buffer: list[Tensor] | None = [] if deferred else None
            self.grad_output_buffer: list[Tensor] | None = [] if deferred else None
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                self.config.hidden_size,
                self.vocab_size,
                config=in_high_precision(self.config),
                init_method=derived(self.config.init_method),
                bias=False,
                skip_bias_add=False,
                gather_output=not self.parallel_output,
                skip_weight_param_allocation=self.pre_process and self.share_embeddings_and_output_weights,
                embedding_activation_buffer=self.embedding_activation_buffer,
                grad_output_buffer=self.grad_output_buffer,
                pg_collection=self.pg_collection,
            )
        if self.pre_process or self.post_process:
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

    def _run(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        decoder_input: Tensor | None,
        labels: Tensor | None,
        inference_params: InferenceParams | None,
        **of_the_decoder: Any,
    ) -> Tensor:
        """A stage's forward pass, as the subclasses' `forward` describes it; the decoder alone sees `of_the_decoder`."""
        if decoder_input is None and self.pre_process:
            decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids)
        hidden = self.decoder(
            hidden_states=decoder_input,
            attention_mask=_unless_plainly_causal(attention_mask),
            inference_params=inference_params,
            rotary_pos_emb=self._angles(inference_params, self.decoder, decoder_input),
            **of_the_decoder,
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
        """As a language model's; the output layer's extra state, which older files lack, is left out."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        extra = sharded.pop(f"{prefix}output_layer._extra_state", None)
        if extra is not None and extra.data:
            raise InvariantError("output_layer", "carries extra state, which checkpoints have no place for")
        return sharded


def _unless_plainly_causal(attention_mask: Tensor | None) -> Tensor | None:
    """None in place of a mask [b or 1, 1, s, s] that only hides the future, so that attention can be causal
    by itself.

    Looking at the values is free on a CPU; a mask on another device would have to be waited for and is used
    as it is.
    """
    if attention_mask is None or attention_mask.device.type != "cpu":
        return attention_mask
    rows, columns = attention_mask.shape[-2:]
    if rows != columns or not torch.equal(
        attention_mask, get_default_causal_mask(rows).expand_as(attention_mask)
    ):
        return attention_mask
    return None
