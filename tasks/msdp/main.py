#!/usr/bin/env python3
"""Two-stage dialogue prompting: `python tasks/msdp/main.py --task MSDP-PROMPT ...`, or the same under torchrun.

MSDP-PROMPT generates knowledge, or responses, for a file of dialogues; MSDP-EVAL-F1 compares such lines with references.
Only generation by a model of one's own (without --api-prompt) reads the flags of pretrain_gpt.py.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch.distributed as dist

from megatron.core.errors import FlagError
from megatron.core.flags import flag, flags_of
from megatron.training import initialize_megatron
from megatron.training.arguments import parse_args
from megatron.training.cli import run_main
from megatron.training.config.parser import add_flag
from megatron.training.initialize import print_start_report
from tasks.msdp import prompt
from tasks.msdp.evaluate import evaluate_f1

TASKS = ("MSDP-PROMPT", "MSDP-EVAL-F1")


@dataclass
class MSDPConfig:
    """What to do, on which files."""

    # fmt: off
    task: str | None = flag(None, group="tasks", help="MSDP-PROMPT to generate, MSDP-EVAL-F1 to compare.")
    sample_input_file: str | None = flag(None, group="tasks", help="Dialogues, as preprocessing.py writes them.")
    sample_output_file: str | None = flag(
        None, group="tasks", help="Where the generated lines go (that name and .out, if not given).")
    prompt_file: str | None = flag(None, group="tasks", help="Examples.")
    prompt_type: str | None = flag(
        None, choices=("knowledge", "response"), group="tasks", help="What to generate.")
    num_prompt_examples: int = flag(10, group="tasks", help="Examples before a response.")
    guess_file: str | None = flag(None, group="tasks", help="Generated lines.")
    answer_file: str | None = flag(None, group="tasks", help="References.")
    out_seq_length: int = flag(100, group="tasks", help="Tokens to generate.")
    api_prompt: bool = flag(False, group="tasks", help="Ask a text generation server.")
    megatron_api_url: str | None = flag(None, group="tasks", help="Its address.")
    # fmt: on


def add_msdp_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the flags of this task."""
    group = parser.add_argument_group("tasks", "What to do, on which files.")
    for declared in flags_of(MSDPConfig):
        add_flag(group, declared)
    return parser


def check(args: Namespace) -> None:
    """FlagError for what the task lacks."""
    if args.task not in TASKS:
        why = "it is not said what to do" if args.task is None else f"there is no task {args.task}"
        raise FlagError("--task", why, f"give {' or '.join(TASKS)}")
    needed = ["guess_file", "answer_file"]
    if args.task == "MSDP-PROMPT":
        needed = ["prompt_type", "sample_input_file", "prompt_file"]
        needed.append("megatron_api_url" if args.api_prompt else "load")
    for dest in needed:
        if getattr(args, dest) is None:
            raise FlagError(f"--{dest.replace('_', '-')}", f"{args.task} needs it", "add it")


def run() -> None:
    """Do what the command line says."""
    args = parse_args(add_msdp_arguments)
    check(args)
    if args.task == "MSDP-EVAL-F1":
        if args.rank == 0:
            evaluate_f1(args.guess_file, args.answer_file)
    elif args.api_prompt:
        if args.rank == 0:
            prompt.main(args)
    else:
        args = initialize_megatron(
            extra_args_provider=add_msdp_arguments,
            args_defaults={"tokenizer_type": "GPT2BPETokenizer", "no_load_rng": True, "no_load_optim": True},
        ).args
        if args.virtual_pipeline_model_parallel_size is not None:
            raise FlagError(
                "--num-layers-per-virtual-pipeline-stage",
                "interleaved chunks cannot generate text",
                "drop it",
            )
        print_start_report()
        prompt.main(args)
        dist.barrier()  # no rank leaves while another may still need it


if __name__ == "__main__":
    run_main(run)
