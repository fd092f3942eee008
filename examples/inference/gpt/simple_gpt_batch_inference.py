#!/usr/bin/env python3
"""Complete a batch of prompts with the engine of megatron.core.inference.

    torchrun --nproc-per-node 4 examples/inference/gpt/simple_gpt_batch_inference.py --load DIR --use-checkpoint-args \
        --tokenizer-type GPT2BPETokenizer --vocab-file gpt2-vocab.json --merge-file gpt2-merges.txt \
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --num-tokens-to-generate 20 \
        --max-batch-size 4 --prompts "prompt one " "sample prompt two" "sample prompt 3"
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from megatron.core.errors import FlagError
from megatron.core.inference.common_inference_params import CommonInferenceParams
from megatron.core.inference.engines.mcore_engine import MCoreEngine
from megatron.core.inference.inference_request import InferenceRequest
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.text_generation_controllers.simple_text_generation_controller import (
    SimpleTextGenerationController,
)
from megatron.inference.arguments import GENERATION
from megatron.inference.start import check_prompts, load_model, start
from megatron.training import get_tokenizer
from megatron.training.cli import run_main
from pretrain_gpt import model_provider


def add_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What to generate, and how."""
    group = parser.add_argument_group("text generation")
    group.add_argument("--temperature", type=float, default=1.0, help="Sampling temperature.")
    group.add_argument(
        "--top_k", type=int, default=1, help="Draw from the k most probable tokens; 1 is greedy, 0 off."
    )
    group.add_argument(
        "--top_p", type=float, default=0.0, help="Draw from the most probable tokens of this mass."
    )
    group.add_argument("--return-log-probs", action="store_true", help="Show log-probabilities too.")
    group.add_argument("--num-tokens-to-generate", type=int, default=30, help="Tokens for each prompt.")
    group.add_argument("--prompts", metavar="P", nargs="+", type=str, help="Texts to complete.")
    group.add_argument("--max-batch-size", type=int, default=1, help="Prompts that are completed together.")
    return parser


def build_engine(model: Any, args: argparse.Namespace) -> MCoreEngine:
    """An engine over this rank's part of the model; the stages of a pipeline draw the same tokens from `--seed`."""
    controller = SimpleTextGenerationController(GPTInferenceWrapper(model, args), get_tokenizer())
    return MCoreEngine(controller, max_batch_size=args.max_batch_size, random_seed=args.seed)


def shown(request: InferenceRequest) -> dict[str, Any]:
    """What is printed of a completed request."""
    assert request.generated_tokens is not None, "the request is completed"
    result = {
        "id": request.request_id,
        "input_prompt": request.prompt,
        "generated_text": request.generated_text,
        "generated_tokens": request.generated_tokens.tolist(),
    }
    if request.generated_log_probs is not None:
        result["generated_log_probs"] = request.generated_log_probs
    return result


def main() -> None:
    """Load, complete, print on rank 0."""
    args = start(add_flags, GENERATION, {"micro_batch_size": 1, "exit_on_missing_checkpoint": True})
    if not args.load:
        raise FlagError("--load", "there is no model to generate from", "add --load DIR")
    if not args.prompts:
        raise FlagError("--prompts", "there is nothing to complete", 'add --prompts "some text" "another"')
    if args.max_batch_size < 1:
        raise FlagError("--max-batch-size", f"{args.max_batch_size} prompts are none", "give at least 1")
    engine = build_engine(load_model(model_provider, args), args)
    tokenize = engine.text_generation_controller.tokenize_prompt
    check_prompts(args, "--prompts", args.prompts, tokenize, args.num_tokens_to_generate, args.max_batch_size)
    wanted = CommonInferenceParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        return_log_probs=args.return_log_probs,
        num_tokens_to_generate=args.num_tokens_to_generate,
    )
    for number, request in enumerate(engine.generate(args.prompts, wanted)):
        if args.rank == 0:
            print(
                f"\n------------- RESULT FOR PROMPT {number} --------------- \n{shown(request)}", flush=True
            )


if __name__ == "__main__":
    run_main(main)
