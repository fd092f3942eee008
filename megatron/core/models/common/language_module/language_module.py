"""What language models share: embeddings, the loss, the tied output weight and its copies on other stages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron.core import device, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.errors import InvariantError
from megatron.core.inference_params import InferenceParams
from megatron.core.kernels import registry
from megatron.core.models.common.embeddings.language_model_embedding import (
    LanguageModelEmbedding,
    PositionEmbeddingType,
)
from megatron.core.models.common.embeddings.rotary_pos_embedding import FrequencyScaling, RotaryEmbedding
from megatron.core.tensor_parallel.placement import make_tp_sharded_tensor_for_checkpoint
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import derived


class LanguageModule(MegatronModule):
    """Base of GPT, BERT and T5.

    A subclass sets `pre_process` (holds an embedding), `post_process` (holds the output layer),
    `share_embeddings_and_output_weights`, `embedding` and `output_layer` before it calls
    `setup_embeddings_and_output_layer`.
    """

    pre_process: bool
    post_process: bool
    share_embeddings_and_output_weights: bool
    embedding: Any
    output_layer: Any

    def __init__(self, config: TransformerConfig, *, pg_collection: Any = None) -> None:
        super().__init__(config)
        self.pg_collection = pg_collection
        self.fused_cross_entropy = None
        if config.cross_entropy_loss_fusion:
            spec = registry.Spec(device=device.kind(), dtype=config.params_dtype)
            self.fused_cross_entropy = registry.select("vocab_cross_entropy", spec)

    def _add_embeddings(
        self,
        vocab_size: int,
        max_sequence_length: int,
        position_embedding_type: PositionEmbeddingType,
        *,
        rotary_percent: float,
        seq_len_interpolation_factor: float | None,
        rotary_base: int = 10000,
        rope_scaling: FrequencyScaling | None = None,
        num_tokentypes: int = 0,
    ) -> None:
        """Build `embedding` where this stage has one, and `rotary_pos_emb` on every stage of a model that rotates."""
        self.vocab_size = vocab_size
        self.max_sequence_length = max_sequence_length
        self.position_embedding_type = position_embedding_type
        if self.pre_process:
            self.embedding = LanguageModelEmbedding(
                config=self.config,
                vocab_size=vocab_size,
                max_sequence_length=max_sequence_length,
                position_embedding_type=position_embedding_type,
                num_tokentypes=num_tokentypes,
                pg_collection=self.pg_collection,
            )
        if position_embedding_type == "rope":
            self.rotary_pos_emb = RotaryEmbedding(
                kv_channels=derived(self.config.kv_channels),
                rotary_percent=rotary_percent,
                rotary_interleaved=self.config.rotary_interleaved,
                seq_len_interpolation_factor=seq_len_interpolation_factor,
                rotary_base=rotary_base,
                use_cpu_initialization=self.config.use_cpu_initialization,
                rope_scaling=rope_scaling,
                pg_collection=self.pg_collection,
            )

    def _angles(
        self, inference_params: InferenceParams | None, layers: MegatronModule, hidden: Tensor | None
    ) -> Tensor | None:
        """The rotary table for `layers` and what enters them [s/sp/cp, b, h]; None for a model that does not rotate."""
        if self.position_embedding_type != "rope":
            return None
        length = self.rotary_pos_emb.get_rotary_seq_len(inference_params, layers, hidden, self.config)
        return self.rotary_pos_emb(length)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Cross entropy per token: labels [b, s], logits [s, b, v/tp] -> fp32 [b, s]."""
        labels = labels.transpose(0, 1).contiguous()
        group = parallel_state.resolve(self.pg_collection).tp
        if self.fused_cross_entropy is not None:
            loss = self.fused_cross_entropy(logits, labels, group)
        else:
            loss = tensor_parallel.vocab_parallel_cross_entropy(logits, labels, group=group)
        return loss.transpose(0, 1).contiguous()

    def setup_embeddings_and_output_layer(self) -> None:
        """Mark embedding and output weights and, across stages, make the copies of a tied weight equal.

        The first stage owns the tied weight. Every other stage that holds a copy (the last; for
        encoder-decoder models also the first decoder stage) starts it at zero, and one sum over the embedding
        group (all its ranks must call) gives all the owner's values. Copies are marked `shared`, so that
        norms count the weight once.
        """
        if self.pre_process:
            self.embedding.word_embeddings.weight.is_embedding_or_output_parameter = True
        if self.post_process and self.output_layer.weight is not None:
            self.output_layer.weight.is_embedding_or_output_parameter = True
        groups = parallel_state.resolve(self.pg_collection)
        stages = groups.size("pp")
        if stages > 1:
            self._share_input_embeddings()
        if not self.share_embeddings_and_output_weights:
            return
        weight = self.shared_embedding_or_output_weight()
        if weight is None:
            return
        if stages == 1:
            # Two layers of this stage add to one gradient: a fused wgrad kernel must not overwrite it.
            weight.zero_out_wgrad = True  # type: ignore[attr-defined]
            return
        weight.shared_embedding = True  # type: ignore[attr-defined]
        if groups.rank("pp") > 0:
            weight.data.zero_()
            weight.shared = True  # type: ignore[attr-defined]
        if torch.distributed.is_initialized() and parallel_state.is_rank_in_embedding_group():
            torch.distributed.all_reduce(weight.data, group=groups.embd)

    def _share_input_embeddings(self) -> None:
        """Give the embedding of a decoder with stages of its own the values of the encoder's."""
        groups = parallel_state.resolve(self.pg_collection)
        if groups.pos_embd is None or groups.pos_embd.size() < 2:
            return
        for weight in self.input_weights_of_both_stacks():
            weight.shared_embedding = True  # type: ignore[attr-defined]
            if groups.rank("pp") > 0:
                weight.data.zero_()
                weight.shared = True  # type: ignore[attr-defined]
            torch.distributed.all_reduce(weight.data, group=groups.pos_embd)

    def input_weights_of_both_stacks(self) -> list[Tensor]:
        """Weights that the first encoder stage and the first decoder stage hold alike, beside a tied word embedding."""
        if not self.pre_process:
            return []
        positions = getattr(self.embedding, "position_embeddings", None)
        tables = [] if positions is None else [positions]
        if not self.share_embeddings_and_output_weights:
            tables.append(self.embedding.word_embeddings)
        return [table.weight for table in tables]

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The tied weight [v/tp, h] on the stages that hold it: the embedding's, or the output layer's copy."""
        if self.pre_process:
            return self.embedding.word_embeddings.weight
        if self.post_process:
            return self.output_layer.weight
        return None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """As every module's; output weight and bias, under each name they have, may be padded differently in the file,
        like the vocabulary.
        """
        if sharded_offsets:
            raise InvariantError("sharded_offsets", "a whole model has no stacked axes", "leave it empty")
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        embedding_key = f"{prefix}embedding.word_embeddings.weight"
        weight_key = f"{prefix}output_layer.weight"
        if self.share_embeddings_and_output_weights:
            self.tie_embeddings_and_output_weights_state_dict(sharded, weight_key, embedding_key)
        for key, piece in sharded.items():
            if key.endswith(("output_layer.weight", "output_layer.bias")):
                piece.allow_shape_mismatch = True
        return sharded

    def tie_embeddings_and_output_weights_state_dict(
        self,
        sharded_state_dict: ShardedStateDict,
        output_layer_weight_key: str,
        first_stage_word_emb_key: str,
    ) -> None:
        """Describe the last stage's copy of a tied weight as a replica of the first stage's: never
        written, read from it.
        """
        if not self.post_process or self.pre_process:
            if output_layer_weight_key in sharded_state_dict:
                raise InvariantError(output_layer_weight_key, "exists beside the embedding it is tied to")
            return
        del sharded_state_dict[output_layer_weight_key]
        replica = (1, 0, parallel_state.get_data_parallel_rank(with_context_parallel=True))
        sharded_state_dict[output_layer_weight_key] = make_tp_sharded_tensor_for_checkpoint(
            tensor=derived(self.shared_embedding_or_output_weight()),
            key=first_stage_word_emb_key,
            replica_id=replica,
            allow_shape_mismatch=True,
        )
