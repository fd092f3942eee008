"""From token ids to the residual stream: word, position and token-type embeddings, then dropout."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from megatron.core import tensor_parallel
from megatron.core.errors import InvariantError
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import derived

PositionEmbeddingType = Literal["learned_absolute", "rope", "none"]


class LanguageModelEmbedding(MegatronModule):
    """Sum of the embeddings a model asks for; the word embedding is cut over tensor parallel ranks by
    vocabulary.
    """

    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        max_sequence_length: int,
        position_embedding_type: PositionEmbeddingType = "learned_absolute",
        num_tokentypes: int = 0,
        *,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config)
        self.vocab_size = vocab_size
        self.max_sequence_length = max_sequence_length
        self.add_position_embedding = position_embedding_type == "learned_absolute"
        self.num_tokentypes = num_tokentypes
        # With nothing else to add, the sum over vocabulary parts can leave every rank its own part of the
        # sequence.
        self.reduce_scatter_embeddings = (
            config.sequence_parallel and not self.add_position_embedding and num_tokentypes <= 0
        )
        self.word_embeddings = tensor_parallel.VocabParallelEmbedding(
            num_embeddings=vocab_size,
            embedding_dim=config.hidden_size,
            init_method=derived(config.init_method),
            reduce_scatter_embeddings=self.reduce_scatter_embeddings,
            config=config,
            pg_collection=pg_collection,
        )
        if self.add_position_embedding:
            self.position_embeddings = self._replicated_embedding(max_sequence_length)
        self.tokentype_embeddings = self._replicated_embedding(num_tokentypes) if num_tokentypes > 0 else None
        self.embedding_dropout = torch.nn.Dropout(config.hidden_dropout)

    def _replicated_embedding(self, rows: int) -> torch.nn.Embedding:
        """A table [rows, h] kept whole on every rank, drawn from the default generator (after torch's own
        draw).
        """
        table = torch.nn.Embedding(rows, self.config.hidden_size)
        if self.config.perform_initialization:
            derived(self.config.init_method)(table.weight)
        return table

    def zero_parameters(self) -> None:
        """Fill every table with zeros: a second copy of the embedding, before the first is added to it."""
        tables = (
            self.word_embeddings,
            getattr(self, "position_embeddings", None),
            self.tokentype_embeddings,
        )
        for table in tables:
            if table is not None:
                table.weight.data.fill_(0)
                table.weight.shared = True  # type: ignore[union-attr]

    def forward(self, input_ids: Tensor, position_ids: Tensor, tokentype_ids: Tensor | None = None) -> Tensor:
        """input_ids, position_ids, tokentype_ids [b, s] -> [s/sp, b, h] (fp32 with an fp32 residual stream)."""
        if (tokentype_ids is None) != (self.tokentype_embeddings is None):
            raise InvariantError(
                "tokentype_ids", "are given exactly when the model was built with num_tokentypes > 0"
            )
        if self.reduce_scatter_embeddings:
            embeddings = self.word_embeddings(input_ids)  # [s/sp, b, h]
        else:
            # Looking up transposed ids gives [s, b, h] without transposing the result.
            embeddings = self.word_embeddings(input_ids.t())
        if self.add_position_embedding:
            embeddings = embeddings + self.position_embeddings(position_ids.t())
        if self.tokentype_embeddings is not None and tokentype_ids is not None:
            embeddings = embeddings + self.tokentype_embeddings(tokentype_ids.t())
        if self.config.fp32_residual_connection:
            embeddings = embeddings.float()
        if not self.config.sequence_parallel:
            return self.embedding_dropout(embeddings)
        if not self.reduce_scatter_embeddings:
            embeddings = tensor_parallel.scatter_to_sequence_parallel_region(embeddings)
            if self.config.clone_scatter_output_in_embedding:
                embeddings = embeddings.clone()  # the slice would keep the whole sequence alive
        with tensor_parallel.get_cuda_rng_tracker().fork():
            return self.embedding_dropout(embeddings)
