"""Flags about the model that no core configuration owns: embeddings, vocabulary padding, initialisation, precision."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core.flags import flag


@dataclass
class NetworkConfig:
    """What the entry scripts pass to model constructors beside the transformer's own configuration."""

    # fmt: off
    encoder_num_layers: int | None = flag(
        None, group="network size", help="Layers of the encoder; gives --num-layers its value where that is left out.")
    decoder_num_layers: int | None = flag(
        None, group="network size", help="Layers of T5's decoder, where they differ from the encoder's.")
    group_query_attention: bool = flag(
        False, group="network size", help="Let groups of heads share keys and values (see --num-query-groups).")
    num_query_groups: int = flag(
        1, group="network size",
        needs="--group-query-attention", help="Groups of heads, each with its own keys and values.")
    max_position_embeddings: int | None = flag(
        None, group="network size", help="Longest sequence the model has positions for.")
    position_embedding_type: str = flag(
        "learned_absolute", choices=("learned_absolute", "rope", "none"), group="network size",
        help="How positions enter the model: a learned table, rotation of queries and keys, or not at all.")
    use_rotary_position_embeddings: bool = flag(
        False, group="network size", status="deprecated", reason="there is a more general flag",
        instead="--position-embedding-type rope",
        help="The same as --position-embedding-type rope.")
    rotary_base: int = flag(
        10000, group="network size", needs="--position-embedding-type rope", help="Base of the rotary frequencies.")
    rotary_percent: float = flag(
        1.0, group="network size", needs="--position-embedding-type rope", help="Share of each head that is rotated.")
    rotary_seq_len_interpolation_factor: int | None = flag(
        None, group="network size",
        needs="--position-embedding-type rope",
        help="Divide positions by this number before rotating (linear interpolation).")
    add_position_embedding: bool = flag(
        True, off="--no-position-embedding", group="network size",
        help="Build no table of positions; only together with rotary embeddings.")
    make_vocab_size_divisible_by: int = flag(
        128, group="network size", help="Pad the vocabulary to a multiple of this times the tensor-parallel size.")
    openai_gelu: bool = flag(
        False, group="network size", help="Use the tanh approximation of GELU.")
    squared_relu: bool = flag(False, group="network size", help="Use max(x, 0) squared in the MLP.")
    onnx_safe: bool | None = flag(
        None, parse=bool, group="network size", status="noop", reason="v0.9 reads it nowhere",
        help="Work around problems of an ONNX exporter.")
    bert_binary_head: bool = flag(
        True, off="--bert-no-binary-head", group="network size", help="Train BERT without the sentence-order head.")
    untie_embeddings_and_output_weights: bool = flag(
        False, group="network size", help="Give the output layer its own weight instead of the word embedding's.")
    use_legacy_models: bool = flag(
        False, group="training", status="unsupported", reason="there is one model stack here, v0.9's core models",
        help="Use v0.9's older model stack.")
    deprecated_use_mcore_models: bool = flag(
        False, on="--use-mcore-models", group="training", status="noop", reason="the core models are the only ones",
        dest="deprecated_use_mcore_models", help="Use the core models, which is what happens anyway.")
    spec: list[str] | None = flag(
        None, nargs="*", group="experimental",
        help="Module and name of the layer specification to build; for BERT `local` names the built-in one.")
    moe_use_upcycling: bool = flag(
        False, group="moe",
        help="Start from a dense checkpoint: copy its MLP into every expert, save that as iteration 1, and go on.")
    # fmt: on


@dataclass
class InitializationConfig:
    """Where random numbers come from and how weights are drawn."""

    # fmt: off
    seed: int = flag(1234, group="initialization", help="Seed of Python, NumPy and torch.")
    data_parallel_random_init: bool = flag(
        False, group="initialization",
        help="Draw other random numbers on every data-parallel rank; all start from the first one's weights.")
    init_method_xavier_uniform: bool = flag(
        False, group="initialization",
        help="Draw weights from Xavier's uniform distribution; output layers keep theirs.")
    # fmt: on


@dataclass
class MixedPrecisionConfig:
    """Number formats; several core configurations read these."""

    # fmt: off
    fp16: bool = flag(False, group="mixed precision", help="Compute in float16 with a loss scale.")
    bf16: bool = flag(False, group="mixed precision", help="Compute in bfloat16.")
    fp16_lm_cross_entropy: bool = flag(
        False, group="mixed precision", status="noop", reason="the loss itself computes in fp32, as in v0.9's core models",
        help="Compute the loss from float16 logits without converting them to fp32.")
    # fmt: on


@dataclass
class TransformerEngineConfig:
    """Which implementation of the layers is built."""

    # fmt: off
    transformer_impl: str = flag(
        "transformer_engine", parse=None, choices=("local", "transformer_engine"), group="Transformer-Engine",
        help="Layers of this project (local) or of Transformer Engine; where that is missing the default means local.")
    tp_comm_overlap_cfg: str | None = flag(
        None, group="training", status="gpu", needs=("--tp-comm-overlap", "--transformer-impl transformer_engine"),
        help="YAML file with settings of Transformer Engine's buffers per overlapped product.")
    # fmt: on
