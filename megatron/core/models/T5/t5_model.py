"""T5: an encoder and a decoder that attends to it, or one pipeline stage of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron.core import parallel_state, tensor_parallel
from megatron.core.config_logger import has_config_logger_enabled, log_config_to_disk
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedStateDict
from megatron.core.enums import ModelType
from megatron.core.errors import InvariantError
from megatron.core.fp8 import in_high_precision
from megatron.core.inference_params import InferenceParams
from megatron.core.models.common.embeddings.language_model_embedding import PositionEmbeddingType
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import derived

BlockSpec = ModuleSpec | TransformerBlockSubmodules


class T5LMHead(MegatronModule):
    """The output layer: with a tied weight it has a bias of its own, with its own weight it has none."""

    def __init__(
        self,
        config: TransformerConfig,
        parallel_output: bool,
        vocab_size: int,
        pre_process: bool = True,
        share_embeddings_and_output_weights: bool = False,
        *,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config)
        self.parallel_output = parallel_output
        self.output_layer = tensor_parallel.ColumnParallelLinear(
            config.hidden_size,
            vocab_size,
            config=in_high_precision(config),
            init_method=derived(config.init_method),
            bias=share_embeddings_and_output_weights,
            skip_bias_add=not share_embeddings_and_output_weights,
            gather_output=not parallel_output,
            skip_weight_param_allocation=pre_process and share_embeddings_and_output_weights,
            pg_collection=pg_collection,
        )

    def forward(self, hidden_states: Tensor, word_embeddings_weight: Tensor | None) -> Tensor:
        """hidden_states [s/sp, b, h], tied weight [v/tp, h] or None -> logits [s, b, v/tp]."""
        logits, _ = self.output_layer(hidden_states, weight=word_embeddings_weight)
        return logits


class T5Model(LanguageModule):
    """Shared embedding, encoder, decoder, output layer; a stage holds its share of them.

    With stages of its own for the encoder a stage has `add_encoder` or `add_decoder`; `pre_process` then
    means the first stage of either and `post_process` the last of either (each holds a copy of embedding or
    head). `encoder_config` describes the encoder (its depth and its number of stages), `config` the decoder.
    """

    def __init__(
        self,
        config: TransformerConfig,
        encoder_config: TransformerConfig,
        transformer_encoder_layer_spec: BlockSpec,
        transformer_decoder_layer_spec: BlockSpec,
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
        add_encoder: bool = True,
        add_decoder: bool = True,
        *,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config, pg_collection=pg_collection)
        if has_config_logger_enabled(config):
            log_config_to_disk(config, locals())
        self.encoder_config = encoder_config
        self.transformer_encoder_layer_spec = transformer_encoder_layer_spec
        self.transformer_decoder_layer_spec = transformer_decoder_layer_spec
        self.pre_process = pre_process
        self.post_process = post_process
        self.add_encoder = add_encoder
        self.add_decoder = add_decoder
        self.fp16_lm_cross_entropy = fp16_lm_cross_entropy
        self.parallel_output = parallel_output
        self.share_embeddings_and_output_weights = share_embeddings_and_output_weights
        self.model_type = ModelType.encoder_and_decoder
        self.xattn_needed = True  # the schedule also passes the encoder's output along the decoder's stages
        self.encoder_hidden_state: Tensor | None = None

        self._add_embeddings(
            vocab_size,
            max_sequence_length,
            position_embedding_type,
            rotary_percent=rotary_percent,
            seq_len_interpolation_factor=seq_len_interpolation_factor,
        )
        if pre_process and position_embedding_type == "learned_absolute":
            # v0.9's second name for the table.
            self.position_embeddings = self.embedding.position_embeddings
        place = {
            "pre_process": pre_process,
            "post_process": post_process,
            "pg_collection": pg_collection,
        }
        self.encoder = (
            TransformerBlock(config=encoder_config, spec=transformer_encoder_layer_spec, **place)
            if add_encoder
            else None
        )
        self.decoder = (
            TransformerBlock(config=config, spec=transformer_decoder_layer_spec, **place)
            if add_decoder
            else None
        )
        if post_process:
            self.lm_head = T5LMHead(
                config,
                parallel_output,
                vocab_size,
                pre_process,
                share_embeddings_and_output_weights,
                pg_collection=pg_collection,
            )
            self.output_layer = self.lm_head.output_layer
            if not add_decoder:
                # v0.9 gives the encoder's last stage a head that nothing uses, and so do its checkpoints: norms do not
                # count it, and no reduction of gradients waits for its own.
                for param in self.lm_head.parameters():
                    param.shared = param.idle = True  # type: ignore[attr-defined]
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take what the previous stage sent: hidden states of the stack this stage continues, then (inside
        the decoder) the encoder's output; the first decoder stage receives the encoder's output alone.
        Each [s/sp, b, h].
        """
        tensors = input_tensor if isinstance(input_tensor, list) else [input_tensor]
        if self.encoder is not None:
            if len(tensors) != 1:
                raise InvariantError(
                    "set_input_tensor", f"an encoder stage takes one input tensor, not {len(tensors)}"
                )
            self.encoder.set_input_tensor(tensors[0])
        elif self.decoder is not None:
            if len(tensors) not in (1, 2):
                raise InvariantError(
                    "set_input_tensor", f"a decoder stage takes one or two input tensors, not {len(tensors)}"
                )
            self.decoder.set_input_tensor(tensors[0] if len(tensors) == 2 else None)
            self.encoder_hidden_state = tensors[-1]

    def forward(
        self,
        encoder_input_ids: Tensor | None,
        decoder_input_ids: Tensor | None,
        encoder_attn_mask: Tensor | None,
        decoder_attn_mask: Tensor | None,
        encoder_decoder_attn_mask: Tensor | None,
        lm_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        output_encoder_hidden_only: bool = False,
        inference_params: InferenceParams | None = None,
    ) -> Tensor:
        """Loss per token, logits, or hidden states for the next stage.

        Ids [b, s]; masks bool [b, sq, sk], True = hidden; lm_labels [b, s]; encoder_hidden_states [s/sp, b,
        h] skips the encoder. -> [b, s] with labels, else [b, s, v/tp], else [s/sp, b, h].
        """
        encoder_mask, decoder_mask, cross_mask = t5_extended_attention_mask(
            [encoder_attn_mask, decoder_attn_mask, encoder_decoder_attn_mask]
        )
        if encoder_hidden_states is None:
            if self.encoder is not None:
                embedded = self._embed(encoder_input_ids)
                encoder_hidden_states = self.encoder(
                    hidden_states=embedded,
                    attention_mask=encoder_mask,
                    rotary_pos_emb=self._angles(None, self.encoder, embedded),
                )
            else:
                encoder_hidden_states = self.encoder_hidden_state
        if self.decoder is None or output_encoder_hidden_only:
            return derived(encoder_hidden_states)

        embedded = self._embed(decoder_input_ids, inference_params)
        hidden = self.decoder(
            hidden_states=embedded,
            attention_mask=decoder_mask,
            context=encoder_hidden_states,
            context_mask=cross_mask,
            rotary_pos_emb=self._angles(inference_params, self.decoder, embedded),
            inference_params=inference_params,
        )
        if not self.post_process:
            return hidden
        weight = (
            self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        )
        logits = self.lm_head(hidden, weight)
        if lm_labels is None:
            return logits.transpose(0, 1).contiguous()
        return self.compute_language_model_loss(lm_labels, logits)

    def _embed(self, ids: Tensor | None, inference_params: InferenceParams | None = None) -> Tensor | None:
        if not self.pre_process or ids is None:
            return None
        positions = t5_position_ids(ids)
        if inference_params is not None:
            positions = positions + inference_params.sequence_len_offset
        return self.embedding(input_ids=ids, position_ids=positions)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """As a language model's; what a later stage holds a copy of is described as a replica.

        The copies are the decoder's embedding, the encoder's (unused) head, and the alias of a tied output
        weight.
        """
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        copies: list[str] = []
        if self.pre_process and parallel_state.resolve(self.pg_collection).rank("pp") > 0:
            copies += ["embedding.", "position_embeddings."]
        if self.post_process and not self.add_decoder:
            copies += ["lm_head.", "output_layer."]
        for key, piece in sharded.items():
            if isinstance(piece, ShardedBase) and key.startswith(tuple(prefix + copy for copy in copies)):
                replica = (
                    piece.replica_id if isinstance(piece.replica_id, tuple) else (0, 0, piece.replica_id)
                )
                sharded[key] = replace(piece, replica_id=(1, *replica[1:]))  # type: ignore[type-var]
        alias = f"{prefix}lm_head.output_layer.weight"
        if self.share_embeddings_and_output_weights and alias in sharded:
            sharded[alias] = sharded[f"{prefix}output_layer.weight"]
        return sharded


def t5_extended_attention_mask(attention_mask_list: list[Tensor | None]) -> list[Tensor | None]:
    """Masks [b, sq, sk] -> [b, 1, sq, sk], broadcastable over heads; None stays None."""
    return [None if mask is None else mask.unsqueeze(1) for mask in attention_mask_list]


def t5_position_ids(token_ids: Tensor) -> Tensor:
    """token_ids [b, s] -> positions 0 .. s-1 for each sample, [b, s]."""
    return torch.arange(token_ids.size(1), device=token_ids.device).expand_as(token_ids)
