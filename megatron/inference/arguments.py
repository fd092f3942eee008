"""Flags of programs that generate text, and what the training flags must hold for them."""

from __future__ import annotations

from argparse import ArgumentParser
from dataclasses import dataclass
from typing import Any

from megatron.core.flags import Rule, flag, flags_of, rule
from megatron.training.config.parser import add_flag

#: Checked for every program that generates.
GENERATION: list[Rule] = []
#: Checked for the server too.
SERVING: list[Rule] = []


@dataclass
class ServerConfig:
    """How the server listens and answers."""

    # fmt: off
    port: int = flag(5000, group="text generation", help="Port of the HTTP server, on all addresses of its machine.")
    strict_http_status: bool = flag(
        False, group="text generation",
        help="Answer refused requests with HTTP status 400 instead of v0.9's, which is 200 for most of them.")
    # fmt: on


def add_server_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags of the server."""
    group = parser.add_argument_group("text generation", "How the server listens and answers.")
    for declared in flags_of(ServerConfig):
        add_flag(group, declared)
    return parser


# fmt: off
@rule(GENERATION, "--num-layers-per-virtual-pipeline-stage",
      bad="--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
      why="interleaved chunks cannot generate text", fix="drop it: a checkpoint in torch_dist format loads in any layout")
def stages_are_plain(args: Any) -> bool:
    return args.virtual_pipeline_model_parallel_size is None


@rule(GENERATION, "--sequence-parallel", bad="--tensor-model-parallel-size 2 --sequence-parallel",
      why="text is generated token by token, and one token cannot be divided over tensor ranks",
      fix="drop it: a checkpoint loads without")
def sequence_is_whole(args: Any) -> bool:
    return not args.sequence_parallel


@rule(GENERATION, "--context-parallel-size", bad="--context-parallel-size 2",
      why="text is generated token by token, and one token cannot be divided over context ranks",
      fix="use --tensor-model-parallel-size or --pipeline-model-parallel-size")
def context_is_whole(args: Any) -> bool:
    return args.context_parallel_size == 1


@rule(SERVING, "--tensor-model-parallel-size", "--pipeline-model-parallel-size", bad="@2",
      why="{a.world_size} ranks are {a.data_parallel_size} copies of the model, and the server has work for one",
      fix="start as many ranks as the product of these two, or divide the model further")
def one_replica(args: Any) -> bool:
    return args.data_parallel_size == 1
