"""Rules about BERT and T5, which learn from masked text; their entry scripts check them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.flags import Rule, rule
from megatron.training.config.rules import causal_models

BERT: list[Rule] = [*causal_models.GPT]
T5: list[Rule] = [*causal_models.GPT]


def _for_both(
    *flags: str, bad: str, why: str, fix: str
) -> Callable[[Callable[[Any], bool]], Callable[[Any], bool]]:
    def register(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
        for rules in (BERT, T5):
            rule(rules, *flags, bad=bad, why=why, fix=fix)(holds)
        return holds

    return register


# fmt: off
@_for_both("--mock-data", bad="-data-path --mock-data", why="synthetic tokens have no sentences and no words to mask",
           fix="preprocess a text with tools/preprocess_data.py --split-sentences and give it as --data-path")
def data_is_real(args: Any) -> bool:
    return not args.mock_data


@_for_both("--context-parallel-size", bad="--context-parallel-size 2",
           why="attention in both directions under a padding mask is not divided along the sequence",
           fix="use --tensor-model-parallel-size with --sequence-parallel to divide long samples")
def sequence_is_whole(args: Any) -> bool:
    return args.context_parallel_size == 1


@_for_both("--num-experts", bad="--num-experts 2", why="only GPT has layers of experts", fix="drop it")
def layers_are_dense(args: Any) -> bool:
    return args.num_experts is None


@_for_both("--use-rope-scaling", bad="--use-rope-scaling --position-embedding-type rope",
           why="only GPT's rotary frequencies are scaled", fix="drop it")
def rotation_is_plain(args: Any) -> bool:
    return not args.use_rope_scaling


@_for_both("--defer-embedding-wgrad-compute", bad="--defer-embedding-wgrad-compute --pipeline-model-parallel-size 2",
           why="only causal models keep their output layer's gradient products for later", fix="drop it")
def output_gradient_is_computed_at_once(args: Any) -> bool:
    return not args.defer_embedding_wgrad_compute


@rule(BERT, "--calculate-per-token-loss", bad="--calculate-per-token-loss",
      why="BERT's loss has a part per word and a part per sample, so no count divides both", fix="drop it")
def loss_is_a_mean(args: Any) -> bool:
    return not args.calculate_per_token_loss


@rule(T5, "--decoder-seq-length", bad="-decoder-seq-length", why="the length of the decoder's input is not given",
      fix="for instance --decoder-seq-length 128")
def decoder_length_given(args: Any) -> bool:
    return args.decoder_seq_length is not None


@rule(T5, "--sequence-parallel", "--decoder-seq-length", "--tensor-model-parallel-size",
      bad="--sequence-parallel --tensor-model-parallel-size 2 --decoder-seq-length 15",
      why="{a.decoder_seq_length} decoder tokens cannot be divided evenly over {a.tensor_model_parallel_size} ranks",
      fix="make the length a multiple of the tensor-parallel size")
def decoder_sequence_divides(args: Any) -> bool:
    return not args.sequence_parallel or args.decoder_seq_length % args.tensor_model_parallel_size == 0


@rule(T5, "--group-query-attention", "--num-query-groups", bad="--group-query-attention --num-query-groups 2",
      why="attention to the encoder's output has one key and value per query head", fix="drop --group-query-attention")
def cross_attention_is_not_grouped(args: Any) -> bool:
    return not args.group_query_attention or args.num_query_groups == args.num_attention_heads


@rule(T5, "--vocab-extra-ids", bad="-vocab-extra-ids", why="there are no tokens to stand for the masked spans",
      fix="for instance --vocab-extra-ids 100")
def sentinels_exist(args: Any) -> bool:
    return args.vocab_extra_ids > 0


@rule(T5, "--pipeline-model-parallel-size", "--encoder-pipeline-model-parallel-size", "--pipeline-model-parallel-split-rank",
      bad="--pipeline-model-parallel-size 2", why="it is not said which of the stages are the encoder's",
      fix="give the encoder's number of stages as --encoder-pipeline-model-parallel-size (the other number is then the "
          "decoder's), or the first decoder stage as --pipeline-model-parallel-split-rank")
def stages_are_assigned(args: Any) -> bool:
    return args.pipeline_model_parallel_size == 1 or args.encoder_pipeline_model_parallel_size > 0


@rule(T5, "--encoder-tensor-model-parallel-size", "--tensor-model-parallel-size",
      bad="--encoder-pipeline-model-parallel-size 1 --encoder-tensor-model-parallel-size 1 --tensor-model-parallel-size 2",
      why="encoder and decoder share their embedding, which must be cut alike in both",
      fix="leave it out: the encoder is divided like the decoder")
def stacks_are_cut_alike(args: Any) -> bool:
    return args.encoder_tensor_model_parallel_size in (0, args.tensor_model_parallel_size)


@rule(T5, "--encoder-num-layers", "--encoder-pipeline-model-parallel-size",
      bad="--encoder-pipeline-model-parallel-size 3",
      why="{a.encoder_num_layers} encoder layers cannot be divided evenly over "
          "{a.encoder_pipeline_model_parallel_size} stages",
      fix="choose numbers that divide")
def encoder_layers_divide(args: Any) -> bool:
    stages = args.encoder_pipeline_model_parallel_size
    return stages == 0 or args.encoder_num_layers % stages == 0


@rule(T5, "--num-layers-per-virtual-pipeline-stage", bad="--encoder-pipeline-model-parallel-size 1 "
      "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
      why="an encoder-decoder model has no interleaved schedule", fix="drop it")
def stages_are_plain(args: Any) -> bool:
    return args.virtual_pipeline_model_parallel_size is None
