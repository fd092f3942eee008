"""Rules about GPT and about hybrid models, which differ in their stack of layers; their entry scripts check them."""

from __future__ import annotations

from typing import Any

from megatron.core.flags import Rule, rule

GPT: list[Rule] = []
HYBRID: list[Rule] = []

_STACK = "megatron.core.models.mamba.mamba_layer_specs mamba_stack_spec"


# fmt: off
@rule(GPT, "--hybrid-attention-ratio", "--hybrid-mlp-ratio", "--hybrid-override-pattern",
      bad="--hybrid-attention-ratio 0.5", why="all layers of this model are of one kind",
      fix="train with pretrain_mamba.py, or drop them")
def layers_are_alike(args: Any) -> bool:
    return not (args.hybrid_attention_ratio or args.hybrid_mlp_ratio or args.hybrid_override_pattern)


@rule(GPT, "--spec", bad=f"--spec {_STACK}", why="it names a stack of several kinds of layers",
      fix="train with pretrain_mamba.py, or drop it")
def spec_is_of_a_layer(args: Any) -> bool:
    return not args.spec or args.spec[-1] != "mamba_stack_spec"


@rule(HYBRID, "--spec", bad="--spec", why="it is not said what the layers of a hybrid model are made of",
      fix=f"add --spec {_STACK}")
def stack_given(args: Any) -> bool:
    return args.spec is not None and len(args.spec) == 2


@rule(HYBRID, "--context-parallel-size", bad="--context-parallel-size 2",
      why="the state of a Mamba layer is handed on along the whole sequence, which is not divided",
      fix="use --tensor-model-parallel-size with --sequence-parallel to divide long samples")
def sequence_is_whole(args: Any) -> bool:
    return args.context_parallel_size == 1


@rule(HYBRID, "--num-layers-per-virtual-pipeline-stage",
      bad="--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
      why="a hybrid stack has no interleaved schedule", fix="drop it")
def stages_are_plain(args: Any) -> bool:
    return args.virtual_pipeline_model_parallel_size is None


@rule(HYBRID, "--fp8-format", bad="--fp8-format hybrid", why="the rows of a Mamba layer's projection do not divide "
      "into the blocks that fp8 products take", fix="drop it, and use --bf16")
def products_are_wide(args: Any) -> bool:
    return args.fp8 is None


@rule(HYBRID, "--enable-cuda-graph", bad="--enable-cuda-graph --attention-dropout 0 --hidden-dropout 0",
      why="only layers of a transformer are recorded", fix="drop it")
def layers_are_not_recorded(args: Any) -> bool:
    return not args.enable_cuda_graph


@rule(HYBRID, "--qk-layernorm", bad="--qk-layernorm",
      why="what the attention layers are made of stands in --spec, and that has no norms of queries and keys",
      fix="drop it, and put them into a specification of your own")
def parts_follow_the_spec(args: Any) -> bool:
    return not args.qk_layernorm


@rule(HYBRID, "--use-rope-scaling", bad="--use-rope-scaling --position-embedding-type rope",
      why="a hybrid model's rotary frequencies are not scaled", fix="drop it")
def rotation_is_plain(args: Any) -> bool:
    return not args.use_rope_scaling
