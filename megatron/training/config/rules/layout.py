"""Rules about the division of model and work over ranks."""

from __future__ import annotations

import math
from typing import Any

from megatron.core.flags import rule
from megatron.training.config.rules.base import DERIVED, GIVEN, ONE_STACK
from megatron.training.config.rules.model import total_layers


def layer_stages(args: Any) -> int:
    return args.pipeline_model_parallel_size - (1 if args.standalone_embedding_stage else 0)


def stack_depth(args: Any) -> int:
    """Layers that the pipeline stages share: of the decoder, where it has its own number."""
    return args.num_layers if args.decoder_num_layers is None else args.decoder_num_layers


# fmt: off
@rule(GIVEN, "--encoder-tensor-model-parallel-size", "--encoder-pipeline-model-parallel-size",
      bad="--encoder-tensor-model-parallel-size 1",
      why="an encoder divided in its own way needs stages of its own",
      fix="give --encoder-pipeline-model-parallel-size")
def encoder_has_stages(args: Any) -> bool:
    return args.encoder_tensor_model_parallel_size <= 0 or args.encoder_pipeline_model_parallel_size > 0


@rule(GIVEN, "--encoder-tensor-model-parallel-size", "--num-attention-heads",
      bad="--encoder-tensor-model-parallel-size 3 --encoder-pipeline-model-parallel-size 1 "
          "--tensor-model-parallel-size 4",
      why="{a.num_attention_heads} heads cannot be divided evenly over {a.encoder_tensor_model_parallel_size} ranks",
      fix="choose a size that divides the number of heads")
def encoder_heads_divide(args: Any) -> bool:
    size = args.encoder_tensor_model_parallel_size
    return size <= 0 or args.num_attention_heads % size == 0


@rule(GIVEN, "--encoder-tensor-model-parallel-size", "--tensor-model-parallel-size",
      bad="--encoder-tensor-model-parallel-size 2 --encoder-pipeline-model-parallel-size 1",
      why="an encoder over {a.encoder_tensor_model_parallel_size} ranks cannot feed a decoder over "
          "{a.tensor_model_parallel_size}",
      fix="raise --tensor-model-parallel-size to at least the encoder's")
def encoder_is_not_wider(args: Any) -> bool:
    return args.encoder_tensor_model_parallel_size <= args.tensor_model_parallel_size


@rule(GIVEN, "--pipeline-model-parallel-split-rank", "--pipeline-model-parallel-size",
      bad="--pipeline-model-parallel-size 2 --pipeline-model-parallel-split-rank 2",
      why="of {a.pipeline_model_parallel_size} stages {a.pipeline_model_parallel_split_rank} go to the encoder, "
          "and the decoder needs one",
      fix="give a split rank below the pipeline size")
def split_leaves_a_decoder(args: Any) -> bool:
    split = args.pipeline_model_parallel_split_rank
    return split is None or split < args.pipeline_model_parallel_size


@rule(GIVEN, "--num-layers-per-virtual-pipeline-stage", bad="--num-layers-per-virtual-pipeline-stage 0 "
      "--pipeline-model-parallel-size 2", why="chunks of {a.num_layers_per_virtual_pipeline_stage} layers hold nothing",
      fix="give at least one layer")
def chunks_hold_layers(args: Any) -> bool:
    return args.num_layers_per_virtual_pipeline_stage is None or args.num_layers_per_virtual_pipeline_stage >= 1


@rule(GIVEN, "--num-layers-per-virtual-pipeline-stage", "--pipeline-model-parallel-size",
      bad="--num-layers-per-virtual-pipeline-stage 2",
      why="there is no pipeline to interleave", fix="use two or more pipeline stages")
def interleaving_needs_a_pipeline(args: Any) -> bool:
    return args.num_layers_per_virtual_pipeline_stage is None or args.pipeline_model_parallel_size > 1


@rule(GIVEN, "--num-layers-per-virtual-pipeline-stage", "--no-overlap-p2p-communication",
      "--pipeline-model-parallel-size",
      bad="--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1 --no-overlap-p2p-communication",
      why="two interleaved stages send both directions to the same peer, which needs overlapped communication",
      fix="drop --no-overlap-p2p-communication, or use more than two stages")
def interleaving_two_stages_overlaps(args: Any) -> bool:
    interleaved = args.num_layers_per_virtual_pipeline_stage is not None
    return not interleaved or args.overlap_p2p_comm or args.pipeline_model_parallel_size > 2


@rule(GIVEN, "--standalone-embedding-stage", "--pipeline-model-parallel-size", bad="--standalone-embedding-stage",
      why="no stage is left for the layers", fix="use two or more pipeline stages")
def layers_have_a_stage(args: Any) -> bool:
    return layer_stages(args) >= 1


@rule(GIVEN, "--num-layers", "--pipeline-model-parallel-size", "--num-layers-per-virtual-pipeline-stage",
      bad="--num-layers 7 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
      why="an interleaved pipeline divides its layers evenly over the stages",
      fix="choose a number of layers that the stages divide")
def interleaved_layers_divide(args: Any) -> bool:
    return args.num_layers_per_virtual_pipeline_stage is None or total_layers(args) % layer_stages(args) == 0


@rule(GIVEN, "--num-layers-per-virtual-pipeline-stage", "--num-layers",
      bad="--num-layers 12 --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 4",
      why="a stage's layers cannot be cut evenly into chunks of {a.num_layers_per_virtual_pipeline_stage}",
      fix="choose a chunk that divides the layers of one stage")
def chunks_divide_a_stage(args: Any) -> bool:
    chunk = args.num_layers_per_virtual_pipeline_stage
    return chunk is None or (total_layers(args) // layer_stages(args)) % chunk == 0


@rule(DERIVED, "--context-parallel-size", "--seq-length", bad="--context-parallel-size 2 --seq-length 34",
      why="{a.seq_length} tokens cannot be cut into two equal pieces for each of {a.context_parallel_size} ranks",
      fix="make the length a multiple of twice the context-parallel size")
def context_divides_the_sample(args: Any) -> bool:
    return args.context_parallel_size <= 1 or args.seq_length % (2 * args.context_parallel_size) == 0


@rule(DERIVED, "--context-parallel-algo", "--context-parallel-size", "--num-attention-heads",
      bad="--context-parallel-algo a2a --context-parallel-size 2 --num-attention-heads 3 --kv-channels 8",
      why="the all-to-all deals each tensor-parallel rank's heads, whole groups of them, out to "
          "{a.context_parallel_size} ranks, and they do not divide",
      fix="give --context-parallel-algo ring, or change one of the numbers")
def context_divides_the_heads(args: Any) -> bool:
    size, tensor_ranks = args.context_parallel_size, args.tensor_model_parallel_size
    heads = args.num_attention_heads // tensor_ranks
    groups = args.num_query_groups // tensor_ranks if args.group_query_attention else heads
    dealt = math.lcm(size, max(groups, 1))  # groups are repeated until there is one for each rank
    return args.context_parallel_algo != "a2a" or size == 1 or heads % dealt == 0


@rule(DERIVED, "--sequence-parallel", "--seq-length", "--tensor-model-parallel-size",
      bad="--sequence-parallel --tensor-model-parallel-size 4 --seq-length 30",
      why="{a.seq_length} tokens cannot be divided evenly over {a.tensor_model_parallel_size} ranks",
      fix="make the length a multiple of context x tensor size")
def sequence_divides(args: Any) -> bool:
    ranks = args.tensor_model_parallel_size * args.context_parallel_size
    return not args.sequence_parallel or args.seq_length % ranks == 0


@rule(GIVEN, "--tp-comm-overlap", "--sequence-parallel", bad="--tp-comm-overlap",
      why="the transfers it overlaps are those of sequence parallelism", fix="add --sequence-parallel")
def overlap_has_transfers(args: Any) -> bool:
    return not args.tp_comm_overlap or args.sequence_parallel


@rule(GIVEN, "--use-tp-pp-dp-mapping", "--context-parallel-size", "--expert-model-parallel-size",
      bad="--use-tp-pp-dp-mapping --context-parallel-size 2",
      why="this order of ranks has no place for context or expert parallelism", fix="drop --use-tp-pp-dp-mapping")
def order_has_three_axes(args: Any) -> bool:
    return not args.use_tp_pp_dp_mapping or args.context_parallel_size * args.expert_model_parallel_size <= 1


@rule(GIVEN, "--defer-embedding-wgrad-compute", "--overlap-grad-reduce",
      bad="--defer-embedding-wgrad-compute --overlap-grad-reduce --pipeline-model-parallel-size 2",
      why="the deferred gradient is computed after the pipeline has drained, when its bucket is reduced already",
      fix="drop one of the two")
def deferred_gradients_are_not_overlapped(args: Any) -> bool:
    return not (args.defer_embedding_wgrad_compute and args.overlap_grad_reduce)


@rule(GIVEN, "--overlap-param-gather", "--use-distributed-optimizer", bad="--overlap-param-gather",
      why="only the distributed optimizer gathers parameters", fix="add --use-distributed-optimizer")
def param_gather_needs_distributed_optimizer(args: Any) -> bool:
    return not args.overlap_param_gather or args.use_distributed_optimizer


@rule(GIVEN, "--overlap-param-gather", "--overlap-grad-reduce", bad="--overlap-param-gather --use-distributed-optimizer",
      why="parameters are gathered in the buckets in which gradients are reduced", fix="add --overlap-grad-reduce")
def param_gather_needs_grad_reduce(args: Any) -> bool:
    return not args.overlap_param_gather or args.overlap_grad_reduce


@rule(GIVEN, "--overlap-param-gather-with-optimizer-step", "--use-distributed-optimizer", "--overlap-param-gather",
      bad="--overlap-param-gather-with-optimizer-step",
      why="it starts the distributed optimizer's overlapped gather earlier",
      fix="add --use-distributed-optimizer --overlap-param-gather --overlap-grad-reduce")
def early_gather_needs_gather(args: Any) -> bool:
    return not args.overlap_param_gather_with_optimizer_step or (
        args.use_distributed_optimizer and args.overlap_param_gather)


@rule(GIVEN, "--overlap-param-gather-with-optimizer-step", "--num-layers-per-virtual-pipeline-stage",
      bad="--overlap-param-gather-with-optimizer-step --use-distributed-optimizer --overlap-param-gather "
          "--overlap-grad-reduce",
      why="it updates one model chunk while another is gathered", fix="give --num-layers-per-virtual-pipeline-stage")
def early_gather_needs_chunks(args: Any) -> bool:
    return not args.overlap_param_gather_with_optimizer_step or (
        args.num_layers_per_virtual_pipeline_stage is not None)


@rule(GIVEN, "--overlap-param-gather-with-optimizer-step", "--ckpt-format",
      bad="--overlap-param-gather-with-optimizer-step --use-distributed-optimizer --overlap-param-gather "
          "--overlap-grad-reduce --num-layers 8 --pipeline-model-parallel-size 2 "
          "--num-layers-per-virtual-pipeline-stage 2",
      why="its optimizer, one per model chunk, cannot be saved as {a.ckpt_format}", fix="add --ckpt-format torch")
def early_gather_needs_plain_checkpoints(args: Any) -> bool:
    return not args.overlap_param_gather_with_optimizer_step or args.ckpt_format == "torch"


@rule(DERIVED, "--ddp-bucket-size", bad="--ddp-bucket-size 0", why="buckets of {a.ddp_bucket_size} parameters hold none",
      fix="give a positive size")
def buckets_hold_parameters(args: Any) -> bool:
    return args.ddp_bucket_size is None or args.ddp_bucket_size >= 1


@rule(DERIVED, "--distributed-timeout-minutes", bad="--distributed-timeout-minutes 0",
      why="collectives that may take {a.distributed_timeout_minutes} minutes all fail", fix="give a positive number")
def collectives_have_time(args: Any) -> bool:
    return args.distributed_timeout_minutes >= 1


@rule(ONE_STACK, "--encoder-pipeline-model-parallel-size", "--pipeline-model-parallel-split-rank",
      bad="--encoder-pipeline-model-parallel-size 1",
      why="the model has one stack of layers, so there is no encoder to give stages to",
      fix="drop them, and divide the layers by --pipeline-model-parallel-size")
def no_stage_is_an_encoders(args: Any) -> bool:
    return not args.encoder_pipeline_model_parallel_size
