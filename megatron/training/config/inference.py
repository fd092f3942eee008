"""Flags about generating text."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.flags import flag


@dataclass
class InferenceConfig:
    """Limits of a forward pass and of a request."""

    # fmt: off
    inference_batch_times_seqlen_threshold: int = flag(
        512, group="inference", help="Batch x length beyond which a pipelined forward pass is cut into micro batches.")
    max_tokens_to_oom: int = flag(
        12000, group="inference", help="Refuse requests whose prompt and answer together hold more tokens.")
    output_bert_embeddings: bool = flag(
        False, group="inference", help="tools/bert_embedding: let BERT return a vector for each text.")
    bert_embedder_type: str = flag(
        "megatron", parse=None, choices=("megatron", "huggingface"), group="inference",
        help="tools/bert_embedding: the BERT of --load, or bert-large-cased of transformers.")
    # fmt: on
