#!/usr/bin/env python3
"""Serve a GPT over HTTP: `torchrun --nproc-per-node N tools/run_text_generation_server.py --load DIR ...`.

Takes the flags of pretrain_gpt.py for the model and the tokenizer, or reads them from the checkpoint
(`--use-checkpoint-args`). How to draw tokens is said in each request; see docs/generation.md.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch.distributed as dist

from megatron.inference import text_generation_server as server
from megatron.inference.arguments import GENERATION, SERVING, add_server_arguments
from megatron.inference.start import load_model, start
from megatron.inference.turns import follow
from megatron.training.cli import run_main
from megatron.training.setup import ModelProvider
from megatron.training.utils import print_rank_0
from pretrain_gpt import model_provider


def serve(provider: ModelProvider) -> None:
    """Load what `provider` builds, then serve on global rank 0 until a signal; the other ranks take part."""
    if os.environ.get("RANK", "0") == "0":
        server.require_http_packages()
    args = start(add_server_arguments, [*GENERATION, *SERVING])
    if args.load is None:
        print_rank_0("WARNING: without --load the weights are random, and so is what the server says")
    elif not args.exit_on_missing_checkpoint:
        print_rank_0("WARNING: --exit-on-missing-checkpoint is on: there is nothing to serve without weights")
    model = load_model(provider, args)
    if dist.get_rank() == 0:
        server.MegatronServer(model, strict_http_status=args.strict_http_status).run("0.0.0.0", args.port)
    else:
        follow(model)


def main() -> None:
    """Serve a GPT."""
    serve(model_provider)


if __name__ == "__main__":
    run_main(main)
