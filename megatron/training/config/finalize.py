"""From parsed arguments to finished ones: an ordered list of small derivations.

Each step says what it reads and writes. It returns a notice for the start-up report where it changed something the
user might have meant otherwise. Checks live in `rules.py`; a step raises only where its own arithmetic cannot be done.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron.core import device
from megatron.core.datasets.utils import get_blend_from_list
from megatron.core.datasets.utils_s3 import is_object_storage_path
from megatron.core.errors import FlagError
from megatron.core.flags import Step, step
from megatron.core.kernels import capability

STEPS: list[Step] = []
DEFAULT_SPLIT = "969, 30, 1"


def overlay_defaults(args: Any, defaults: dict[str, Any]) -> list[str]:
    """Give arguments that are None (or missing) an entry script's defaults; returns notices about the others."""
    notices = []
    for name, value in defaults.items():
        present = getattr(args, name, None)
        if present is None:
            setattr(args, name, value)
        elif present != value:
            notices.append(f"{name} is {present!r}; the entry script's default would be {value!r}")
    return notices


def run(args: Any) -> list[str]:
    """Run all steps on `args` in order; returns their notices."""
    return [notice for each in STEPS if (notice := each.run(args)) is not None]


@step(STEPS, reads="ckpt_format", writes="use_dist_ckpt")
def checkpoint_format(args: Any) -> None:
    args.use_dist_ckpt = args.ckpt_format != "torch"


@step(STEPS, reads="encoder_pipeline_model_parallel_size encoder_tensor_model_parallel_size tensor_model_parallel_size",
      writes="encoder_tensor_model_parallel_size")  # fmt: skip
def encoder_tensor_size(args: Any) -> None:
    """An encoder with stages of its own is divided like the decoder unless told otherwise."""
    if args.encoder_pipeline_model_parallel_size > 0 and args.encoder_tensor_model_parallel_size == 0:
        args.encoder_tensor_model_parallel_size = args.tensor_model_parallel_size


@step(STEPS, reads="world_size tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size "
      "encoder_tensor_model_parallel_size encoder_pipeline_model_parallel_size",
      writes="data_parallel_size")  # fmt: skip
def data_parallel_size(args: Any) -> None:
    """Ranks that one replica of the model does not need hold further replicas."""
    encoder = args.encoder_tensor_model_parallel_size * args.encoder_pipeline_model_parallel_size
    decoder = args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    replica = (encoder + decoder) * args.context_parallel_size
    if replica < 1 or args.world_size % replica:
        encoder_flags = ", --encoder-tensor-model-parallel-size, --encoder-pipeline-model-parallel-size"
        raise FlagError(
            "--tensor-model-parallel-size, --pipeline-model-parallel-size, --context-parallel-size"
            + (encoder_flags if encoder else ""),
            f"one replica of the model needs {replica} ranks, which does not divide the {args.world_size} launched",
            f"start a multiple of {max(replica, 1)} processes, or lower one of the sizes",
        )
    args.data_parallel_size = args.world_size // replica


@step(STEPS, reads="pipeline_model_parallel_size standalone_embedding_stage",
      writes="transformer_pipeline_model_parallel_size")  # fmt: skip
def transformer_stages(args: Any) -> None:
    """A stage that holds the embedding alone holds no layers."""
    stages = args.pipeline_model_parallel_size
    args.transformer_pipeline_model_parallel_size = stages - 1 if args.standalone_embedding_stage else stages


@step(STEPS, reads="pipeline_model_parallel_split_rank pipeline_model_parallel_size",
      writes="encoder_pipeline_model_parallel_size pipeline_model_parallel_size")  # fmt: skip
def split_rank(args: Any) -> None:
    """Older spelling of an encoder with its own stages; the sizes above keep counting all stages, as in v0.9."""
    if args.pipeline_model_parallel_split_rank is not None:
        args.encoder_pipeline_model_parallel_size = args.pipeline_model_parallel_split_rank
        args.pipeline_model_parallel_size -= args.pipeline_model_parallel_split_rank


@step(STEPS, reads="recompute_activations", writes="recompute_granularity batch_size warmup model_parallel_size "
      "checkpoint_activations recompute_activations")  # fmt: skip
def retired_names(args: Any) -> None:
    """Attributes that v0.9 removes once they have done their work; nothing downstream expects them."""
    if getattr(args, "recompute_activations", False):
        args.recompute_granularity = "selective"
    for name in (
        "batch_size",
        "warmup",
        "model_parallel_size",
        "checkpoint_activations",
        "recompute_activations",
    ):
        if hasattr(args, name):
            delattr(args, name)


@step(STEPS, reads="data_path split", writes="split")
def data_split(args: Any) -> str | None:
    if args.data_path is None or args.split is not None:
        return None
    args.split = DEFAULT_SPLIT
    return f"--split is not given: documents go to training, validation and test as {DEFAULT_SPLIT}"


@step(STEPS, reads="s3_cache_path data_path train_data_path valid_data_path test_data_path", writes="")
def object_storage(args: Any) -> str | None:
    given = (args.data_path, args.train_data_path, args.valid_data_path, args.test_data_path)
    paths = [path for paths in given for path in paths or ()]
    if args.s3_cache_path is None or not paths or any(map(is_object_storage_path, paths)):
        return None
    return "--s3-cache-path has no effect: no data path is in object storage"


@step(STEPS, reads="renormalize_blend_weights num_dataset_builder_threads data_path train_data_path valid_data_path "
      "test_data_path", writes="")  # fmt: skip
def blended_data(args: Any) -> str | None:
    given = (args.data_path, args.train_data_path, args.valid_data_path, args.test_data_path)
    blends = [get_blend_from_list(paths) for paths in given if paths]
    if not blends or any(blend is not None and len(blend[0]) > 1 for blend in blends):
        return None
    flags = {
        "--renormalize-blend-weights": args.renormalize_blend_weights,
        "--num-dataset-builder-threads": args.num_dataset_builder_threads > 1,
    }
    typed = [name for name, is_typed in flags.items() if is_typed]
    return f"{', '.join(typed)}: no effect on one dataset, which is no blend" if typed else None


@step(STEPS, reads="wandb_project tensorboard_dir", writes="")
def weights_and_biases(args: Any) -> str | None:
    if not args.wandb_project or args.tensorboard_dir:
        return None
    return "--wandb-project receives no losses: they go there with TensorBoard's entries, so add --tensorboard-dir"


@step(STEPS, reads="global_batch_size micro_batch_size data_parallel_size", writes="global_batch_size")
def global_batch_size(args: Any) -> str | None:
    if args.global_batch_size is not None:
        return None
    args.global_batch_size = args.micro_batch_size * args.data_parallel_size
    return f"--global-batch-size is not given: {args.global_batch_size} (micro batch x data-parallel size)"


@step(STEPS, reads="num_layers_per_virtual_pipeline_stage num_layers encoder_num_layers "
      "transformer_pipeline_model_parallel_size",
      writes="virtual_pipeline_model_parallel_size overlap_p2p_comm align_param_gather")  # fmt: skip
def virtual_stages(args: Any) -> None:
    """Without interleaving there is nothing to overlap stage communication with, nor gathers to align."""
    if args.num_layers_per_virtual_pipeline_stage is None:
        args.virtual_pipeline_model_parallel_size = None
        args.overlap_p2p_comm = False
        args.align_param_gather = False
        return
    layers = args.num_layers if args.num_layers is not None else args.encoder_num_layers
    per_stage = layers // args.transformer_pipeline_model_parallel_size
    args.virtual_pipeline_model_parallel_size = per_stage // args.num_layers_per_virtual_pipeline_stage


@step(STEPS, reads="fp16 bf16 loss_scale",
      writes="params_dtype check_for_nan_in_loss_and_grad accumulate_allreduce_grads_in_fp32")  # fmt: skip
def precision(args: Any) -> str | None:
    """A dynamic loss scale expects overflows, so they are not errors; bfloat16 sums are too coarse for gradients."""
    notice = None
    args.params_dtype = torch.float32
    if args.fp16:
        args.params_dtype = torch.float16
        if not args.loss_scale:
            if not args.check_for_nan_in_loss_and_grad:
                notice = "--no-check-for-nan-in-loss-and-grad has no effect: beside a dynamic loss scale nothing is checked"
            args.check_for_nan_in_loss_and_grad = False
    if args.bf16:
        args.params_dtype = torch.bfloat16
        args.accumulate_allreduce_grads_in_fp32 = True
    return notice


@step(STEPS, reads="dataloader_type", writes="dataloader_type")
def dataloader_type(args: Any) -> None:
    if args.dataloader_type is None:
        args.dataloader_type = "single"


@step(
    STEPS,
    reads="",
    writes="consumed_train_samples skipped_train_samples consumed_valid_samples variable_seq_lengths",
)
def progress_counters(args: Any) -> None:
    args.consumed_train_samples = 0
    args.skipped_train_samples = 0
    args.consumed_valid_samples = 0
    args.variable_seq_lengths = False


@step(STEPS, reads="num_layers encoder_num_layers", writes="num_layers encoder_num_layers")
def layer_counts(args: Any) -> None:
    if args.num_layers is None:
        args.num_layers = args.encoder_num_layers
    else:
        args.encoder_num_layers = args.num_layers


@step(STEPS, reads="ffn_hidden_size swiglu hidden_size", writes="ffn_hidden_size")
def mlp_width(args: Any) -> None:
    """SwiGLU has three matrices instead of two: 2/3 of the width costs the same, cut to a multiple of 64."""
    if args.ffn_hidden_size is None:
        width = 4 * args.hidden_size
        args.ffn_hidden_size = int(width * 2 / 3 / 64) * 64 if args.swiglu else width


@step(STEPS, reads="kv_channels hidden_size num_attention_heads", writes="kv_channels")
def head_size(args: Any) -> None:
    if args.kv_channels is None:
        args.kv_channels = args.hidden_size // args.num_attention_heads


@step(STEPS, reads="seq_length encoder_seq_length", writes="seq_length encoder_seq_length")
def sequence_lengths(args: Any) -> None:
    if args.seq_length is None:
        args.seq_length = args.encoder_seq_length
    else:
        args.encoder_seq_length = args.seq_length


@step(STEPS, reads="weight_decay_incr_style weight_decay", writes="start_weight_decay end_weight_decay")
def weight_decay(args: Any) -> None:
    if args.weight_decay_incr_style == "constant":
        args.start_weight_decay = args.end_weight_decay = args.weight_decay


@step(STEPS, reads="lr_decay_style lr_warmup_fraction lr_decay_iters lr_decay_samples", writes="")
def decay_length(args: Any) -> str | None:
    """Beside a constant rate the length of the decay is only what --lr-warmup-fraction is a share of."""
    lengths = {"--lr-decay-iters": args.lr_decay_iters, "--lr-decay-samples": args.lr_decay_samples}
    given = [name for name, length in lengths.items() if length is not None]
    if not given or args.lr_decay_style != "constant" or args.lr_warmup_fraction is not None:
        return None
    return f"{given[0]} has no effect beside --lr-decay-style constant"


@step(STEPS, reads="profile profile_step_start profile_ranks train_iters world_size", writes="")
def profiled_steps(args: Any) -> str | None:
    if not args.profile:
        return None
    if args.train_iters and args.profile_step_start >= args.train_iters:
        return (
            f"--profile has no effect: it would start after step {args.profile_step_start}, and training ends at "
            f"{args.train_iters}; give --profile-step-start"
        )
    absent = [rank for rank in args.profile_ranks if not 0 <= rank < args.world_size]
    return f"--profile-ranks: there is no rank {', '.join(map(str, absent))}" if absent else None


@step(STEPS, reads="sequence_parallel tensor_model_parallel_size",
      writes="sequence_parallel async_tensor_model_parallel_allreduce")  # fmt: skip
def sequence_parallel(args: Any) -> str | None:
    """With sequence parallelism the reduction is a reduce-scatter with an overlap of its own."""
    notice = None
    if args.sequence_parallel and args.tensor_model_parallel_size == 1:
        args.sequence_parallel = False
        notice = "--sequence-parallel is off: it divides over tensor-parallel ranks, and there is one"
    if args.sequence_parallel:
        args.async_tensor_model_parallel_allreduce = False
    return notice


@step(STEPS, reads="add_bias_linear", writes="bias_gelu_fusion")
def bias_fusion(args: Any) -> None:
    if not args.add_bias_linear:
        args.bias_gelu_fusion = False


@step(STEPS, reads="use_rotary_position_embeddings", writes="position_embedding_type")
def position_embedding(args: Any) -> None:
    if args.use_rotary_position_embeddings:
        args.position_embedding_type = "rope"


@step(STEPS, reads="num_experts", writes="num_experts")
def experts(args: Any) -> None:
    if args.num_experts == 0:
        args.num_experts = None


@step(STEPS, reads="apply_query_key_layer_scaling", writes="attention_softmax_in_fp32")
def softmax_precision(args: Any) -> None:
    """Unscaled scores may not fit half precision."""
    if args.apply_query_key_layer_scaling:
        args.attention_softmax_in_fp32 = True


@step(STEPS, reads="fp8 first_last_layers_bf16 num_layers num_layers_at_start_in_bf16 num_layers_at_end_in_bf16",
      writes="")  # fmt: skip
def fp8_layers(args: Any) -> str | None:
    ends = args.num_layers_at_start_in_bf16 + args.num_layers_at_end_in_bf16
    if args.fp8 is None or not args.first_last_layers_bf16 or ends < args.num_layers:
        return None
    return "--fp8-format has no effect: --first-last-layers-bf16 keeps every layer out of it"


@step(STEPS, reads="moe_use_upcycling", writes="no_load_optim no_load_rng")
def upcycling(args: Any) -> None:
    """The dense checkpoint's optimizer and random state do not fit the model it turns into."""
    if args.moe_use_upcycling:
        args.no_load_optim = args.no_load_rng = True


@step(STEPS, reads="perform_initialization load pretrained_checkpoint", writes="")
def initial_weights(args: Any) -> str | None:
    if args.perform_initialization or args.load or args.pretrained_checkpoint:
        return None
    return "--no-initialization: without --load the weights are whatever the memory held"


@step(STEPS, reads="transformer_impl", writes="transformer_impl")
def transformer_implementation(args: Any) -> str | None:
    """The default is a preference; who typed it has been stopped by a rule where it cannot be met."""
    machine = capability.probe()
    missing = "a CUDA device" if not machine.has_cuda else "Transformer Engine"
    if args.transformer_impl != "transformer_engine" or (
        machine.has_cuda and "transformer_engine" in machine.packages
    ):
        return None
    args.transformer_impl = "local"
    return f"--transformer-impl is local: transformer_engine, the default, needs {missing}, which is not here"


@step(STEPS, reads="distributed_backend", writes="distributed_backend")
def backend(args: Any) -> str | None:
    if capability.probe().has_cuda:
        return None
    args.distributed_backend, notice = device.backend_for(args.distributed_backend)
    return notice
