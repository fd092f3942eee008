"""Shape, numerics and recomputation of one transformer stack, and the rules about them alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from megatron.core.activations import openai_gelu, squared_relu
from megatron.core.flags import Rule, check_config, computed, flag, from_args, rule
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.utils import init_method_normal, scaled_init_method_normal

SHAPE_RULES: list[Rule] = []  # checked before sizes left open are derived
RULES: list[Rule] = []


def _activation(args: Any) -> Callable:
    if args.swiglu:
        return F.silu
    if args.squared_relu:
        return squared_relu
    return openai_gelu if args.openai_gelu else F.gelu


def _bias_activation_fusion(args: Any) -> bool:
    """The fused bias+activation exists for GELU and SwiGLU only, so a default of "fused" does not bind others."""
    if args.swiglu:
        return args.bias_swiglu_fusion
    return args.bias_gelu_fusion and not args.squared_relu and not args.openai_gelu


@dataclass
class TransformerConfig(ModelParallelConfig):
    """Shape and numerics of one transformer stack.

    `__post_init__` derives what is left None (ffn_hidden_size, kv_channels, num_query_groups, initialisers) and raises
    ConfigError (a ValueError) for values that contradict each other.
    """

    # fmt: off
    num_layers: int = flag(
        0, cli_default=None, group="network size", help="Transformer layers over all pipeline stages.")
    first_pipeline_num_layers: int | None = flag(
        None, on="--decoder-first-pipeline-num-layers", dest="decoder_first_pipeline_num_layers", group="distributed",
        needs="--pipeline-model-parallel-size",
        help="Layers on the first pipeline stage, when stages shall not be equal.")
    last_pipeline_num_layers: int | None = flag(
        None, on="--decoder-last-pipeline-num-layers", dest="decoder_last_pipeline_num_layers", group="distributed",
        needs="--pipeline-model-parallel-size",
        help="Layers on the last pipeline stage, when stages shall not be equal.")
    hidden_size: int = flag(
        0, cli_default=None, group="network size", help="Width of the residual stream.")
    num_attention_heads: int = flag(
        0, cli_default=None, group="network size", help="Attention heads per layer.")
    num_query_groups: int | None = computed(
        None, lambda args: args.num_query_groups if args.group_query_attention else None)
    ffn_hidden_size: int | None = flag(
        None, group="network size",
        help="Inner width of the MLP; default 4 x hidden size, or 8/3 of it rounded down to 64 with --swiglu.")
    kv_channels: int | None = flag(
        None, group="network size", help="Size of one attention head; default hidden size / heads.")
    hidden_dropout: float = flag(
        0.1, group="regularization", help="Dropout on embeddings and on what each block adds to the residual stream.")
    attention_dropout: float = flag(
        0.1, group="regularization", help="Dropout on attention probabilities.")
    fp32_residual_connection: bool = flag(
        False, group="mixed precision", help="Keep the residual stream in fp32.")
    apply_residual_connection_post_layernorm: bool = flag(
        False, group="network size",
        help="Take the residual from the output of the layer norm, as the original BERT does.")
    layernorm_epsilon: float = flag(
        1e-5, on="--norm-epsilon", dest="norm_epsilon", group="network size",
        help="Term added to the variance (or mean square) inside norms.")
    layernorm_zero_centered_gamma: bool = flag(
        False, on="--apply-layernorm-1p", dest="apply_layernorm_1p", group="network size",
        help="Store norm weights as their difference from 1.")
    add_bias_linear: bool = flag(
        True, off="--disable-bias-linear", group="training", help="Build linear layers without bias.")
    add_qkv_bias: bool = flag(
        False, group="training",
        needs="--disable-bias-linear", help="Give the QKV projection a bias even with --disable-bias-linear.")
    gated_linear_unit: bool = flag(
        False, on="--swiglu", dest="swiglu", group="network size", help="Use SwiGLU in the MLP: gated, with SiLU.")
    activation_func: Callable = computed(F.gelu, _activation)
    activation_func_fp8_input_store: bool = from_args("activation_func_fp8_input_store", False)
    num_moe_experts: int | None = flag(
        None, on="--num-experts", dest="num_experts", group="moe", help="Experts per layer; 0 or nothing: a dense MLP.")
    rotary_interleaved: bool = flag(
        False, group="network size",
        needs="--position-embedding-type rope", help="Rotate neighbouring channels as pairs instead of the two halves.")
    window_size: tuple[int, int] | None = from_args("window_size", None)
    normalization: str = flag(
        "LayerNorm", parse=None, choices=("LayerNorm", "RMSNorm"), group="network size", help="Kind of norm.")
    qk_layernorm: bool = flag(
        False, group="network size", help="Normalise queries and keys per head before attention.")
    test_mode: bool = flag(
        False, group="validation",
        needs="--qk-layernorm",
        help="Check while running that the norms of queries and keys stay equal on all tensor-parallel ranks.")
    calculate_per_token_loss: bool = flag(
        False, group="training",
        help="Divide gradients by the number of tokens in the global batch instead of microbatch by microbatch.")

    init_method: Callable | None = computed(
        None, lambda args: torch.nn.init.xavier_uniform_ if args.init_method_xavier_uniform else None)
    output_layer_init_method: Callable | None = from_args("output_layer_init_method", None)
    init_method_std: float = flag(
        0.02, group="initialization", help="Standard deviation of the normal distribution weights are drawn from.")

    apply_query_key_layer_scaling: bool = flag(
        False, group="mixed precision", help="Scale attention scores by 1 / layer number, undone inside the softmax.")
    attention_softmax_in_fp32: bool = flag(
        True, cli_default=False, group="mixed precision",
        needs="--fp16 or --bf16", unless="--apply-query-key-layer-scaling",
        help="Compute attention's mask and softmax in fp32.")

    bias_activation_fusion: bool = computed(False, _bias_activation_fusion)
    masked_softmax_fusion: bool = flag(
        False, cli_default=True, off="--no-masked-softmax-fusion", group="training",
        help="Compute attention as separate products, mask and softmax instead of one kernel.")
    persist_layer_norm: bool = flag(
        False, cli_default=True, off="--no-persist-layer-norm", dest="no_persist_layer_norm", inverted=True,
        group="training", status="gpu", help="Do not use the persistent layer-norm kernel.")
    memory_efficient_layer_norm: bool = from_args("memory_efficient_layer_norm", False)
    bias_dropout_fusion: bool = flag(
        False, cli_default=True, off="--no-bias-dropout-fusion", group="training",
        help="Do not fuse bias, dropout and residual addition.")
    apply_rope_fusion: bool = flag(
        False, cli_default=True, off="--no-rope-fusion", group="training",
        needs="--position-embedding-type rope", help="Do not use a fused rotary-embedding kernel.")

    recompute_granularity: str | None = flag(
        None, choices=("full", "selective"), group="training",
        help="Recompute in the backward pass: whole layers (full) or attention's inner part only (selective).")
    recompute_method: str | None = flag(
        None, choices=("uniform", "block"), group="training",
        needs="--recompute-granularity full",
        help="All layers in equal chunks (uniform), or the first layers of a stage (block).")
    recompute_num_layers: int | None = flag(
        None, group="training",
        needs="--recompute-granularity full",
        help="Layers per chunk (uniform), or recomputed layers per stage (block).")
    distribute_saved_activations: bool | None = flag(
        None, cli_default=False, group="training",
        needs="--recompute-granularity full", help="Divide the saved inputs over the tensor-parallel ranks.")

    fp8: str | None = flag(
        None, on="--fp8-format", parse=None, choices=("e4m3", "hybrid"), group="Transformer-Engine",
        help="Multiply the layers' matrices in fp8; hybrid takes e4m3 forward and e5m2 backward. Emulated on a CPU.")
    fp8_margin: int = flag(
        0, group="Transformer-Engine",
        needs="--fp8-format", help="Powers of two kept free above the largest magnitude.")
    fp8_interval: int = flag(
        1, group="Transformer-Engine", status="noop", reason="Transformer Engine dropped the setting",
        help="Steps between updates of the fp8 scale.")
    fp8_amax_history_len: int = flag(
        1, group="Transformer-Engine",
        needs=("--fp8-format", "--fp8-recipe delayed", "--fp8-amax-compute-algo max"),
        help="Steps whose largest magnitudes are remembered.")
    fp8_amax_compute_algo: str = flag(
        "most_recent", parse=None, choices=("most_recent", "max"), group="Transformer-Engine",
        needs=("--fp8-format", "--fp8-recipe delayed", "--fp8-amax-history-len"),
        help="Scale by the last or the largest remembered magnitude.")
    fp8_wgrad: bool = flag(
        True, off="--no-fp8-wgrad", group="Transformer-Engine",
        needs="--fp8-format", help="Compute weight gradients in higher precision.")
    fp8_dot_product_attention: bool = from_args("fp8_dot_product_attention", False)
    fp8_multi_head_attention: bool = from_args("fp8_multi_head_attention", False)
    tp_only_amax_red: bool = from_args("tp_only_amax_red", False)

    moe_router_load_balancing_type: str = flag(
        "aux_loss", choices=("aux_loss", "sinkhorn", "none"), group="moe",
        needs="--num-experts",
        help="How experts are kept evenly used: a loss term, sinkhorn assignment, or not at all.")
    moe_router_topk: int = flag(2, group="moe", needs="--num-experts", help="Experts each token is sent to.")
    moe_router_pre_softmax: bool = flag(
        False, group="moe",
        needs="--num-experts", unless="--moe-router-load-balancing-type sinkhorn",
        help="Take the router's softmax over all experts, before the top-k choice.")
    moe_grouped_gemm: bool = flag(
        False, group="moe", needs="--num-experts", help="Run a rank's experts as one grouped matrix product.")
    moe_aux_loss_coeff: float = flag(
        0, cli_default=0.0, group="moe",
        needs=("--num-experts", "--moe-router-load-balancing-type aux_loss"), help="Weight of the load-balancing loss.")
    moe_z_loss_coeff: float | None = flag(
        None, group="moe", needs="--num-experts", help="Weight of the router's z-loss, which keeps its logits small.")
    moe_input_jitter_eps: float | None = flag(
        None, group="moe", needs="--num-experts", help="Multiply the router's input by noise from [1 - eps, 1 + eps].")
    moe_token_dropping: bool = from_args("moe_token_dropping", False)
    moe_token_dispatcher_type: str = flag(
        "allgather", choices=("allgather", "alltoall", "alltoall_seq"), group="moe",
        needs="--num-experts", help="How tokens reach the ranks of their experts.")
    moe_per_layer_logging: bool = flag(
        False, group="moe",
        needs=("--num-experts", "--moe-aux-loss-coeff or --moe-z-loss-coeff", "--tensorboard-dir or --wandb-project"),
        help="Log router losses layer by layer.")
    moe_expert_capacity_factor: float | None = flag(
        None, group="moe",
        needs="--num-experts", help="Tokens an expert takes, relative to an even share; the rest is dropped. "
        "Nothing or a negative value: no limit.")
    moe_pad_expert_input_to_capacity: bool = flag(
        False, group="moe", needs="--num-experts", help="Pad every expert's input to its capacity.")
    moe_token_drop_policy: str = flag(
        "probs", choices=("probs", "position"), group="moe",
        needs="--moe-expert-capacity-factor",
        help="Which tokens an overfull expert drops: those of low probability, or the last ones.")
    moe_layer_recompute: bool = flag(
        False, group="moe", needs="--num-experts", help="Recompute MoE layers in the backward pass.")

    clone_scatter_output_in_embedding: bool = flag(
        True, off="--no-clone-scatter-output-in-embedding", group="training",
        needs="--sequence-parallel",
        help="Do not copy the sequence-parallel embedding; the whole sequence then stays allocated behind the slice.")
    disable_parameter_transpose_cache: bool = from_args("disable_parameter_transpose_cache", False)
    enable_cuda_graph: bool = flag(
        False, group="extras", status="gpu",
        help="Record each layer's forward and backward pass once and replay them, which spares launching their kernels.")
    external_cuda_graph: bool = from_args("external_cuda_graph", False)
    config_logger_dir: str = flag(
        "", group="config logger", help="Write the constructor arguments of the main objects here as JSON.")

    # Not in v0.9, where only the command line has them; keyword-only, so that the positions above stay.
    use_flash_attn: bool = flag(
        False, group="training", status="gpu", kw_only=True,
        help="Demand the flash-attn package for attention; without the flag it is used where it fits.")
    standalone_embedding_stage: bool = from_args("standalone_embedding_stage", False, kw_only=True)
    fp8_recipe: str = flag(
        "delayed", choices=("delayed", "tensorwise"), group="extras", kw_only=True,
        needs="--fp8-format", help="Scale tensors by magnitudes of earlier steps (delayed) or their own (tensorwise).")
    first_last_layers_bf16: bool = flag(
        False, group="extras", kw_only=True,
        needs="--fp8-format", help="Keep the first and last layers out of fp8, as many as the next two flags say.")
    num_layers_at_start_in_bf16: int = flag(
        1, group="extras", kw_only=True, needs="--first-last-layers-bf16", help="Layers at the beginning.")
    num_layers_at_end_in_bf16: int = flag(
        1, group="extras", kw_only=True, needs="--first-last-layers-bf16", help="Layers at the end.")
    # fmt: on

    def __post_init__(self) -> None:
        super().__post_init__()
        check_config(self, SHAPE_RULES)
        if self.ffn_hidden_size is None:
            self.ffn_hidden_size = 4 * self.hidden_size
        if self.kv_channels is None:
            self.kv_channels = self.hidden_size // self.num_attention_heads
        if self.num_query_groups is None:
            self.num_query_groups = self.num_attention_heads
        if self.apply_query_key_layer_scaling:
            self.attention_softmax_in_fp32 = True
        if self.moe_expert_capacity_factor is not None and self.moe_expert_capacity_factor < 0:
            self.moe_expert_capacity_factor = None
        if self.init_method is None:
            self.init_method = init_method_normal(self.init_method_std)
        if self.output_layer_init_method is None:
            self.output_layer_init_method = scaled_init_method_normal(self.init_method_std, self.num_layers)
        check_config(self, RULES)


# fmt: off
@rule(SHAPE_RULES, "--num-layers", bad="--num-layers 0",
      why="a stack of {a.num_layers} layers is not a transformer", fix="give at least one layer")
def layers_exist(config: TransformerConfig) -> bool:
    return config.num_layers >= 1


@rule(SHAPE_RULES, "--num-attention-heads", bad="--num-attention-heads 0 --kv-channels 8",
      why="attention with {a.num_attention_heads} heads has no output", fix="give at least one head")
def heads_exist(config: TransformerConfig) -> bool:
    return config.num_attention_heads >= 1


@rule(SHAPE_RULES, "--hidden-size", bad="--hidden-size -64",
      why="a residual stream of width {a.hidden_size} holds nothing", fix="give a positive width")
def width_is_not_negative(config: TransformerConfig) -> bool:
    # 0, the default, is the width of a configuration that describes no model: wrappers and schedules take one too.
    return config.hidden_size >= 0


@rule(RULES, "--fp16", "--bf16", bad="--fp16 --bf16",
      why="parameters have one type", fix="keep one of the two")
def one_half_precision(config: TransformerConfig) -> bool:
    return not (config.fp16 and config.bf16)


@rule(RULES, "--ffn-hidden-size", bad="--ffn-hidden-size -4",
      why="an MLP of inner width {a.ffn_hidden_size} holds nothing", fix="give a positive width")
def mlp_width_is_positive(config: TransformerConfig) -> bool:
    return (config.ffn_hidden_size or 0) >= 1 or config.hidden_size == 0


@rule(RULES, "--kv-channels", bad="--kv-channels -8",
      why="an attention head of size {a.kv_channels} holds nothing", fix="give a positive size")
def head_size_is_positive(config: TransformerConfig) -> bool:
    return (config.kv_channels or 0) >= 1 or config.hidden_size == 0


@rule(RULES, "--num-attention-heads", "--tensor-model-parallel-size",
      bad="--num-attention-heads 6 --kv-channels 8 --tensor-model-parallel-size 4",
      why="{a.num_attention_heads} heads cannot be divided evenly over {a.tensor_model_parallel_size} ranks",
      fix="choose a tensor-parallel size that divides the number of heads")
def heads_divide_over_tensor_ranks(config: TransformerConfig) -> bool:
    return config.num_attention_heads % config.tensor_model_parallel_size == 0


@rule(RULES, "--num-query-groups", bad="--group-query-attention --num-query-groups 0",
      why="attention needs keys and values, and {a.num_query_groups} groups have none", fix="give at least one group")
def query_groups_exist(config: TransformerConfig) -> bool:
    return (config.num_query_groups or 0) >= 1


@rule(RULES, "--num-query-groups", "--tensor-model-parallel-size",
      bad="--num-attention-heads 12 --kv-channels 8 --group-query-attention --num-query-groups 6 "
      "--tensor-model-parallel-size 4",
      why="{a.num_query_groups} query groups can neither be divided evenly over {a.tensor_model_parallel_size} ranks nor "
      "shared evenly by them",
      fix="choose a tensor-parallel size that divides the number of query groups or is a multiple of it")
def query_groups_divide_over_tensor_ranks(config: TransformerConfig) -> bool:
    groups, ranks = config.num_query_groups or 1, config.tensor_model_parallel_size
    return groups % ranks == 0 or ranks % groups == 0


@rule(RULES, "--num-attention-heads", "--num-query-groups",
      bad="--group-query-attention --num-query-groups 3",
      why="{a.num_attention_heads} heads cannot share {a.num_query_groups} groups of keys and values evenly",
      fix="choose a number of query groups that divides the number of heads")
def heads_divide_over_query_groups(config: TransformerConfig) -> bool:
    return config.num_attention_heads % (config.num_query_groups or 1) == 0


@rule(RULES, "--hidden-dropout", bad="--hidden-dropout 1.5",
      why="{a.hidden_dropout} is not a probability below 1", fix="give a value from 0 up to 1, 1 excluded")
def hidden_dropout_is_a_probability(config: TransformerConfig) -> bool:
    return 0 <= config.hidden_dropout < 1


@rule(RULES, "--attention-dropout", bad="--attention-dropout -0.1",
      why="{a.attention_dropout} is not a probability below 1", fix="give a value from 0 up to 1, 1 excluded")
def attention_dropout_is_a_probability(config: TransformerConfig) -> bool:
    return 0 <= config.attention_dropout < 1


@rule(RULES, "--expert-model-parallel-size", "--num-experts", bad="--expert-model-parallel-size 2",
      why="there are no experts to divide over {a.expert_model_parallel_size} ranks", fix="give --num-experts")
def expert_ranks_need_experts(config: TransformerConfig) -> bool:
    return config.expert_model_parallel_size == 1 or config.num_moe_experts is not None


@rule(RULES, "--num-experts", bad="--num-experts -2",
      why="{a.num_moe_experts} experts cannot be built", fix="give a positive number, or leave it out for a dense MLP")
def experts_exist(config: TransformerConfig) -> bool:
    return config.num_moe_experts is None or config.num_moe_experts > 0


@rule(RULES, "--moe-expert-capacity-factor", "--moe-token-dispatcher-type",
      bad="--num-experts 4 --moe-expert-capacity-factor 1.0",
      why="the {a.moe_token_dispatcher_type} dispatcher cannot drop tokens",
      fix="add --moe-token-dispatcher-type alltoall")
def capacity_needs_alltoall(config: TransformerConfig) -> bool:
    limited = config.moe_expert_capacity_factor is not None
    return not limited or config.moe_token_dispatcher_type in ("alltoall", "alltoall_seq")


@rule(RULES, "--moe-expert-capacity-factor", "--moe-router-load-balancing-type",
      bad="--num-experts 4 --moe-expert-capacity-factor 1.0 --moe-token-dispatcher-type alltoall "
          "--moe-router-load-balancing-type sinkhorn",
      why="{a.moe_router_load_balancing_type} balancing leaves no tokens to drop",
      fix="use aux_loss or none, or drop --moe-expert-capacity-factor")
def capacity_needs_plain_balancing(config: TransformerConfig) -> bool:
    limited = config.moe_expert_capacity_factor is not None
    return not limited or config.moe_router_load_balancing_type in ("aux_loss", "none")


@rule(RULES, "--moe-pad-expert-input-to-capacity", "--moe-expert-capacity-factor",
      bad="--num-experts 4 --moe-pad-expert-input-to-capacity",
      why="without a capacity there is no size to pad to", fix="give --moe-expert-capacity-factor")
def padding_needs_capacity(config: TransformerConfig) -> bool:
    return not config.moe_pad_expert_input_to_capacity or config.moe_expert_capacity_factor is not None


@rule(RULES, "--moe-extended-tp", "--moe-token-dispatcher-type",
      bad="--num-experts 4 --moe-extended-tp --moe-token-dispatcher-type alltoall",
      why="with every expert divided over all ranks each rank needs all tokens", fix="use the allgather dispatcher")
def extended_tp_needs_allgather(config: TransformerConfig) -> bool:
    return not config.moe_extended_tp or config.moe_token_dispatcher_type == "allgather"


@rule(RULES, "--moe-extended-tp", "--ffn-hidden-size", "--expert-model-parallel-size",
      bad="--num-experts 4 --moe-extended-tp --expert-model-parallel-size 2 --ffn-hidden-size 33",
      why="an inner width of {a.ffn_hidden_size} cannot be divided evenly over {a.tensor_model_parallel_size} x "
          "{a.expert_model_parallel_size} ranks",
      fix="choose an inner width that tensor times expert size divides")
def extended_tp_divides_the_mlp(config: TransformerConfig) -> bool:
    ranks = config.tensor_model_parallel_size * config.expert_model_parallel_size
    return not config.moe_extended_tp or (config.ffn_hidden_size or 0) % ranks == 0


# No flag of ours switches offloading on, so the next three have no command line.
@rule(RULES, "cpu_offloading", "cpu_offloading_num_layers", bad="",
      why="{a.cpu_offloading_num_layers} of {a.num_layers} layers cannot be offloaded",
      fix="offload between 0 and num_layers - 1 layers")
def offloaded_layers_exist(config: TransformerConfig) -> bool:
    return not config.cpu_offloading or 0 <= config.cpu_offloading_num_layers < config.num_layers


@rule(RULES, "cpu_offloading", "--pipeline-model-parallel-size", bad="",
      why="offloading follows the order of layers of an undivided stack", fix="use one pipeline stage")
def offloading_needs_one_stage(config: TransformerConfig) -> bool:
    return not config.cpu_offloading or config.pipeline_model_parallel_size == 1


@rule(RULES, "cpu_offloading", "--recompute-granularity", bad="",
      why="what is recomputed is not kept and cannot be offloaded", fix="use one of the two")
def offloading_excludes_recomputation(config: TransformerConfig) -> bool:
    return not config.cpu_offloading or config.recompute_granularity is None


# argparse knows the choices, so the next two bind library users.
@rule(RULES, "--recompute-granularity", bad="",
      why="{a.recompute_granularity} is neither full nor selective", fix="choose one of the two")
def granularity_is_known(config: TransformerConfig) -> bool:
    return config.recompute_granularity in (None, "full", "selective")


@rule(RULES, "--recompute-method", bad="",
      why="{a.recompute_method} is neither uniform nor block", fix="choose one of the two")
def method_is_known(config: TransformerConfig) -> bool:
    return config.recompute_method in (None, "uniform", "block")


@rule(RULES, "--recompute-granularity", "--recompute-method", bad="--recompute-granularity full",
      why="full recomputation needs to know which layers", fix="give --recompute-method uniform or block")
def full_recomputation_needs_a_method(config: TransformerConfig) -> bool:
    return config.recompute_granularity != "full" or config.recompute_method is not None


@rule(RULES, "--recompute-granularity", "--recompute-num-layers",
      bad="--recompute-granularity full --recompute-method uniform",
      why="full recomputation needs to know how many layers", fix="give --recompute-num-layers")
def full_recomputation_needs_a_count(config: TransformerConfig) -> bool:
    return config.recompute_granularity != "full" or config.recompute_num_layers is not None


@rule(RULES, "--recompute-num-layers", bad="--recompute-granularity full --recompute-method uniform "
      "--recompute-num-layers 0", why="{a.recompute_num_layers} layers cannot be recomputed together",
      fix="give at least one")
def recomputed_layers_exist(config: TransformerConfig) -> bool:
    return config.recompute_num_layers is None or config.recompute_num_layers >= 1


@rule(RULES, "--recompute-granularity", "--recompute-num-layers",
      bad="--recompute-granularity selective --recompute-num-layers 2",
      why="selective recomputation acts in every layer", fix="drop --recompute-num-layers, or recompute full layers")
def selective_recomputation_has_no_count(config: TransformerConfig) -> bool:
    return config.recompute_granularity != "selective" or config.recompute_num_layers is None


@rule(RULES, "--distribute-saved-activations", "--sequence-parallel",
      bad="--distribute-saved-activations --sequence-parallel --tensor-model-parallel-size 2 "
          "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
      why="with sequence parallelism the saved activations are divided already",
      fix="drop --distribute-saved-activations")
def saved_activations_are_divided_once(config: TransformerConfig) -> bool:
    recomputes = config.recompute_granularity is not None
    return not (recomputes and config.distribute_saved_activations and config.sequence_parallel)


@rule(RULES, "--recompute-granularity", "--num-layers-per-virtual-pipeline-stage", bad="",
      why="{a.num_layers} layers do not divide evenly into {a.virtual_pipeline_model_parallel_size} model chunks",
      fix="choose a chunk size that divides the layers evenly")
def recomputation_divides_into_chunks(config: TransformerConfig) -> bool:
    chunks = config.virtual_pipeline_model_parallel_size
    return config.recompute_granularity is None or chunks is None or config.num_layers % chunks == 0


# The command line sets the fusion only where it exists, so the next two bind library users.
@rule(RULES, "bias_activation_fusion", "activation_func", bad="",
      why="only GELU and SiLU have a fused bias", fix="set bias_activation_fusion to False")
def fused_activation_exists(config: TransformerConfig) -> bool:
    return not config.bias_activation_fusion or config.activation_func in (F.gelu, F.silu)


@rule(RULES, "bias_activation_fusion", "--disable-bias-linear", bad="",
      why="the fused GELU adds a bias, and there is none", fix="set bias_activation_fusion to False")
def fused_gelu_has_a_bias(config: TransformerConfig) -> bool:
    plain_gelu = config.activation_func is F.gelu and not config.gated_linear_unit
    return not (config.bias_activation_fusion and plain_gelu) or config.add_bias_linear


@rule(RULES, "activation_func_fp8_input_store", "--swiglu", bad="",
      why="only SwiGLU stores its input in fp8", fix="set activation_func_fp8_input_store to False, or use SwiGLU")
def fp8_store_needs_swiglu(config: TransformerConfig) -> bool:
    swiglu = config.activation_func is F.silu and config.gated_linear_unit
    return not config.activation_func_fp8_input_store or swiglu


@rule(RULES, "--rotary-interleaved", "--no-rope-fusion", bad="--rotary-interleaved --position-embedding-type rope",
      why="the fused rotary kernel rotates halves, not pairs", fix="add --no-rope-fusion")
def fused_rope_rotates_halves(config: TransformerConfig) -> bool:
    return not (config.rotary_interleaved and config.apply_rope_fusion)


@rule(RULES, "--num-experts", "--expert-model-parallel-size", bad="--num-experts 3 --expert-model-parallel-size 2",
      why="{a.num_moe_experts} experts cannot be divided evenly over {a.expert_model_parallel_size} ranks",
      fix="choose an expert-parallel size that divides the number of experts")
def experts_divide_over_expert_ranks(config: TransformerConfig) -> bool:
    return (config.num_moe_experts or 0) % config.expert_model_parallel_size == 0


# ---- fp8

@rule(RULES, "--fp8-amax-history-len", bad="--fp8-format hybrid --fp8-amax-history-len 0",
      why="a history of {a.fp8_amax_history_len} steps remembers nothing", fix="give 1 or more")
def fp8_remembers(config: TransformerConfig) -> bool:
    return config.fp8_amax_history_len >= 1


@rule(RULES, "--fp8-format", "--num-experts", bad="--fp8-format hybrid --num-experts 4",
      why="experts receive numbers of tokens that fp8 products cannot have (multiples of 16)", fix="drop --fp8-format")
def fp8_excludes_experts(config: TransformerConfig) -> bool:
    return config.fp8 is None or config.num_moe_experts is None


@rule(RULES, "--first-last-layers-bf16", "--fp8-format", bad="--first-last-layers-bf16",
      why="without fp8 all layers are in higher precision", fix="add --fp8-format hybrid, or drop the flag")
def exempt_layers_need_fp8(config: TransformerConfig) -> bool:
    return not config.first_last_layers_bf16 or config.fp8 is not None


@rule(RULES, "--num-layers-at-start-in-bf16", "--num-layers-at-end-in-bf16",
      bad="--fp8-format hybrid --first-last-layers-bf16 --num-layers-at-start-in-bf16 -1",
      why="{a.num_layers_at_start_in_bf16} and {a.num_layers_at_end_in_bf16} are not numbers of layers",
      fix="give 0 or more")
def exempt_layers_count(config: TransformerConfig) -> bool:
    return min(config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) >= 0


# ---- recorded layers

@rule(RULES, "--enable-cuda-graph", "--pipeline-model-parallel-size",
      bad="--enable-cuda-graph --pipeline-model-parallel-size 2",
      why="a recorded layer holds the activations of one microbatch, and a pipeline keeps several", fix="drop one of them")
def graphs_hold_one_microbatch(config: TransformerConfig) -> bool:
    return not config.enable_cuda_graph or config.pipeline_model_parallel_size == 1


@rule(RULES, "--enable-cuda-graph", "--hidden-dropout", "--attention-dropout",
      bad="--enable-cuda-graph --hidden-dropout 0.1",
      why="a replay cannot switch the random states that dropout draws from",
      fix="add --hidden-dropout 0 --attention-dropout 0, or drop --enable-cuda-graph")
def graphs_exclude_dropout(config: TransformerConfig) -> bool:
    return not config.enable_cuda_graph or config.hidden_dropout == config.attention_dropout == 0.0


@rule(RULES, "--enable-cuda-graph", "--recompute-granularity",
      bad="--enable-cuda-graph --hidden-dropout 0 --attention-dropout 0 --recompute-granularity selective",
      why="recomputation saves and restores random states, which cannot be recorded", fix="drop one of them")
def graphs_exclude_recompute(config: TransformerConfig) -> bool:
    return not config.enable_cuda_graph or config.recompute_granularity is None


@rule(RULES, "--enable-cuda-graph", "--num-experts",
      bad="--enable-cuda-graph --hidden-dropout 0 --attention-dropout 0 --num-experts 4",
      why="experts receive other numbers of tokens at every replay", fix="drop one of them")
def graphs_exclude_experts(config: TransformerConfig) -> bool:
    return not config.enable_cuda_graph or config.num_moe_experts is None


@rule(RULES, "--enable-cuda-graph", "--fp8-recipe",
      bad="--enable-cuda-graph --hidden-dropout 0 --attention-dropout 0 --fp8-format e4m3",
      why="delayed scales begin with the first step's own magnitudes, and a recording cannot change its mind",
      fix="add --fp8-recipe tensorwise")
def graphs_exclude_delayed_scales(config: TransformerConfig) -> bool:
    return not config.enable_cuda_graph or config.fp8 is None or config.fp8_recipe == "tensorwise"
