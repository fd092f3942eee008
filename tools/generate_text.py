"""Continue a prompt with a trained GPT: `python tools/generate_text.py --load DIR --use-checkpoint-args --prompt TEXT ...`.

Takes the flags of pretrain_gpt.py for the model and the tokenizer, or reads them from the checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megatron.core.errors import FlagError
from megatron.core.inference.common_inference_params import CommonInferenceParams
from megatron.core.inference.engines.mcore_engine import MCoreEngine
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.text_generation_controllers.simple_text_generation_controller import (
    SimpleTextGenerationController,
)
from megatron.inference.arguments import GENERATION
from megatron.inference.start import check_prompts, load_model, start
from megatron.training.cli import run_main
from megatron.training.global_vars import get_tokenizer
from pretrain_gpt import model_provider


def add_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """What to generate."""
    group = parser.add_argument_group("text generation")
    group.add_argument("--prompt", action="append", help="Text to continue; may be given several times.")
    group.add_argument("--out-seq-length", type=int, default=64, help="Tokens to generate.")
    group.add_argument("--temperature", type=float, default=1.0, help="Sampling temperature.")
    group.add_argument(
        "--top-k", type=int, default=0, help="Draw from the k most probable tokens; 1 is greedy."
    )
    group.add_argument(
        "--top-p", type=float, default=0.0, help="Draw from the most probable tokens of this mass."
    )
    return parser


def main() -> None:
    """Load, generate, print."""
    args = start(add_flags, GENERATION)
    tokenizer = get_tokenizer()
    if not args.load:
        raise FlagError("--load", "there is no model to generate from", "add --load DIR")
    if not args.prompt:
        raise FlagError("--prompt", "there is nothing to continue", 'add --prompt "some text"')
    model = load_model(model_provider, args)
    controller = SimpleTextGenerationController(GPTInferenceWrapper(model, args), tokenizer)
    check_prompts(
        args, "--prompt", args.prompt, controller.tokenize_prompt, args.out_seq_length, len(args.prompt)
    )
    # Stages of a pipeline draw the same tokens from the same seed.
    engine = MCoreEngine(controller, max_batch_size=len(args.prompt), random_seed=args.seed)
    wanted = CommonInferenceParams(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        num_tokens_to_generate=args.out_seq_length,
    )
    for request in engine.generate(args.prompt, wanted):
        if args.rank == 0:
            ids = [*request.prompt_tokens, *request.generated_tokens.tolist()]
            print(tokenizer.detokenize([token for token in ids if token != tokenizer.eod]), flush=True)


if __name__ == "__main__":
    run_main(main)
