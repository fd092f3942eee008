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
        False, group="inference", status="unsupported", reason="only v0.9's legacy BERT model has it",
        help="Let BERT return sentence embeddings.")
    bert_embedder_type: str = flag(
        "megatron", parse=None, choices=("megatron", "huggingface"), group="inference", status="unsupported",
        reason="v0.9's training code reads it nowhere", help="Which BERT computes embeddings.")
    # fmt: on
