"""Flags of v0.9 about hybrid models, and those that are accepted but belong to things this project does not have.

Scripts that leave the latter at their defaults run; setting one stops with its reason. Those marked `noop` change nothing in
v0.9 either where the client they configure is not installed, so they only cause a line in the start-up report.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.flags import flag


def _missing(group: str, what: str) -> dict[str, Any]:
    return {"group": group, "status": "unsupported", "reason": f"{what} not part of this project"}


_RETRIEVAL = _missing("biencoder", "retrieval models (ICT, ORQA) are")
_VISION = _missing("vision", "vision models are")
_RETRO = _missing("retro", "Retro is")
_AUTORESUME = _missing("autoresume", "the ADLR autoresume client is")
_FAULT_TOLERANCE = _missing("ft_package", "the fault-tolerance client is")
_ONE_LOGGER: dict[str, Any] = {
    "group": "one logger", "status": "noop", "reason": "there is no one-logger client; use TensorBoard or W&B",
}  # fmt: skip


@dataclass
class RetrievalConfig:
    """Biencoder retrievers (ICT, ORQA)."""

    # fmt: off
    ict_head_size: int | None = flag(None, **_RETRIEVAL, help="Size of block embeddings.")
    biencoder_projection_dim: int = flag(0, **_RETRIEVAL, help="Size of the projection after the encoder; 0: none.")
    biencoder_shared_query_context_model: bool = flag(False, **_RETRIEVAL, help="One encoder for queries and blocks.")
    ict_load: str | None = flag(None, **_RETRIEVAL, help="Checkpoint of a retriever.")
    bert_load: str | None = flag(None, **_RETRIEVAL, help="BERT checkpoint to start the encoders from.")
    titles_data_path: str | None = flag(None, **_RETRIEVAL, help="Indexed dataset of titles.")
    query_in_block_prob: float = flag(0.1, **_RETRIEVAL, help="Probability to keep the query in its block.")
    use_one_sent_docs: bool = flag(False, **_RETRIEVAL, help="Use documents of a single sentence too.")
    evidence_data_path: str | None = flag(None, **_RETRIEVAL, help="Text to retrieve from.")
    retriever_report_topk_accuracies: list[int] = flag(
        [], nargs="+", **_RETRIEVAL, help="Values of k to report top-k accuracy for.")
    retriever_score_scaling: bool = flag(False, **_RETRIEVAL, help="Divide scores by the root of the width.")
    block_data_path: str | None = flag(None, **_RETRIEVAL, help="Where block embeddings are.")
    embedding_path: str | None = flag(None, **_RETRIEVAL, help="Where evidence embeddings are.")
    indexer_batch_size: int = flag(128, **_RETRIEVAL, help="Batch size of the embedding job.")
    indexer_log_interval: int = flag(1000, **_RETRIEVAL, help="Batches between its log lines.")
    retriever_seq_length: int = flag(256, **_RETRIEVAL, help="Tokens per block.")
    sample_rate: float = flag(1.0, **_RETRIEVAL, help="Share of the evidence to use.")
    # fmt: on


@dataclass
class VisionConfig:
    """Vision models."""

    # fmt: off
    num_classes: int = flag(1000, **_VISION, help="Classes.")
    img_h: int = flag(224, **_VISION, help="Image height.")
    img_w: int = flag(224, **_VISION, help="Image width.")
    num_channels: int = flag(3, **_VISION, help="Image channels.")
    patch_dim: int = flag(16, **_VISION, help="Patch size.")
    classes_fraction: float = flag(1.0, **_VISION, help="Share of classes to train on.")
    data_per_class_fraction: float = flag(1.0, **_VISION, help="Share of each class to train on.")
    head_lr_mult: float = flag(1.0, **_VISION, help="Factor on the head's learning rate.")
    vision_pretraining: bool = flag(False, **_VISION, help="Pretrain a vision model.")
    vision_pretraining_type: str = flag(
        "classify", choices=("classify", "inpaint", "dino"), **_VISION, help="Objective.")
    vision_backbone_type: str = flag("vit", choices=("vit", "mit", "swin"), **_VISION, help="Backbone.")
    swin_backbone_type: str = flag("tiny", choices=("tiny", "base", "h3"), **_VISION, help="Size of Swin.")
    mask_type: str = flag("random", choices=("random", "row"), **_VISION, help="Masks for inpainting.")
    mask_factor: float = flag(1.0, **_VISION, help="Size of masks.")
    iter_per_epoch: int = flag(1250, **_VISION, help="Steps per epoch.")
    dino_local_img_size: int = flag(96, **_VISION, help="DINO: size of local crops.")
    dino_local_crops_number: int = flag(10, **_VISION, help="DINO: number of local crops.")
    dino_head_hidden_size: int = flag(2048, **_VISION, help="DINO: width of the head.")
    dino_bottleneck_size: int = flag(256, **_VISION, help="DINO: width of its bottleneck.")
    dino_freeze_last_layer: float = flag(1, **_VISION, help="DINO: epochs with a frozen last layer.")
    dino_norm_last_layer: bool = flag(False, **_VISION, help="DINO: normalise the last layer.")
    dino_warmup_teacher_temp: float = flag(0.04, **_VISION, help="DINO: first teacher temperature.")
    dino_teacher_temp: float = flag(0.07, **_VISION, help="DINO: final teacher temperature.")
    dino_warmup_teacher_temp_epochs: int = flag(30, **_VISION, help="DINO: epochs between the two.")
    # fmt: on


@dataclass
class RetroConfig:
    """Retrieval-enhanced transformers."""

    # fmt: off
    retro_project_dir: str | None = flag(None, parse=None, **_RETRO, help="Directory of preprocessed data.")
    retro_add_retriever: bool = flag(False, **_RETRO, help="Add retrieval to the model.")
    retro_cyclic_train_iters: int | None = flag(None, **_RETRO, help="Steps after which data repeat.")
    retro_encoder_layers: int = flag(2, **_RETRO, help="Layers of the retrieval encoder.")
    retro_encoder_hidden_dropout: float = flag(0.1, **_RETRO, help="Its hidden dropout.")
    retro_encoder_attention_dropout: float = flag(0.1, **_RETRO, help="Its attention dropout.")
    retro_num_neighbors: int = flag(2, **_RETRO, help="Neighbours per chunk.")
    retro_num_retrieved_chunks: int = flag(2, **_RETRO, help="Chunks per neighbour.")
    retro_attention_gate: float = flag(1, **_RETRO, help="Gate on retrieval attention.")
    retro_verify_neighbor_count: bool = flag(
        True, off="--retro-no-verify-neighbor-count", **_RETRO, help="Do not check the number of neighbour files.")
    # fmt: on


@dataclass
class HybridConfig:
    """Which layer of a hybrid model is of which kind (pretrain_mamba.py alone)."""

    # fmt: off
    hybrid_attention_ratio: float = flag(
        0.0, group="experimental", help="Share of a hybrid model's layers that are attention, from 0 to 1.")
    hybrid_mlp_ratio: float = flag(
        0.0, group="experimental", help="Share of a hybrid model's layers that are MLPs, from 0 to 1.")
    hybrid_override_pattern: str | None = flag(
        None, group="experimental",
        help="Kinds of a hybrid model's layers, letter by letter: M for Mamba, * for attention, - for an MLP.")
    # fmt: on


@dataclass
class ClusterServicesConfig:
    """Clients of one vendor's cluster services."""

    # fmt: off
    adlr_autoresume: bool = flag(False, **_AUTORESUME, help="Let a cluster service end and resubmit the job.")
    adlr_autoresume_interval: int = flag(1000, **_AUTORESUME, help="Steps between questions to it.")
    enable_ft_package: bool = flag(False, **_FAULT_TOLERANCE, help="Report progress to a watchdog.")
    enable_one_logger: bool = flag(True, off="--no-one-logger", **_ONE_LOGGER, help="Do not report to one-logger.")
    one_logger_project: str = flag("megatron-lm", **_ONE_LOGGER, help="Project at one-logger.")
    one_logger_run_name: str | None = flag(None, **_ONE_LOGGER, help="Name of the run there.")
    one_logger_async: bool = flag(False, **_ONE_LOGGER, help="Report in the background.")
    app_tag_run_name: str | None = flag(None, **_ONE_LOGGER, help="Tag of the job there.")
    app_tag_run_version: str = flag("0.0.0", **_ONE_LOGGER, help="Version of the job there.")
    # fmt: on
