"""Rules about the shape and numerics of the model."""

from __future__ import annotations

from typing import Any

from megatron.core.flags import rule
from megatron.core.kernels import capability
from megatron.core.transformer import transformer_config
from megatron.training.config.rules.base import DERIVED, GIVEN


def total_layers(args: Any) -> int:
    return args.num_layers if args.num_layers is not None else args.encoder_num_layers


# fmt: off
# ---- model shape

@rule(GIVEN, "--num-layers", "--encoder-num-layers", bad="--encoder-num-layers 4",
      why="both give the number of layers", fix="keep one of the two")
def layers_given_once(args: Any) -> bool:
    return args.num_layers is None or args.encoder_num_layers is None


@rule(GIVEN, "--num-layers", bad="-num-layers", why="the number of layers is not given", fix="give --num-layers")
def layers_given(args: Any) -> bool:
    return total_layers(args) is not None


@rule(GIVEN, "--hidden-size", bad="-hidden-size", why="the model's width is not given", fix="give --hidden-size")
def width_given(args: Any) -> bool:
    return args.hidden_size is not None


@rule(GIVEN, "--hidden-size", bad="--hidden-size 0", why="a residual stream of width 0 holds nothing",
      fix="give a positive width")
def width_is_some(args: Any) -> bool:
    return args.hidden_size != 0


@rule(GIVEN, "--num-attention-heads", bad="-num-attention-heads", why="the number of heads is not given",
      fix="give --num-attention-heads")
def heads_given(args: Any) -> bool:
    return args.num_attention_heads is not None


# The next and two below are the configuration's own rules: what they read has the same name among arguments, and
# validation checks them although it builds no configuration.
GIVEN += [each for each in transformer_config.SHAPE_RULES if each.holds is transformer_config.heads_exist]


@rule(GIVEN, "--max-position-embeddings", bad="-max-position-embeddings",
      why="the longest sequence the model has positions for is not given", fix="give --max-position-embeddings")
def positions_given(args: Any) -> bool:
    return args.max_position_embeddings is not None


@rule(GIVEN, "--hidden-size", "--num-attention-heads", bad="--num-attention-heads 7",
      why="a width of {a.hidden_size} cannot be divided evenly into {a.num_attention_heads} heads",
      fix="change one of the two, or give the size of a head as --kv-channels")
def heads_divide_the_width(args: Any) -> bool:
    return args.kv_channels is not None or args.hidden_size % args.num_attention_heads == 0


@rule(GIVEN, "--seq-length", "--encoder-seq-length", bad="--encoder-seq-length 32",
      why="both give the length of a sample", fix="keep one of the two")
def length_given_once(args: Any) -> bool:
    return args.seq_length is None or args.encoder_seq_length is None


@rule(GIVEN, "--seq-length", bad="-seq-length", why="the length of a sample is not given", fix="give --seq-length")
def length_given(args: Any) -> bool:
    return args.seq_length is not None or args.encoder_seq_length is not None


@rule(DERIVED, "--seq-length", bad="--seq-length 0", why="samples of {a.seq_length} tokens hold nothing",
      fix="give a positive length")
def samples_hold_tokens(args: Any) -> bool:
    return args.seq_length >= 1


@rule(DERIVED, "--seq-length", "--max-position-embeddings", bad="--seq-length 65",
      why="samples of {a.seq_length} tokens need positions beyond {a.max_position_embeddings}",
      fix="raise --max-position-embeddings or shorten the samples")
def samples_fit_positions(args: Any) -> bool:
    return args.max_position_embeddings >= args.seq_length


@rule(DERIVED, "--decoder-seq-length", "--max-position-embeddings", bad="--decoder-seq-length 65",
      why="samples of {a.decoder_seq_length} tokens need positions beyond {a.max_position_embeddings}",
      fix="raise --max-position-embeddings or shorten the samples")
def decoder_samples_fit_positions(args: Any) -> bool:
    return args.decoder_seq_length is None or args.max_position_embeddings >= args.decoder_seq_length


@rule(DERIVED, "--no-position-embedding", "--position-embedding-type", bad="--no-position-embedding",
      why="without a table of positions only rotary embeddings tell them apart",
      fix="add --position-embedding-type rope")
def positions_enter_somehow(args: Any) -> bool:
    return args.add_position_embedding or args.position_embedding_type == "rope"


DERIVED += [each for each in transformer_config.RULES if each.holds is transformer_config.fused_rope_rotates_halves]


@rule(DERIVED, "--rotary-percent", bad="--position-embedding-type rope --rotary-percent 1.5",
      why="{a.rotary_percent} is not a share of the head", fix="give a value above 0 and at most 1")
def rotary_share_is_a_share(args: Any) -> bool:
    return 0 < args.rotary_percent <= 1


@rule(DERIVED, "--rotary-base", bad="--position-embedding-type rope --rotary-base 0",
      why="frequencies are powers of 1/{a.rotary_base}", fix="give a positive base, such as 10000")
def rotary_base_is_positive(args: Any) -> bool:
    return args.rotary_base > 0


@rule(DERIVED, "--rotary-seq-len-interpolation-factor",
      bad="--position-embedding-type rope --rotary-seq-len-interpolation-factor 0",
      why="positions cannot be divided by {a.rotary_seq_len_interpolation_factor}", fix="give 1 or more")
def interpolation_divides(args: Any) -> bool:
    return args.rotary_seq_len_interpolation_factor is None or args.rotary_seq_len_interpolation_factor >= 1


@rule(DERIVED, "--use-rope-scaling", "--position-embedding-type", bad="--use-rope-scaling",
      why="it scales rotary frequencies, and the model has none", fix="add --position-embedding-type rope")
def scaling_needs_rope(args: Any) -> bool:
    return not args.use_rope_scaling or args.position_embedding_type == "rope"


@rule(DERIVED, "--rope-scaling-factor",
      bad="--use-rope-scaling --position-embedding-type rope --rope-scaling-factor 0",
      why="frequencies cannot be divided by {a.rope_scaling_factor}", fix="give a positive factor")
def rope_scaling_divides(args: Any) -> bool:
    return args.rope_scaling_factor > 0


@rule(GIVEN, "--swiglu", "--squared-relu", "--openai-gelu", bad="--swiglu --squared-relu",
      why="an MLP has one activation", fix="keep one of the three")
def one_activation(args: Any) -> bool:
    return args.swiglu + args.squared_relu + args.openai_gelu <= 1


@rule(DERIVED, "--make-vocab-size-divisible-by", bad="--make-vocab-size-divisible-by 0",
      why="nothing is a multiple of {a.make_vocab_size_divisible_by}", fix="give 1 or more")
def vocabulary_padding_divides(args: Any) -> bool:
    return args.make_vocab_size_divisible_by >= 1


@rule(DERIVED, "--num-experts", "--spec", bad="--num-experts 4 --spec local",
      why="a layer specification of your own decides about experts itself", fix="drop one of the two")
def experts_or_specification(args: Any) -> bool:
    return args.num_experts is None or args.spec is None


@rule(DERIVED, "--expert-model-parallel-size", "--num-experts", bad="--expert-model-parallel-size 2",
      why="there are no experts to divide over {a.expert_model_parallel_size} ranks", fix="give --num-experts")
def expert_ranks_need_experts(args: Any) -> bool:
    return args.expert_model_parallel_size <= 1 or args.num_experts is not None


@rule(DERIVED, "--num-experts", "--expert-model-parallel-size", bad="--num-experts 3 --expert-model-parallel-size 2",
      why="{a.num_experts} experts cannot be divided evenly over {a.expert_model_parallel_size} ranks",
      fix="choose an expert-parallel size that divides the number of experts")
def experts_divide(args: Any) -> bool:
    return args.expert_model_parallel_size <= 1 or args.num_experts % args.expert_model_parallel_size == 0


@rule(DERIVED, "--expert-model-parallel-size", "--fp16", bad="--num-experts 4 --expert-model-parallel-size 2 --fp16",
      why="expert parallelism has no loss scaling over expert groups", fix="use --bf16")
def expert_parallelism_excludes_fp16(args: Any) -> bool:
    return args.expert_model_parallel_size <= 1 or not args.fp16


@rule(DERIVED, "--moe-grouped-gemm", "--bf16", bad="--num-experts 2 --moe-grouped-gemm",
      why="the grouped product exists for bfloat16 alone", fix="add --bf16, or drop --moe-grouped-gemm")
def grouped_product_is_bfloat16(args: Any) -> bool:
    return not args.moe_grouped_gemm or args.bf16


@rule(DERIVED, "--moe-grouped-gemm", "--disable-bias-linear", bad="--num-experts 2 --moe-grouped-gemm --bf16",
      why="grouped experts have no biases", fix="add --disable-bias-linear, or drop --moe-grouped-gemm")
def grouped_experts_have_no_biases(args: Any) -> bool:
    return args.num_experts is None or not args.moe_grouped_gemm or not args.add_bias_linear


@rule(DERIVED, "--moe-grouped-gemm", bad="--num-experts 2 --moe-grouped-gemm --bf16 --disable-bias-linear",
      why="the grouped product needs a device of compute capability 8.0 or more", fix="drop --moe-grouped-gemm",
      device="cuda")
def grouped_product_needs_ampere(args: Any) -> bool:
    compute = capability.probe().compute
    return not args.moe_grouped_gemm or (compute is not None and compute >= (8, 0))


@rule(GIVEN, "--moe-use-upcycling", "--save", bad="--num-experts 2 --moe-use-upcycling",
      why="the converted checkpoint needs a place", fix="give --save and --save-interval")
def upcycling_saves(args: Any) -> bool:
    return not args.moe_use_upcycling or args.save is not None


@rule(GIVEN, "--moe-use-upcycling", "--num-experts", bad="--moe-use-upcycling --save ckpt --save-interval 1",
      why="there are no experts to copy the dense MLP into", fix="give --num-experts")
def upcycling_has_experts(args: Any) -> bool:
    return not args.moe_use_upcycling or bool(args.num_experts)


# ---- precision

GIVEN += [each for each in transformer_config.RULES if each.holds is transformer_config.one_half_precision]


@rule(GIVEN, "--fp16-lm-cross-entropy", "--fp16", bad="--fp16-lm-cross-entropy", why="the logits are not float16",
      fix="add --fp16, or drop --fp16-lm-cross-entropy")
def half_loss_needs_fp16(args: Any) -> bool:
    return not args.fp16_lm_cross_entropy or args.fp16


@rule(GIVEN, "--fp32-residual-connection", "--bf16", "--fp16", bad="--fp32-residual-connection",
      why="everything is fp32 already", fix="add --bf16 or --fp16, or drop --fp32-residual-connection")
def fp32_residual_needs_half(args: Any) -> bool:
    return not args.fp32_residual_connection or args.fp16 or args.bf16


@rule(GIVEN, "--loss-scale", bad="--fp16 --loss-scale -1", why="a loss scale of {a.loss_scale} turns gradients around",
      fix="give a positive scale, or none for a dynamic one")
def loss_scale_is_positive(args: Any) -> bool:
    return args.loss_scale is None or args.loss_scale >= 0


@rule(GIVEN, "--initial-loss-scale", "--min-loss-scale", bad="--fp16 --initial-loss-scale 1 --min-loss-scale 2",
      why="the dynamic scale cannot start at {a.initial_loss_scale} below its bound {a.min_loss_scale}",
      fix="raise --initial-loss-scale")
def loss_scale_starts_above_its_bound(args: Any) -> bool:
    return args.initial_loss_scale >= args.min_loss_scale


@rule(GIVEN, "--min-loss-scale", bad="--fp16 --min-loss-scale 0", why="a scale of {a.min_loss_scale} erases gradients",
      fix="give a positive bound")
def smallest_loss_scale_is_positive(args: Any) -> bool:
    return args.min_loss_scale > 0


@rule(GIVEN, "--loss-scale-window", bad="--fp16 --loss-scale-window 0",
      why="the scale cannot grow every {a.loss_scale_window} steps", fix="give a positive number of steps")
def loss_scale_window_is_positive(args: Any) -> bool:
    return args.loss_scale_window > 0


@rule(GIVEN, "--hysteresis", bad="--fp16 --hysteresis 0", why="{a.hysteresis} overflows cannot halve the scale",
      fix="give 1 or more")
def hysteresis_is_positive(args: Any) -> bool:
    return args.hysteresis > 0


# ---- recomputation

@rule(GIVEN, "--distribute-saved-activations", "--tensor-model-parallel-size",
      bad="--distribute-saved-activations --recompute-granularity full --recompute-method uniform "
          "--recompute-num-layers 1",
      why="saved activations are divided over tensor-parallel ranks, and there is one",
      fix="drop --distribute-saved-activations")
def divided_activations_need_ranks(args: Any) -> bool:
    return not args.distribute_saved_activations or args.tensor_model_parallel_size > 1


@rule(GIVEN, "--distribute-saved-activations", "--recompute-granularity", "--recompute-method",
      bad="--distribute-saved-activations --tensor-model-parallel-size 2 --recompute-granularity selective",
      why="only full recomputation saves whole layer inputs", fix="give --recompute-granularity full and a method")
def divided_activations_need_full_recomputation(args: Any) -> bool:
    full = args.recompute_granularity == "full" and args.recompute_method is not None
    return not args.distribute_saved_activations or full


@rule(GIVEN, "--recompute-granularity", "--recompute-method",
      bad="--recompute-granularity selective --recompute-method uniform",
      why="selective recomputation acts in every layer and has no method", fix="drop --recompute-method")
def selective_recomputation_has_no_method(args: Any) -> bool:
    return args.recompute_granularity != "selective" or args.recompute_method is None


# ---- fp8

@rule(DERIVED, "--fp8-format", "--seq-length", "--micro-batch-size",
      bad="--fp8-format hybrid --seq-length 24 --max-position-embeddings 24 --micro-batch-size 1",
      why="a micro-batch of {a.micro_batch_size} x {a.seq_length} tokens over {a.context_parallel_size} context-parallel "
          "ranks does not divide into the blocks of 16 that fp8 products take",
      fix="make --seq-length a multiple of 16 x --context-parallel-size")
def fp8_tokens_divide(args: Any) -> bool:
    tokens = args.micro_batch_size * (args.seq_length or 0) // args.context_parallel_size
    return args.fp8 is None or tokens % 16 == 0


@rule(GIVEN, "--fp8-param-gather", "--use-distributed-optimizer", bad="--bf16 --fp8-format hybrid --fp8-param-gather",
      why="parameters are only gathered after updates of the distributed optimizer", fix="add --use-distributed-optimizer")
def fp8_parameters_need_the_distributed_optimizer(args: Any) -> bool:
    return not args.fp8_param_gather or args.use_distributed_optimizer


@rule(DERIVED, "--fp8-param-gather", "--fp16", "--loss-scale",
      bad="--fp16 --fp8-format hybrid --fp8-param-gather --use-distributed-optimizer",
      why="a step that is skipped for its loss scale would leave weights rounded by the scales of an earlier step",
      fix="train with --bf16 and no --loss-scale, or drop --fp8-param-gather")
def fp8_parameters_are_updated_in_every_step(args: Any) -> bool:
    return not args.fp8_param_gather or not (args.fp16 or args.loss_scale)


@rule(GIVEN, "--fp8-param-gather", "--enable-cuda-graph",
      bad="--bf16 --fp8-format hybrid --fp8-recipe tensorwise --fp8-param-gather --use-distributed-optimizer "
          "--enable-cuda-graph --attention-dropout 0 --hidden-dropout 0",
      why="a recorded layer rounds its weight itself, once", fix="drop --enable-cuda-graph or --fp8-param-gather")
def fp8_parameters_are_not_recorded(args: Any) -> bool:
    return not (args.fp8_param_gather and args.enable_cuda_graph)


@rule(DERIVED, "--fp8-param-gather", "--transformer-impl", bad="",
      why="Transformer Engine's layers keep their weights in the model's precision here",
      fix="add --transformer-impl local", device="cuda")
def fp8_parameters_need_own_layers(args: Any) -> bool:
    return not (args.fp8_param_gather and args.fp8 and args.transformer_impl == "transformer_engine")


@rule(GIVEN, "--fp8-recipe", "--fp8-amax-history-len", "--fp8-amax-compute-algo",
      bad="--fp8-format hybrid --fp8-recipe tensorwise --fp8-amax-history-len 16",
      why="tensorwise scales remember no earlier steps", fix="drop the history flags, or give --fp8-recipe delayed")
def tensorwise_scales_have_no_history(args: Any) -> bool:
    history = {"fp8_amax_history_len", "fp8_amax_compute_algo"} & set(args.args_given)
    return args.fp8_recipe == "delayed" or not history
