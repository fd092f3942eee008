#!/usr/bin/env python3
"""Evaluate or finetune a model on a task: `python tasks/main.py --task MNLI ...`, or the same under torchrun.

MNLI, QQP and RACE finetune a BERT (`--pretrained-checkpoint`) for `--epochs` and report the accuracy on every file of
`--valid-data`; LAMBADA and WIKITEXT103 evaluate a GPT (`--load`) as it is.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch.distributed as dist

from megatron.training import initialize_megatron
from megatron.training.cli import run_main
from megatron.training.initialize import print_start_report, start_distributed
from tasks.arguments import ZERO_SHOT, add_tasks_arguments, check_task
from tasks.glue import finetune as glue
from tasks.race import finetune as race
from tasks.zeroshot_gpt import evaluate as zeroshot


def run() -> None:
    """Do the task that the command line names."""
    args = initialize_megatron(extra_args_provider=add_tasks_arguments, skip_mpu_initialization=True).args
    check_task(args)
    start_distributed(args)
    print_start_report()
    if args.task in ZERO_SHOT:
        zeroshot.main(args)
    elif args.task == "RACE":
        race.main(args)
    else:
        glue.main(args)
    dist.barrier()  # no rank leaves while another may still need it


if __name__ == "__main__":
    run_main(run)
