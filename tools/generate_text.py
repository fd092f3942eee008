"""Continue a prompt with a trained GPT: `python tools/generate_text.py --load DIR --use-checkpoint-args --prompt TEXT ...`.

Takes the flags of pretrain_gpt.py for the model and the tokenizer, or reads them from the checkpoint.
"""

from __future__ import annotations

import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from megatron.core.errors import FlagError
from megatron.inference.text_generation.generation import generate_tokens
from megatron.training.checkpointing import load_checkpoint
from megatron.training.cli import run_main
from megatron.training.global_vars import get_args, get_tokenizer
from megatron.training.initialize import initialize_megatron
from megatron.training.setup import get_model
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
    initialize_megatron(
        add_flags,
        args_defaults={"tokenizer_type": "GPT2BPETokenizer", "no_load_rng": True, "no_load_optim": True},
    )
    args, tokenizer = get_args(), get_tokenizer()
    if not args.load:
        raise FlagError("--load", "there is no model to generate from", "add --load DIR")
    if not args.prompt:
        raise FlagError("--prompt", "there is nothing to continue", 'add --prompt "some text"')
    args.exit_on_missing_checkpoint = True
    model = get_model(model_provider, wrap_with_ddp=False)
    load_checkpoint(model, None, None)
    prompts = [tokenizer.tokenize(prompt) or [tokenizer.eod] for prompt in args.prompt]
    tokens = len(prompts) * (max(map(len, prompts)) + args.out_seq_length)
    if tokens > args.max_tokens_to_oom:
        raise FlagError(
            "--max-tokens-to-oom",
            f"{len(prompts)} rows of prompt and answer would hold {tokens} tokens, the limit is {args.max_tokens_to_oom}",
            "give fewer or shorter prompts, or raise the limit",
        )
    rows = generate_tokens(
        model[0],
        prompts,
        args.out_seq_length,
        end_token=tokenizer.eod,
        max_sequence_length=args.max_position_embeddings,
        vocab_size=tokenizer.vocab_size,
        top_k=args.top_k,
        top_p=args.top_p,
        temperature=args.temperature,
    )
    if args.rank == 0:
        for row in rows:
            print(tokenizer.detokenize([token for token in row if token != tokenizer.eod]), flush=True)


if __name__ == "__main__":
    run_main(main)
